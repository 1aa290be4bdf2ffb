"""RMSNorm of strided heads: fixpass beside Inductor, and beside a copy followed by the norm.

The input is the q slice of a packed projection, (2048, 32, 128) with stride (6144, 128, 1). One
thread. The copy is a compiled step of its own, so that it is really made.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.results import Check, Result, ratios, spread
from benchmarks.timing import calls_for, interleave

ABOUT = (
    "Milliseconds of RMSNorm, as Llama writes it, over the last dimension of a (2048, 32, 128) "
    "tensor with stride (6144, 128, 1), on one thread."
)
ROWS, HEADS, HEAD_DIM, PACKED = 2048, 32, 128, 6144
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
EQUAL = 1.05


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def run(quick: bool) -> Result:
    result = Result("strided-norm", ABOUT, quick=quick)
    for name, dtype in DTYPES.items():
        _measure(result, name, dtype, rounds=5 if quick else 51)
    return result


def _measure(result: Result, name: str, dtype: torch.dtype, rounds: int) -> None:
    torch.manual_seed(0)
    packed = torch.randn(ROWS, PACKED).to(dtype)
    x = packed[:, : HEADS * HEAD_DIM].view(ROWS, HEADS, HEAD_DIM)
    assert x.stride() == (PACKED, HEAD_DIM, 1)
    weight = torch.rand(HEAD_DIM).to(dtype)
    alternatives = _alternatives(x, weight)
    samples = interleave(alternatives, rounds, calls_for(alternatives["fixpass"], 0.1))
    ours, theirs, copied = (samples[key] for key in ("fixpass", "inductor", "copy, then norm"))
    row = {key: spread(taken).scaled(1e3) for key, taken in samples.items()}
    gain, parity = ratios(copied, ours), ratios(ours, theirs)
    result.rows.append(
        {"dtype": name, **row, "copy, then norm / fixpass": gain, "fixpass / inductor": parity}
    )
    claim = f"{name}: copy, then norm / fixpass"
    result.checks.append(Check(claim, gain.median, 1.25, at_least=True))
    result.checks.append(Check(f"{name}: fixpass / inductor", parity.median, EQUAL))


def _alternatives(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The three ways, compiled and checked against each other."""
    torch._dynamo.reset()
    ours = torch.compile(rms_norm, backend="fixpass", dynamic=False)
    theirs = torch.compile(rms_norm, backend="inductor", dynamic=False)
    copied = torch.compile(copy, backend="inductor", dynamic=False)
    alternatives: dict[str, Callable[[], Tensor]] = {
        "fixpass": lambda: ours(x, weight),
        "inductor": lambda: theirs(x, weight),
        "copy, then norm": lambda: theirs(copied(x), weight),
    }
    with torch.no_grad():
        wanted = rms_norm(x, weight)
        for run_one in alternatives.values():
            torch.testing.assert_close(run_one(), wanted)
    assert copied(x).is_contiguous()
    return alternatives
