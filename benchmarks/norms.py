"""Norm kernels on a GPU: achieved bandwidth over that of a measured device copy.

    python -m benchmarks norms --device cuda

Each row is one operation on one layout; the bytes counted are the least possible (each input
element read once, each output element written once), so a hidden copy shows as less bandwidth.
Without a GPU it says so and exits 0: it times nothing in an interpreter.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6
Run = Callable[[], object]


@dataclass(frozen=True)
class Problem:
    """One operation on one layout: its operands' least traffic, and who runs it."""

    name: str
    least_bytes: int
    runs: dict[str, Run]


@dataclass(frozen=True)
class Measured:
    problem: str
    contender: str
    microseconds: float
    gigabytes_per_second: float
    of_copy: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON where asked; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks norms", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        print(f"norms: no GPU to measure on (device {device}); nothing was timed")
        return 0
    copied = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}: device copy {copied:.0f} GB/s")
    rows = [row for each in problems(arguments.tokens, device) for row in measure(each, copied)]
    for row in rows:
        print(
            f"{row.problem:<28} {row.contender:<22} {row.microseconds:9.1f} us "
            f"{row.gigabytes_per_second:8.0f} GB/s {row.of_copy:6.2f} of copy"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a device-to-device copy, bytes read and written together."""
    source = torch.empty(2**28, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source))
    return 2 * source.numel() * source.element_size() / seconds / 1e9


def seconds_of(run: Run) -> float:
    """Median over repeated runs, the second-level cache flushed before each."""
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median")) / 1e3


def measure(problem: Problem, copied: float) -> Iterator[Measured]:
    for contender, run in problem.runs.items():
        seconds = seconds_of(run)
        bandwidth = problem.least_bytes / seconds / 1e9
        yield Measured(problem.name, contender, seconds * 1e6, bandwidth, bandwidth / copied)


def problems(tokens: int, device: torch.device) -> Iterator[Problem]:
    """Dense rows, heads of a packed QKV tensor, q and k together, and the fused add."""
    dtype = torch.bfloat16
    for hidden_size in (1024, 4096, 8192):
        x = torch.randn(tokens, hidden_size, device=device).to(dtype)
        yield norm_problem(f"dense {tokens} x {hidden_size}", x)
    qkv = torch.randn(tokens, 48 * 128, device=device).to(dtype)
    q, k = qkv[:, : 32 * 128].unflatten(1, (32, 128)), qkv[:, 32 * 128 : -8 * 128]
    yield norm_problem(f"heads of packed {tokens} x 32", q)
    yield qk_problem(f"q and k of packed {tokens}", q, k.unflatten(1, (8, 128)))
    yield add_problem(f"add {tokens} x 4096", torch.randn(tokens, 4096, device=device).to(dtype))


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def norm_problem(name: str, x: Tensor) -> Problem:
    from fixpass.runtime.kernels.rms_norm import rms_norm

    weight = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    compiled = torch.compile(F.rms_norm)
    runs: dict[str, Run] = {
        "fixpass": lambda: rms_norm(x, weight, EPS, out=out),
        "F.rms_norm": lambda: F.rms_norm(x, x.shape[-1:], weight, EPS),
        "Inductor": lambda: compiled(x, x.shape[-1:], weight, EPS),
    }
    if find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_rms_norm

        runs["Liger-Kernel"] = lambda: liger_rms_norm(x, weight, EPS)
    return Problem(name, bytes_of(x, out, weight), runs)


def qk_problem(name: str, q: Tensor, k: Tensor) -> Problem:
    from fixpass.runtime.kernels.qk_norm import qk_norm
    from fixpass.runtime.kernels.rms_norm import rms_norm

    weight = torch.ones(q.shape[-1], dtype=q.dtype, device=q.device)
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]

    def two_launches() -> None:
        rms_norm(q, weight, EPS, out=outs[0])
        rms_norm(k, weight, EPS, out=outs[1])

    def eager(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        shape = q.shape[-1:]
        return F.rms_norm(q, shape, weight, EPS), F.rms_norm(k, shape, weight, EPS)

    compiled = torch.compile(eager)
    runs: dict[str, Run] = {
        "fixpass, one launch": lambda: qk_norm(
            q, k, weight, weight, EPS, q_out=outs[0], k_out=outs[1]
        ),
        "fixpass, two": two_launches,
        "F.rms_norm": lambda: eager(q, k),
        "Inductor": lambda: compiled(q, k),
    }
    return Problem(name, bytes_of(q, k, *outs, weight, weight), runs)


def add_problem(name: str, x: Tensor) -> Problem:
    from fixpass.runtime.kernels.add_rms_norm import add_rms_norm

    residual, weight = torch.randn_like(x), torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    out, total = torch.empty_like(x), torch.empty_like(x)

    def eager(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        return F.rms_norm(summed, x.shape[-1:], weight, EPS), summed

    compiled = torch.compile(eager)
    runs: dict[str, Run] = {
        "fixpass": lambda: add_rms_norm(x, residual, weight, EPS, out=out, sum_out=total),
        "F.rms_norm": lambda: eager(x, residual),
        "Inductor": lambda: compiled(x, residual),
    }
    return Problem(name, bytes_of(x, residual, out, total, weight), runs)
