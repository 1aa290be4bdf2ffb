"""Subgraphs that read only weights are constant-folded: their values are kept across calls.

A folded value is recomputed when one of its weights changes. The pass runs on Dynamo's graph, which
has the live parameters, so it also runs when Inductor's caches are warm. A folded value becomes a
new input of the graph, after Dynamo's own inputs. The metadata of the input holds a `CachedWeight`,
which computes the value and keeps it. Three kinds of values stay in the graph: views of weights,
values that need gradients, and values that the graph writes into. In mode "restride" the pass
stores a weight in another order of dimensions if the value is then a view of the weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from fixpass.lowering.layout import Layout
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.fold_weights.apply import derive, store, stored_anew
from fixpass.passes.fold_weights.constant_values import candidates_in, values_of
from fixpass.passes.fold_weights.graph_weights import Weight, weights_of
from fixpass.passes.fold_weights.mutation import unwritten, written_memory
from fixpass.passes.fold_weights.regions import FoldRegion, build, describe, orders_of, regions_in
from fixpass.passes.rewrite import find_anchors

Mode = Literal["cache", "restride", "off"]

_GRAD_MODES = (torch._C._set_grad_enabled,)
_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Replaces subgraphs that read only weights by values that are kept across calls."""

    name: ClassVar[str] = "fold-weights"

    mode: Mode = "cache"
    may_restride: bool = False
    """Mode "restride" may change the strides of weights; where False, it only reports them."""
    explicit: bool = True
    """The user set the option `fold_weights`. Where False, only weights on CPU are folded."""
    uses_fsdp: bool = False
    """FSDP2 wraps modules of this process: it refills parameters without a version count."""
    least_bytes: int = 256 << 10
    """Bytes that a region must read and write at least: below that, folding gains nothing."""
    growth: float = 2.0
    """The largest size of a value, as a multiple of the size of its weights."""

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        weights = weights_of(graph) if self.mode != "off" else {}
        if not weights or not candidates_in(graph, weights):
            return
        values = values_of(graph, weights)
        written = written_memory(graph, weights, values.found)
        for node, why in values.refused.items():
            # The graph updates this tensor in place (a counter, a cache): it needs no remark.
            if not written.intersection(node.all_input_nodes):
                result.missed(node, why)
        kept = unwritten(values.found, written)
        regions = []
        for region in regions_in(kept):
            if why := self._refusal(region, weights, written):
                result.missed(region.node, why)
            else:
                regions.append(region)
        orders = orders_of(regions, weights, wanted=self.mode == "restride")
        if self.may_restride:
            stored = PassResult(self.name, fuel=result.fuel)
            store(graph, regions, orders, weights, stored)
            if stored_anew(graph):
                result.remarks[:] = stored.remarks
                return  # Dynamo traces again, with the new strides.
        # Build all subgraphs before the graph changes: regions may share nodes.
        subgraphs = [build(region) for region in regions]
        for region, order, subgraph in zip(regions, orders, subgraphs, strict=True):
            derive(graph, region, subgraph, weights, result, describe(order))
        for node, value in values.found.items():
            if node not in kept and value.is_computed and value.sources - written:
                result.missed(node, "the graph writes into it")

    def _refusal(
        self, region: FoldRegion, weights: Mapping[fx.Node, Weight], written: frozenset[fx.Node]
    ) -> str:
        """The reason for which the region stays in the graph, or ""."""
        if reads := [source for source in region.sources if source in written]:
            return f"the graph writes into {weights[reads[0]].name}"
        if region.is_returned:
            return "the graph returns it, and the caller may write into it"
        for source in region.sources:
            if why := weights[source].why or self._distrust(weights[source].tensor):
                return f"{weights[source].name} {why}"
        if region.moved < self.least_bytes:
            return f"{region.moved:,} bytes are moved: less than keeping the value costs"
        if region.nbytes > self.growth * region.source_bytes:
            times = f"it would take {region.nbytes / region.source_bytes:.1f} times their memory"
            sizes = f"{region.nbytes:,} bytes and its weights have {region.source_bytes:,}"
            return f"{Layout.of(region.val)} has {sizes}: {times}"
        graph = region.node.graph
        if torch.is_autocast_enabled(region.val.device.type) or any(find_anchors(graph, _AUTOCAST)):
            return "autocast is on, which changes what its operations give"
        trained = [s for s in region.sources if weights[s].tensor.requires_grad]
        if trained and (torch.is_grad_enabled() or any(find_anchors(graph, _GRAD_MODES))):
            return f"training: {weights[trained[0]].name} gets a gradient through it"
        return ""

    def _distrust(self, weight: Tensor) -> str:
        """The reason for which a change of the weight might be missed, or ""."""
        is_parameter = isinstance(weight, nn.Parameter)
        if is_parameter and (self.uses_fsdp or "_fsdp_flattened" in vars(weight)):
            return "may be refilled by FSDP, which hides that from the count of writes"
        if not self.explicit and weight.device.type != "cpu":
            return (
                f"is on {weight.device.type}, where a write through .data is not seen: "
                'options={"fold_weights": "cache"} folds it all the same'
            )
        return ""
