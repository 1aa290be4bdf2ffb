"""What depends on weights alone leaves the graph: computed once, and again when a weight changed.

Runs on Dynamo's graph, where the live parameters are at hand, and so also where Inductor's caches
are warm. Such a value becomes an input of the graph behind those that Dynamo knows; its node holds
the `Derived` that gives it, which whoever compiles the graph has to pass at each call. Views of
weights cost nothing and stay. Values that need gradients, or that the graph writes, stay as well.
In mode "inplace" a weight is stored in another order where that makes a view of the value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from fixpass.lowering.layout import Layout
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.rewrite import NOT_OURS, Missed
from fixpass.passes.rewrites.weight_recipe import Cut, build, cuts_in
from fixpass.passes.rewrites.weight_sources import Weight, weights_of
from fixpass.passes.rewrites.weight_strides import order_for
from fixpass.passes.rewrites.weight_values import Values, candidates_in, values_of
from fixpass.passes.rewrites.weight_writes import written_memory
from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.derived import Derived
from fixpass.runtime.weights.restride import restride
from fixpass.runtime.weights.shuffle_op import is_folded

Mode = Literal["inplace", "derived", "off"]
KEY = "fixpass_derived"
"""Where in its metadata an input holds the `Derived` that gives it."""
RESTRIDED = "fixpass_restrided"
"""Where in its metadata the output names the weights that were stored anew."""

_GRAD_MODES = (torch._C._set_grad_enabled,)
_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Weight-only subgraphs as values that are kept."""

    name: ClassVar[str] = "fold-weights"

    mode: Mode = "derived"
    touch: bool = False
    """Whether weights may be changed, in mode "inplace"; else it says what could be."""
    least_bytes: int = 32 << 10
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
            elif why := self._against(cut, weights):
                result.missed(cut.node, why)
            else:
                cuts.append(cut)
        orders = self._orders(cuts, weights)
        if self.touch and any(isinstance(order, tuple) for order in orders):
            # The rest is for the next trace: this graph has the old strides.
            result.remarks.clear()
            _restride(graph, cuts, orders, weights, result)
            if restrided(graph):
                return
        # All recipes before any change: one may hold what another replaces.
        for cut, order, recipe in zip(cuts, orders, [build(cut) for cut in cuts], strict=True):
            _derive(graph, cut, recipe, weights, result, _aside(order))
        for node in set(values.found) - set(kept):
            if values.found[node].works and not values.found[node].sources & written:
                result.missed(node, "the graph writes into it")

    def _orders(
        self, cuts: Sequence[Cut], weights: Mapping[fx.Node, Weight]
    ) -> list[tuple[int, ...] | Missed]:
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
        moved = cut.source_bytes + cut.nbytes
        if moved < self.least_bytes:
            return f"{moved:,} bytes are moved: less than keeping the value costs"
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


def folds_of(graph: fx.Graph) -> tuple[Derived, ...]:
    """What gives the inputs that this pass added to the graph, in their order."""
    inputs = graph.find_nodes(op="placeholder")
    return tuple(node.meta[KEY] for node in inputs if KEY in node.meta)


def restrided(graph: fx.Graph) -> tuple[str, ...]:
    """The weights that this pass stored anew: the graph has to be traced again."""
    names: tuple[str, ...] = graph.output_node().meta.get(RESTRIDED, ())
    return names


def _restride(
    graph: fx.Graph,
    cuts: Sequence[Cut],
    orders: Sequence[tuple[int, ...] | Missed],
    weights: Mapping[fx.Node, Weight],
    result: PassResult,
) -> None:
    """Store weights anew; what cannot be is left to be derived."""
    names: dict[str, None] = {}
    for cut, order in zip(cuts, orders, strict=True):
        weight = weights[cut.sources[0]]
        if isinstance(order, Missed) or weight.name in names or not result.take_fuel():
            continue
        try:
            restride(weight.tensor, order, weight.name)
        # A reader that does not end, or no memory to stage it: the weight is as it was.
        except (WeightError, RuntimeError):
            continue
        text = f"{weight.name} is stored in the order {order}: {cut.steps} is a view of it"
        result.applied(cut.node, text, bytes_saved=cut.source_bytes + cut.nbytes)
        names[weight.name] = None
    graph.output_node().meta[RESTRIDED] = tuple(names)


def _call(cut: Cut, weights: Mapping[fx.Node, Weight]) -> str:
    name = weights[cut.sources[0]].name
    return f"fixpass.weights.fold_model(model, {{{name!r}: {cut.layout!r}}})"


def _aside(order: tuple[int, ...] | Missed) -> str:
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


def _derive(
    graph: fx.Graph,
    cut: Cut,
    recipe: fx.GraphModule,
    weights: Mapping[fx.Node, Weight],
    result: PassResult,
    aside: str,
) -> None:
    """Compute the value and let an input stand for it; a value that cannot be had is left."""
    positions = [weights[source].position for source in cut.sources]
    is_value = partial(is_folded, layout=cut.layout) if cut.layout else None
    like = torch.empty_strided(cut.val.shape, cut.val.stride(), dtype=cut.val.dtype, device="meta")
    derived = Derived(cut.node.name, recipe, positions, is_value, like)
    inputs = graph.find_nodes(op="placeholder")
    examples = [weights[node].tensor if node in weights else None for node in inputs]
    try:
        value = derived.value(examples)
    # Memory that is not there, or an op that fake tensors promised and this device lacks.
    except (RuntimeError, NotImplementedError) as error:
        result.missed(cut.node, f"it could not be computed: {type(error).__name__}: {error}")
        return
    if why := _unlike(value, cut.val, [] if cut.layout else examples):
        result.missed(cut.node, why)
        return
    if not result.take_fuel():
        return
    with graph.inserting_after(inputs[-1]):
        new = graph.placeholder(f"folded_{cut.node.name}")
    new.meta = {key: item for key, item in cut.node.meta.items() if key != "grapharg"}
    new.meta |= {KEY: derived, "tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
    names = ", ".join(weights[source].name for source in cut.sources)
    if derived.nbytes:
        text = f"{cut.steps} of {names} kept as {Layout.of(cut.val)}, {cut.nbytes:,} bytes{aside}"
    else:
        text = f"{names} is folded into {cut.layout} itself: nothing is kept beside it"
    result.applied(new, text, bytes_saved=cut.source_bytes + cut.nbytes)
    cut.node.replace_all_uses_with(new)
    _erase(graph, cut)


def _erase(graph: fx.Graph, cut: Cut) -> None:
    for node in reversed(cut.nodes):
        if not node.users and not node._erased:
            graph.erase_node(node)


def _unlike(value: Tensor, fake: Tensor, examples: Sequence[Tensor | None]) -> str:
    """How the value is not what was traced, or ""."""
    found = (value.shape, value.stride(), value.dtype, value.device)
    if found != (fake.shape, fake.stride(), fake.dtype, fake.device):
        return f"it is {Layout.of(value)} and was traced as {Layout.of(fake)}"
    memory = value.untyped_storage()._cdata
    if any(t is not None and t.untyped_storage()._cdata == memory for t in examples):
        return "it shares memory with a weight"
    return ""


def _calls(graph: fx.Graph, targets: Sequence[Any]) -> bool:
    return any(graph.find_nodes(op="call_function", target=target) for target in targets)
