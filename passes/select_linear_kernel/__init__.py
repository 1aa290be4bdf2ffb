"""Linear layers of few rows on CPU call `skinny_linear`, which reads weights at memory's speed.

The pass checks the kernel's contract. If the number of rows is static, the pass decides. If it is a
symbol, one graph serves decode and prefill: the op decides in each call, without a guard. For many
rows the op calls PyTorch's matmul, as Inductor would.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from fixpass.lowering.layout import Layout, known
from fixpass.lowering.linear_kernel import SKINNY_LINEAR
from fixpass.lowering.site import Site
from fixpass.passes.base import Choice, Pass, PassResult
from fixpass.passes.cost import bytes_of
from fixpass.passes.rewrite import Editor, Missed, erase_dead, find_anchors, val_of
from fixpass.passes.select_linear_kernel.experts import ExpertMatmuls, experts_of, grouped_matmuls
from fixpass.runtime.linear import MOST_ROWS, unavailable

aten = torch.ops.aten
MATMULS = (aten.mm.default, aten.addmm.default)


@dataclass(frozen=True)
class Linear:
    """One layer: x (M, K) @ weight (K, N), plus a bias (N) where there is one."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @property
    def site(self) -> Site:
        """The layer as the contract table sees it."""
        operands = {"x": self.x, "weight": self.weight, "bias": self.bias}
        layouts = {name: Layout.of(node.meta["val"]) for name, node in operands.items() if node}
        return Site("linear", layouts, "cpu")


@dataclass(frozen=True)
class SelectLinearKernel(Pass):
    """`mm` and `addmm` to `fixpass::skinny_linear`, experts to `fixpass::skinny_experts`."""

    name: ClassVar[str] = "select-linear-kernel"

    enabled: bool = False
    """Whether layers may call the kernel."""
    reason: str = ""
    """Why they may not; the report says it once. Empty: nothing is said."""
    unavailable: Callable[[], str] = field(default=unavailable, repr=False, compare=False)
    """Why this process has no kernel, or "". It is asked where the first layer could call it."""

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        grouped = grouped_matmuls()
        for node in list(find_anchors(graph, (*MATMULS, *grouped))):
            val = val_of(node)
            if val is None or val.device.type != "cpu":
                continue
            layer = experts_of(node) if node.target in grouped else layer_of(node)
            if self.enabled and isinstance(layer, Missed):
                result.missed(node, f"Inductor keeps the layer: {layer.why}")
                continue
            if reason := self.unavailable() if self.enabled else self.reason:
                result.missed(node, f"Inductor keeps all linear layers: {reason}")
            if reason or not self.enabled:
                return
            if not isinstance(layer, Missed) and result.take_fuel():
                _replace(graph, node, layer, result)


def layer_of(node: fx.Node) -> Linear | Missed:
    """The layer that an `mm` or `addmm` computes, or why the kernel does not take it."""
    scales = {name: node.kwargs.get(name, 1) for name in ("alpha", "beta")}
    if scaled := [f"{name}={value}" for name, value in scales.items() if value != 1]:
        return Missed(f"it scales by {', '.join(scaled)}")
    *bias, x, weight = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    vector = bias[0] if bias else None
    assert vector is None or isinstance(vector, fx.Node)
    layer = Linear(x, weight, vector)
    verdict = SKINNY_LINEAR.check(layer.site)
    return layer if verdict else Missed(str(verdict))


def _replace(
    graph: fx.Graph, node: fx.Node, layer: Linear | ExpertMatmuls, result: PassResult
) -> None:
    edit, weight = Editor(graph, node), layer.site.layouts["weight"]
    if isinstance(layer, Linear):
        args = (layer.x, layer.weight, layer.bias)
        new = edit.call(torch.ops.fixpass.skinny_linear.default, args)
        text = f"{SKINNY_LINEAR.name} reads {weight} once, {bytes_of(layer.weight):,} bytes"
    else:
        new = edit.call(
            torch.ops.fixpass.skinny_experts.default, (layer.x, layer.weight, layer.ends)
        )
        text = f"{SKINNY_LINEAR.name} reads {weight} of each expert that has 1 to {MOST_ROWS} rows"
    if isinstance(layer, Linear) and known(layer.x.meta["val"].shape[0] <= MOST_ROWS) is not True:
        text += f", in calls of at most {MOST_ROWS} rows"
    result.applied(new, text, choice=Choice(SKINNY_LINEAR.name))
    node.replace_all_uses_with(new)
    erase_dead(graph, node)
