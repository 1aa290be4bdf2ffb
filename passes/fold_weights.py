"""What depends on weights alone leaves the graph: computed once, and again when a weight changed.

Runs on Dynamo's graph, where the live parameters are at hand, and so also where Inductor's caches
are warm. Such a value becomes an input of the graph behind those that Dynamo knows; its node holds
the `Derived` that gives it, which whoever compiles the graph has to pass at each call. Views of
weights cost nothing and stay. Values that need gradients, or that the graph writes, stay as well.
In mode "inplace" a weight is stored in another order where that makes a view of the value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from fixpass.lowering.layout import Layout
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.rewrite import NOT_OURS, Missed
from fixpass.passes.rewrites.weight_fold import Order, derive, store, stored_anew
from fixpass.passes.rewrites.weight_recipe import Cut, build, cuts_in
from fixpass.passes.rewrites.weight_sources import Weight, weights_of
from fixpass.passes.rewrites.weight_strides import order_for
from fixpass.passes.rewrites.weight_values import Values, candidates_in, values_of
from fixpass.passes.rewrites.weight_writes import written_memory

Mode = Literal["inplace", "derived", "off"]

_GRAD_MODES = (torch._C._set_grad_enabled,)
_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Weight-only subgraphs as values that are kept."""

    name: ClassVar[str] = "fold-weights"

    mode: Mode = "derived"
    touch: bool = False
    """Whether weights may be changed, in mode "inplace"; else it says what could be."""
    asked: bool = True
    """Whether the user asked for folds: else only weights on CPU are, of which a write through
    `.data` is seen as well."""
    sharded: bool = False
    """Whether FSDP2 is at work: it refills parameters and hides that from the count of writes."""
    least_bytes: int = 256 << 10
    """What must be read and written for a value before keeping it pays for asking at each call."""
    growth: float = 2.0
    """How many times the bytes of its weights a value may have at most."""

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        weights = weights_of(graph) if self.mode != "off" else {}
        if not weights or not candidates_in(graph, weights):
            return
        values = values_of(graph, weights)
        written = written_memory(graph, weights, values.found)
        for node, why in values.refused.items():
            # An update in place of a counter or a cache was never to leave the graph.
            if not written.intersection(node.all_input_nodes):
                result.missed(node, why)
        kept = _unwritten(values, written)
        cuts = []
        for cut in cuts_in(kept):
            if reads := [source for source in cut.sources if source in written]:
                result.missed(cut.node, f"the graph writes into {weights[reads[0]].name}")
            elif cut.is_returned:
                result.missed(
                    cut.node, "the graph returns it, and whoever gets it may write into it"
                )
            elif why := self._against(cut, weights):
                result.missed(cut.node, why)
            else:
                cuts.append(cut)
        orders = self._orders(cuts, weights)
        if self.touch:
            stored = PassResult(self.name, fuel=result.fuel)
            store(graph, cuts, orders, weights, stored)
            if stored_anew(graph):
                # The rest is for the next trace.
                result.remarks[:] = stored.remarks
                return
        # All recipes before any change: one may hold what another replaces.
        for cut, order, recipe in zip(cuts, orders, [build(cut) for cut in cuts], strict=True):
            derive(graph, cut, recipe, weights, result, _aside(order))
        for node, value in values.found.items():
            if node not in kept and value.works and value.sources - written:
                result.missed(node, "the graph writes into it")

    def _orders(self, cuts: Sequence[Cut], weights: Mapping[fx.Node, Weight]) -> list[Order]:
        """For each cut the order that its weight could be stored in instead, or why not."""
        if self.mode != "inplace":
            return [NOT_OURS for _ in cuts]
        return [
            Missed(f"only its module can show logical values: {_call(cut, weights)} folds it there")
            if cut.layout
            else order_for(cut, cuts, weights)
            for cut in cuts
        ]

    def _against(self, cut: Cut, weights: Mapping[fx.Node, Weight]) -> str:
        """Why the value is not to be kept, or ""."""
        for source in cut.sources:
            if weights[source].why:
                return f"{weights[source].name} {weights[source].why}"
            if why := self._distrust(weights[source].tensor):
                return f"{weights[source].name} {why}"
        if cut.moved < self.least_bytes:
            return f"{cut.moved:,} bytes are moved: less than keeping the value costs"
        if cut.nbytes > self.growth * cut.source_bytes:
            return (
                f"{Layout.of(cut.val)} has {cut.nbytes:,} bytes and its weights have "
                f"{cut.source_bytes:,}: it would take {cut.nbytes / cut.source_bytes:.1f} times "
                "their memory"
            )
        if torch.is_autocast_enabled(cut.val.device.type) or _calls(cut.node.graph, _AUTOCAST):
            return "autocast is on, which changes what its operations give"
        trained = [s for s in cut.sources if weights[s].tensor.requires_grad]
        has_gradients = torch.is_grad_enabled() or _calls(cut.node.graph, _GRAD_MODES)
        if trained and has_gradients:
            return f"training: {weights[trained[0]].name} gets a gradient through it"
        return ""

    def _distrust(self, weight: Tensor) -> str:
        """Why changes of a weight might not be seen, or ""."""
        is_parameter = isinstance(weight, nn.Parameter)
        if is_parameter and (self.sharded or "_fsdp_flattened" in vars(weight)):
            return "may be refilled by FSDP, which hides that from the count of writes"
        if not self.asked and weight.device.type != "cpu":
            return (
                f"is on {weight.device.type}, where a write through .data is not seen: "
                'options={"fold": "derived"} folds it all the same'
            )
        return ""


def _call(cut: Cut, weights: Mapping[fx.Node, Weight]) -> str:
    name = weights[cut.sources[0]].name
    return f"fixpass.weights.set_layouts(model, {{{name!r}: {cut.layout!r}}})"


def _aside(order: Order) -> str:
    """What the report says of a value that could have been, or could not be, had in place."""
    if isinstance(order, Missed):
        return f"; not in place: {order.why}" if order.why else ""
    return f"; a weight stored in the order {order} would make it a view"


def _unwritten(values: Values, written: frozenset[fx.Node]) -> dict[fx.Node, Any]:
    """The values that nothing written goes into; written weights are told of at the cut."""
    kept: dict[fx.Node, Any] = {}
    for node, value in values.found.items():
        inputs = [source for source in node.all_input_nodes if source in values.found]
        if all(source in kept for source in inputs) and node not in written:
            kept[node] = value
    return kept


def _calls(graph: fx.Graph, targets: Sequence[Any]) -> bool:
    return any(graph.find_nodes(op="call_function", target=target) for target in targets)
