"""What a guard costs an eager call of a norm kernel whose contract holds.

The kernels do nothing, so that only the guard is measured: the difference between a guarded call
and a bare one, taken side by side. The rows of a hook have the two calls that SGLang's registry
puts around a kernel as well. What a copy costs is in strided_norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.results import Check, Result, spread
from benchmarks.timing import interleave
from fixpass.eager_kernels import wrap
from fixpass.integrations.sglang.serving import guarding

ABOUT = (
    "Microseconds that a guard adds to one call of a norm kernel on dense bf16 rows, where nothing "
    "is to be done: a guarded call less a bare one, of kernels that do nothing, on one thread."
)
BOUND = 2.0
ROWS, HIDDEN = 256, 4096


@dataclass(frozen=True)
class Case:
    """A foreign op, a kernel of its signature that does nothing, and the operands of a call."""

    op: str
    kernel: Callable[..., Any]
    args: tuple[Any, ...]
    hooked: bool = False

    @property
    def name(self) -> str:
        return f"{self.op}, as SGLang's hook" if self.hooked else self.op

    def guarded(self) -> Callable[..., Any]:
        return (
            _around(self.kernel, guarding(self.op)) if self.hooked else wrap(self.kernel, self.op)
        )


def run(quick: bool) -> Result:
    result = Result("guards", ABOUT, quick=quick)
    rounds, calls = (5, 200) if quick else (301, 2000)
    for case in _cases():
        guarded = case.guarded()
        samples = interleave(
            {
                "bare": lambda case=case: case.kernel(*case.args),
                "guarded": lambda case=case, guarded=guarded: guarded(*case.args),
            },
            rounds,
            calls,
        )
        pairs = zip(samples["guarded"], samples["bare"], strict=True)
        added = spread([(mine - bare) * 1e6 for mine, bare in pairs])
        row = {name: spread(taken).scaled(1e6) for name, taken in samples.items()}
        result.rows.append({"op": case.name, **row, "added": added})
        result.checks.append(Check(f"{case.name}: microseconds added", added.median, BOUND))
    return result


def _cases() -> tuple[Case, ...]:
    x, residual, out, total = (torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16) for _ in range(4))
    weight, bias = (torch.zeros(HIDDEN, dtype=torch.bfloat16) for _ in range(2))
    return (
        Case("aiter::rmsnorm2d_fwd", _three, (x, weight, 1e-6)),
        Case("aiter::layernorm2d_fwd", _four, (x, weight, bias, 1e-6)),
        Case("aiter::rmsnorm2d_fwd_with_add", _six, (out, x, residual, total, weight, 1e-6)),
        Case("aiter::rmsnorm2d_fwd", _three, (x, weight, 1e-6), hooked=True),
        Case("aiter::rmsnorm2d_fwd_with_add", _six, (out, x, residual, total, weight, 1e-6), True),
        Case("_C::rms_norm", _four, (out, x, weight, 1e-6)),
        Case("_C::fused_add_rms_norm", _four, (x, residual, weight, 1e-6)),
    )


def _around(kernel: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    """What SGLang's registry makes of a hook of type AROUND."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(kernel, *args, **kwargs)

    return wrapper


def _three(a: Any, b: Any, c: Any) -> None: ...


def _four(a: Any, b: Any, c: Any, d: Any) -> None: ...


def _six(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> None: ...
