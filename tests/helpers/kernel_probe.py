"""One norm kernel on one layout: its memory accesses, and its distance from the op's reference.

`cases()` is the whole probe; which weight rule and which output layout a case has follows from
its number, so that every pair of them occurs and each run is the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from fixpass.runtime import norms
from fixpass.runtime.kernels.add_rms_norm import add_rms_norm
from fixpass.runtime.kernels.qk_norm import qk_norm
from fixpass.runtime.kernels.rms_norm import layer_norm, rms_norm
from fixpass.testing.kernel_memory import MemoryReport, trace_memory
from helpers.accuracy import excess, ulps
from helpers.row_layouts import EVERY, READ_ONLY, Make

HIDDEN_SIZES = (1, 17, 63, 64, 80, 127, 128, 192, 256, 1024, 4096, 5000, 7168, 8192)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPS = ("rms_norm", "layer_norm", "add_rms_norm", "add_rms_norm_in_place", "qk_norm")
EPS = 1e-6
Rule = dict[str, Any]
Launch = Callable[..., MemoryReport]
RULES: tuple[Callable[[torch.dtype], Rule], ...] = (
    lambda dtype: {},
    lambda dtype: {"norm_dtype": dtype},
    lambda dtype: {"weight_offset": 1.0, "weight_dtype": torch.float32},
    lambda dtype: {"weight_offset": 1.0},
)


@dataclass(frozen=True)
class Case:
    op: str
    layout: Make
    dtype: torch.dtype
    hidden_size: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}-{self.layout.__name__}-{dtype}-{self.hidden_size}"

    @property
    def number(self) -> int:
        return crc32(str(self).encode())


@dataclass(frozen=True)
class Outcome:
    """The report, which tensors were rows read and written, and the distance (accuracy.py)."""

    report: MemoryReport
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    ulps: float
    excess: float


def cases() -> Iterator[Case]:
    for op in OPS:
        for layout in EVERY:
            if op == "add_rms_norm_in_place" and layout in READ_ONLY:
                continue
            for dtype in DTYPES:
                for hidden_size in HIDDEN_SIZES:
                    yield Case(op, layout, dtype, hidden_size)


def run(case: Case, launch: Launch = trace_memory) -> Outcome:
    """The outcome of a case whose kernels `launch` runs: by default, the interpreter."""
    torch.manual_seed(case.number)
    x = case.layout(case.hidden_size, case.dtype)
    number = case.number
    rule = RULES[number % 4](case.dtype)
    weight = None if number % 5 == 0 else torch.randn(case.hidden_size).to(case.dtype)
    bias = torch.randn(case.hidden_size).to(case.dtype) if number % 3 == 0 else None
    if case.op == "qk_norm":
        return _qk(case, x, weight, rule, launch)
    if case.op.startswith("add"):
        return _add(case, x, weight, bias, rule, launch)
    kernel, reference = {
        "rms_norm": (rms_norm, norms.rms_norm),
        "layer_norm": (layer_norm, norms.layer_norm),
    }[case.op]
    out = _out(case, x)
    want = reference(x, EPS, norms.Affine(weight, bias, **rule, out_dtype=out.dtype))
    report = launch(kernel, x, weight, EPS, out=out, bias=bias, **rule)
    center = case.op == "layer_norm"
    far = excess(out, want, x, weight, bias, rule, center=center, eps=EPS)
    return Outcome(report, ("x",), ("out",), ulps(out, want), far)


def _out(case: Case, x: Tensor) -> Tensor:
    """Contiguous, dense in x's order of dimensions, or strided as x is, in turns."""
    kind = case.number // 7 % 3
    if kind == 0 or case.layout in READ_ONLY:
        return torch.full(x.shape, -7.0, dtype=x.dtype)
    if kind == 1:
        dims = sorted(range(x.dim()), key=lambda dim: x.stride()[dim], reverse=True)
        empty = torch.full([x.shape[dim] for dim in dims], -7.0, dtype=x.dtype)
        return empty.permute([dims.index(dim) for dim in range(x.dim())])
    return case.layout(case.hidden_size, case.dtype)


def _add(
    case: Case, x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: Rule, launch: Launch
) -> Outcome:
    in_place = case.op == "add_rms_norm_in_place"
    residual = _residual(case, x, in_place)
    total = x + residual
    want = norms.rms_norm(total, EPS, norms.Affine(weight, bias, **rule, out_dtype=x.dtype))
    out, sum_out = (x, residual) if in_place else (_out(case, x), torch.empty_like(total))
    report = launch(
        add_rms_norm, x, residual, weight, EPS, out=out, sum_out=sum_out, bias=bias, **rule
    )
    distance = max(ulps(sum_out, total), ulps(out, want))
    far = excess(out, want, total, weight, bias, rule, center=False, eps=EPS)
    far = max(far, ulps(sum_out, total))
    return Outcome(report, ("x", "residual"), ("out", "sum_out"), distance, far)


def _residual(case: Case, x: Tensor, in_place: bool) -> Tensor:
    """Of the same layout, contiguous, or (where nothing is written there) over x, shifted."""
    if in_place or case.number % 3 == 0:
        return case.layout(case.hidden_size, case.dtype)
    if case.number % 3 == 1 and x.numel():
        return x.as_strided(x.shape, x.stride(), x.storage_offset() + 8)
    return torch.randn(x.shape).to(x.dtype)


def _qk(case: Case, q: Tensor, q_weight: Tensor | None, rule: Rule, launch: Launch) -> Outcome:
    k = case.layout(case.hidden_size, case.dtype)[:1]
    if q.dim() == 1:
        k = case.layout(case.hidden_size, case.dtype)
    k_weight = None if q_weight is None else torch.randn(case.hidden_size).to(case.dtype)
    q_out, k_out = _out(case, q), torch.empty_like(k, memory_format=torch.contiguous_format)
    wants = [
        norms.rms_norm(x, EPS, norms.Affine(weight, **rule, out_dtype=x.dtype))
        for x, weight in ((q, q_weight), (k, k_weight))
    ]
    report = launch(qk_norm, q, k, q_weight, k_weight, EPS, q_out=q_out, k_out=k_out, **rule)
    distance = max(map(ulps, (q_out, k_out), wants))
    sides = ((q, q_weight, q_out, wants[0]), (k, k_weight, k_out, wants[1]))
    far = max(
        excess(got, want, x, weight, None, rule, center=False, eps=EPS)
        for x, weight, got, want in sides
    )
    return Outcome(report, ("q", "k"), ("q_out", "k_out"), distance, far)
