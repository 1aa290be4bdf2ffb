"""A linear layer whose weight is rearranged in `forward`: Inductor, Inductor frozen, and fixpass.

Decode: few rows and a large weight, so that a call takes about as long as reading the weight does;
rearranging it in each call reads it, writes it and reads it again. CPU seconds, one thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn.functional import linear

from benchmarks.results import Check, Result, Spread, ratios, spread
from benchmarks.timing import calls_for, interleave
from fixpass.runtime.weights.weight_cache import CachedWeight, WeightFunction

ABOUT = (
    "Milliseconds of one call of a linear layer on one token whose weight is shuffled for a "
    "kernel, transposed, concatenated or cast in `forward`. Frozen is Inductor with "
    "`freezing=True`, which is stale after an update; fixpass is not. In the last rows nothing is "
    "rearranged, and fixpass does nothing: frozen keeps each weight once more, packed."
)
ASKING = 2.0  # microseconds a value and call
AGAINST_INDUCTOR = 0.8
AGAINST_FROZEN = 1.05


def shuffled(x: Tensor, weight: Tensor) -> Tensor:
    """aiter's 16 x 16 tiles, and the plain product of what they hold as it lies."""
    rows, hidden = weight.shape
    tiles = weight.view(rows // 16, 16, hidden // 8, 8).permute(0, 2, 1, 3).contiguous()
    return linear(x, tiles.view(rows, hidden))


def transposed(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t().contiguous()


def concatenated(x: Tensor, *weights: Tensor) -> Tensor:
    return linear(x, torch.cat(weights))


def cast(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight.to(x.dtype))


@dataclass(frozen=True)
class Case:
    """How a weight (rows, hidden) is used, in how many parts along its rows, as which type.

    checked: whether the bounds are for it; they are not where nothing is rearranged.
    """

    name: str
    use: Callable[..., Tensor]
    parts: int = 1
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    checked: bool = True

    def model(self, rows: int, hidden: int) -> nn.Module:
        dtype = self.weight_dtype or self.dtype
        weights = [torch.randn(rows // self.parts, hidden).to(dtype) for _ in range(self.parts)]
        return Rearranged(self.use, weights)


class Rearranged(nn.Module):
    """Calls `use` with the input and its parameters."""

    def __init__(self, use: Callable[..., Tensor], weights: list[Tensor]) -> None:
        super().__init__()
        self.use = use
        self.weights = nn.ParameterList([nn.Parameter(weight) for weight in weights])

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, *self.weights)


CASES = (
    Case("shuffled", shuffled),
    Case("transposed", transposed),
    Case("q, k and v concatenated", concatenated, parts=3),
    Case("shuffled, bf16", shuffled, dtype=torch.bfloat16),
    Case("cast from fp32 to bf16", cast, dtype=torch.bfloat16, weight_dtype=torch.float32),
    Case("as it is", linear, checked=False),
    Case("as it is, bf16", linear, dtype=torch.bfloat16, checked=False),
)


def run(quick: bool) -> Result:
    result = Result("fold-decode", ABOUT, quick=quick)
    size = 768 if quick else 3072
    for case in CASES:
        _measure(result, case, size, rounds=5 if quick else 61)
    asking = _asking(size, rounds=5 if quick else 61)
    result.about += f" Asking whether a value is still right takes {asking} us."
    result.checks.append(Check("us to ask whether a value is right", asking.median, ASKING))
    return result


def _asking(size: int, rounds: int) -> Spread:
    """Microseconds in which a value that is kept is found to be right."""
    weight = nn.Parameter(torch.randn(size, size))
    derived = CachedWeight(WeightFunction("transposed", lambda kept: kept.t().contiguous()), (0,))
    args = [weight]
    derived.value(args)
    samples = interleave({"asking": lambda: derived.value(args)}, rounds, calls=2000)
    return spread(samples["asking"]).scaled(1e6)


@torch.no_grad()
def _measure(result: Result, case: Case, size: int, rounds: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = case.model(size, size), torch.randn(1, size, dtype=case.dtype)
    alternatives: dict[str, Callable[[], Any]] = {}
    for name, backend in (("inductor", "inductor"), ("frozen", "inductor"), ("fixpass", "fixpass")):
        compiled = _compile(model, backend)
        with inductor_config.patch(freezing=name == "frozen"):
            compiled(x)
        alternatives[name] = lambda run=compiled: run(x)
    for got in alternatives.values():
        torch.testing.assert_close(got(), model(x), rtol=2e-2, atol=2e-1)
    calls = calls_for(alternatives["fixpass"], 0.02)
    samples = interleave(alternatives, rounds, calls)
    row = {key: spread(taken).scaled(1e3) for key, taken in samples.items()}
    plain = ratios(samples["fixpass"], samples["inductor"])
    frozen = ratios(samples["fixpass"], samples["frozen"])
    result.rows.append(
        {"weight": case.name, **row, "fixpass / inductor": plain, "fixpass / frozen": frozen}
    )
    if not case.checked:
        return
    result.checks += [
        Check(f"{case.name}: fixpass / inductor", plain.median, AGAINST_INDUCTOR),
        Check(f"{case.name}: fixpass / frozen", frozen.median, AGAINST_FROZEN),
    ]


def _compile(model: nn.Module, backend: str) -> Callable[..., Any]:
    """`model` under a backend, in a code object of its own: Dynamo keeps what it made by those."""

    def forward(x: Tensor) -> Any:
        return model(x)

    own = FunctionType(
        forward.__code__.replace(), forward.__globals__, backend, None, forward.__closure__
    )
    compiled: Callable[..., Any] = torch.compile(own, backend=backend, dynamic=False)
    return compiled
