"""The two ways to have a weight's value without computing it in each call, carried out.

`derive` keeps the value beside the weight: a new input stands for it, whose node holds what gives
it. `store` lays the weight itself out so that the value is a view of it. What to choose, and
whether either is allowed, is the pass's affair.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fixpass.lowering.layout import Layout
from fixpass.passes.base import PassResult
from fixpass.passes.fold_weights.graph_weights import Weight, examples_of
from fixpass.passes.fold_weights.regions import FoldRegion, Order
from fixpass.passes.rewrite import Missed
from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.parameter_layout import restride
from fixpass.runtime.weights.weight_cache import CachedWeight, WeightFunction
from fixpass.runtime.weights.weight_ops import has_layout

DERIVED, VALUE = "fixpass_derived", "fixpass_value"
"""Where in its metadata an input holds the `CachedWeight` that gives it, and its first value."""
STORED = "fixpass_stored"
"""Where in its metadata the output names the weights that were stored anew."""


def folds_of(graph: fx.Graph) -> tuple[tuple[CachedWeight, Tensor], ...]:
    """What gives the inputs that were added to the graph, in their order, and their values now."""
    inputs = graph.find_nodes(op="placeholder")
    return tuple((n.meta[DERIVED], n.meta[VALUE]) for n in inputs if DERIVED in n.meta)


def stored_anew(graph: fx.Graph) -> tuple[str, ...]:
    """The weights that were stored anew: the graph has their old strides and is of no use."""
    names: tuple[str, ...] = graph.output_node().meta.get(STORED, ())
    return names


def store(
    graph: fx.Graph,
    regions: Sequence[FoldRegion],
    orders: Sequence[Order],
    weights: Mapping[fx.Node, Weight],
    result: PassResult,
) -> None:
    """Store the weights of regions in these orders; what cannot be is left to be derived."""
    names: dict[str, None] = {}
    for region, order in zip(regions, orders, strict=True):
        weight = weights[region.sources[0]]
        if isinstance(order, Missed) or weight.name in names or not result.take_fuel():
            continue
        try:
            restride(weight.tensor, order, weight.name)
        # A call that reads it, or no memory to begin with: the weight is as it was.
        except (WeightError, torch.OutOfMemoryError):
            continue
        text = f"{weight.name} is stored in the order {order}: {region.steps} is a view of it"
        result.applied(region.node, text, bytes_saved=region.moved)
        names[weight.name] = None
    graph.output_node().meta[STORED] = tuple(names)


def derive(
    graph: fx.Graph,
    region: FoldRegion,
    subgraph: fx.GraphModule,
    weights: Mapping[fx.Node, Weight],
    result: PassResult,
    aside: str,
) -> None:
    """Compute the value and let an input stand for it; a value that cannot be had is left."""
    positions = [weights[source].position for source in region.sources]
    derived = CachedWeight(_named(region, subgraph), positions)
    examples = examples_of(graph, weights)
    try:
        value = derived.value(examples)
    # No memory, an op that fake tensors promised and this device lacks, a weight folded otherwise.
    except (RuntimeError, WeightError) as error:
        result.missed(region.node, f"it could not be computed: {type(error).__name__}: {error}")
        return
    if why := _unlike(value, region.val, [] if region.layout else examples):
        result.missed(region.node, why)
        return
    if not result.take_fuel():
        return
    new = introduce(graph, f"folded_{region.node.name}", region.node.meta, derived, value)
    names = ", ".join(weights[source].name for source in region.sources)
    if not (region.layout and has_layout(weights[region.sources[0]].tensor, region.layout)):
        layout = f"{Layout.of(region.val)}, {region.nbytes:,} bytes"
        text = f"{region.steps} of {names} kept as {layout}{aside}"
    else:
        text = f"{names} is folded into {region.layout} itself: nothing is kept beside it"
    result.applied(new, text, bytes_saved=region.moved)
    region.node.replace_all_uses_with(new)
    _erase(graph, region)


def introduce(
    graph: fx.Graph, name: str, meta: Mapping[str, Any], derived: CachedWeight, value: Tensor
) -> fx.Node:
    """A new last input for what `derived` gives, at first `value`; it lends `meta`."""
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        new = graph.placeholder(name)
    # Which the graph made unique, as arguments of a function have to be.
    new.target = new.name
    new.meta = {key: item for key, item in meta.items() if key != "grapharg"}
    new.meta |= {
        DERIVED: derived,
        VALUE: value,
        "tensor_dict": {"_dynamo_static_input_type": "unguarded"},
    }
    return new


def _named(region: FoldRegion, compute: fx.GraphModule) -> WeightFunction:
    """The subgraph of the value. Equal code on equal layouts has an equal signature."""
    is_value = partial(has_layout, layout=region.layout) if region.layout else None
    like = torch.empty_strided(
        region.val.shape, region.val.stride(), dtype=region.val.dtype, device="meta"
    )
    fakes = [source.meta["example_value"] for source in region.sources]
    layouts = [f"{Layout.of(fake)} {fake.stride()} {fake.device}" for fake in (*fakes, region.val)]
    signature = "\n".join((compute.code, *layouts))
    return WeightFunction(region.node.name, compute, is_value, like, signature)


def _erase(graph: fx.Graph, region: FoldRegion) -> None:
    for node in reversed(region.nodes):
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
