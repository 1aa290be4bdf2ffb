"""Matmuls of experts, as `grouped_mm` of transformers leaves them: rows sorted by expert.

The number of rows of an expert is known only at the call. The op uses the kernel for experts with
few rows.
"""

from dataclasses import dataclass
from typing import Any

from torch import fx

from fixpass.lowering.layout import Layout
from fixpass.lowering.linear_kernel import SKINNY_LINEAR
from fixpass.lowering.site import Site
from fixpass.passes.rewrite import Missed
from fixpass.runtime.providers import op_exists, overload_of

# Both take x, weight (E, K, N) and the ends of the experts' rows.
NAMES = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


def grouped_matmuls() -> tuple[Any, ...]:
    """The ops that are registered here."""
    return tuple(overload_of(name) for name in NAMES if op_exists(name))


@dataclass(frozen=True)
class ExpertMatmuls:
    """x (S, K), sorted by expert, @ weight (E, K, N); expert e has the rows up to ends[e]."""

    x: fx.Node
    weight: fx.Node
    ends: fx.Node

    @property
    def site(self) -> Site:
        """One expert as the contract table sees it, with a row of x."""
        x, weight = (Layout.of(node.meta["val"]) for node in (self.x, self.weight))
        layouts = {
            "x": Layout((1, *x.shape[1:]), x.stride, x.dtype),
            "weight": Layout(weight.shape[1:], weight.stride[1:], weight.dtype),
        }
        return Site("linear", layouts, "cpu")


def experts_of(node: fx.Node) -> ExpertMatmuls | Missed:
    """The experts whose product `node` is, or why the kernel does not take it."""
    x, weight, *rest = (each for each in (*node.args, *node.kwargs.values()) if each is not None)
    if len(rest) != 1 or not all(isinstance(each, fx.Node) for each in (x, weight, rest[0])):
        return Missed("it has a bias or another dtype, or no ends of the experts' rows")
    experts = ExpertMatmuls(x, weight, rest[0])  # type: ignore[arg-type]
    if (x.meta["val"].dim(), weight.meta["val"].dim()) != (2, 3):  # type: ignore[union-attr]
        return Missed("its experts do not share one x, or one weight")
    verdict = SKINNY_LINEAR.check(experts.site)
    if Layout.of(node.meta["val"]).is_dense() is not True:
        return Missed(f"its result {Layout.of(node.meta['val'])} is not dense")
    return experts if verdict else Missed(str(verdict))
