"""Part bandwidth: norms as a share of a measured device copy, and the host cost of a launch.

The bytes of a row are the least possible: each input element read once, each output element
written once. A hidden copy shows as less bandwidth. Beside our kernels stand `F.rms_norm`, the
norm as models write it compiled by Inductor, and a copy followed by a dense norm.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import fixpass.runtime.ops  # noqa: F401 - defines torch.ops.fixpass
from benchmarks.gpu.clock import device_seconds, host_seconds, sets_for
from benchmarks.gpu.part import Part
from fixpass.runtime import strided
from fixpass.runtime.kernels.add_rms_norm import add_rms_norm
from fixpass.runtime.kernels.qk_norm import qk_norm
from fixpass.runtime.kernels.rms_norm import rms_norm
from fixpass.testing.kernel_memory import trace_memory

EPS, BF16 = 1e-6, torch.bfloat16
OURS, INDUCTOR, COPIED = "fixpass", "Inductor", "copy, then norm"
COPY_SHARE, PARITY, HALF = 0.9, 1.0, 0.5
BOUND = "dense 8192 x 4096"
Contender = Callable[..., object]


@dataclass(frozen=True)
class Problem:
    """One operation on one layout."""

    name: str
    make: Callable[[], tuple[Tensor, ...]]
    """Fresh operands, for runs that rotate over them."""
    num_bytes: int
    contenders: dict[str, Contender]


def run(part: Part) -> None:
    copy = copy_bandwidth(part.device)
    part.add("device copy", GBs=copy)
    with torch.no_grad():
        for problem in problems(part.device):
            if part.left() < 5:
                part.fail(problem.name, "no time left")
                continue
            with part.attempt(problem.name):
                _measure(part, problem, copy)
        with part.attempt("host cost"):
            _host_cost(part)


def copy_bandwidth(device: str) -> float:
    """GB/s of a device-to-device copy, bytes read and written together."""
    count = 1 << (30 if device != "cpu" else 20)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / device_seconds([lambda: target.copy_(source)], device) / 1e9


def written_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm as Llama writes it."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * h.to(x.dtype)


def problems(device: str) -> Iterator[Problem]:
    """The problems, sixteen times fewer rows on the CPU."""
    many, cut = (8192, 2048), 16 if device != "cpu" else 512
    rows, tokens = (n if device != "cpu" else n // cut for n in many)
    for hidden in (4096, 8192):
        yield _dense(device, rows, hidden, f"dense {many[0]} x {hidden}")
    for count in (32, 1):
        yield _dense(device, count, 4096, f"dense {count} x 4096")
    for count, name in ((tokens, many[1]), (32, 32), (1, 1)):
        yield _packed(device, count, f"q and k of packed, {name} tokens")
    for count, name in ((rows, many[0]), (32, 32), (1, 1)):
        yield _add(device, count, 4096, f"add {name} x 4096")


def _weight(size: int, device: str) -> Tensor:
    return (torch.rand(size, device=device) + 0.5).to(BF16)


def _dense(device: str, rows: int, hidden: int, name: str) -> Problem:
    def make() -> tuple[Tensor, ...]:
        x = torch.randn(rows, hidden, device=device).to(BF16)
        return x, _weight(hidden, device), torch.empty_like(x)

    compiled = torch.compile(written_norm, dynamic=False)
    contenders: dict[str, Contender] = {
        OURS: lambda x, w, out: rms_norm(x, w, EPS, out=out, norm_dtype=BF16),
        INDUCTOR: lambda x, w, out: compiled(x, w),
        "F.rms_norm": lambda x, w, out: F.rms_norm(x, (hidden,), w, EPS),
    }
    return Problem(name, make, 4 * rows * hidden, contenders)


def _packed(device: str, tokens: int, name: str) -> Problem:
    def make() -> tuple[Tensor, ...]:
        packed = torch.randn(tokens, 48 * 128, device=device).to(BF16)
        q = packed[:, : 32 * 128].unflatten(1, (32, 128))
        k = packed[:, 32 * 128 : 40 * 128].unflatten(1, (8, 128))
        outs = (torch.empty(x.shape, dtype=BF16, device=device) for x in (q, k))
        return q, k, _weight(128, device), *outs

    def written_norms(q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return written_norm(q, w), written_norm(k, w)

    def copies(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        dense = torch.contiguous_format
        return q.clone(memory_format=dense), k.clone(memory_format=dense)

    compiled = torch.compile(written_norms, dynamic=False)
    copied = torch.compile(copies, dynamic=False)
    contenders: dict[str, Contender] = {
        OURS: lambda q, k, w, *o: qk_norm(q, k, w, w, EPS, q_out=o[0], k_out=o[1], norm_dtype=BF16),
        INDUCTOR: lambda q, k, w, *_: compiled(q, k, w),
        COPIED: lambda q, k, w, *_: compiled(*copied(q, k), w),
        "F.rms_norm": lambda q, k, w, *_: [F.rms_norm(x, (128,), w, EPS) for x in (q, k)],
    }
    return Problem(name, make, 4 * tokens * 40 * 128, contenders)


def _add(device: str, rows: int, hidden: int, name: str) -> Problem:
    def make() -> tuple[Tensor, ...]:
        x, residual = (torch.randn(rows, hidden, device=device).to(BF16) for _ in range(2))
        return x, residual, _weight(hidden, device), torch.empty_like(x), torch.empty_like(x)

    def written(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return written_norm(total, w), total

    compiled = torch.compile(written, dynamic=False)
    contenders: dict[str, Contender] = {
        OURS: lambda x, r, w, *o: add_rms_norm(
            x, r, w, EPS, out=o[0], sum_out=o[1], norm_dtype=BF16
        ),
        INDUCTOR: lambda x, r, w, *_: compiled(x, r, w),
        "F.rms_norm": lambda x, r, w, *_: F.rms_norm(x + r, (hidden,), w, EPS),
    }
    return Problem(name, make, 8 * rows * hidden, contenders)


def _measure(part: Part, problem: Problem, copy: float) -> None:
    # One code object serves all problems: past eight shapes Dynamo would run it eagerly.
    torch._dynamo.reset()
    sets = [problem.make() for _ in range(sets_for(problem.num_bytes, part.device))]
    seconds: dict[str, float] = {}
    for name, call in problem.contenders.items():
        if name == OURS and not part.on_gpu:
            call = partial(trace_memory, call)
        with part.attempt(f"{problem.name}, {name}"):
            runs = [partial(call, *operands) for operands in sets]
            seconds[name] = device_seconds(runs, part.device)
            bandwidth = problem.num_bytes / seconds[name] / 1e9
            part.add(problem.name, contender=name, us=seconds[name] * 1e6, of_copy=bandwidth / copy)
    if problem.name.startswith(BOUND):
        share = problem.num_bytes / seconds[OURS] / 1e9 / copy
        part.check(f"{BOUND}: share of a device copy", share, COPY_SHARE, at_least=True)
        part.check(f"{BOUND}: fixpass / Inductor", seconds[OURS] / seconds[INDUCTOR], PARITY)
    if COPIED in seconds and "2048" in problem.name:
        ratio = seconds[OURS] / seconds[COPIED]
        part.check(f"{problem.name}: fixpass / {COPIED}", ratio, HALF)


def _host_cost(part: Part) -> None:
    """Microseconds of the host a call, where the device's work is shorter."""
    x, residual = (torch.randn(1, 4096, device=part.device).to(BF16) for _ in range(2))
    weight = _weight(4096, part.device)
    compiled = torch.compile(written_norm, dynamic=False)
    ops = torch.ops.fixpass
    kernel = "strided_add_rms_norm" if strided.is_available() else "inductor"
    calls: dict[str, Callable[[], object]] = {
        "op add_rms_norm": lambda: ops.add_rms_norm(
            x, residual, weight, None, EPS, norm_dtype=BF16, kernel_name=kernel
        ),
        "Inductor's RMS norm": lambda: compiled(x, weight),
        "torch.empty_like": lambda: torch.empty_like(x),
    }
    for name, call in calls.items():
        part.add(f"host cost of {name}", us=host_seconds(call, part.device) * 1e6)
