"""Carries out a fold: `derive` keeps the value beside the weight, `store` reorders the weight.

`derive` replaces the value by a new input of the graph, whose metadata computes it. `store` stores
the weight in an order of dimensions in which the value is a view of the weight. The pass decides
which of the two is used, and whether it is allowed.
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
from fixpass.runtime.weights.shuffle_op import has_layout
from fixpass.runtime.weights.weight_cache import CachedWeight, WeightFunction

DERIVED, VALUE = "fixpass_derived", "fixpass_value"
"""The keys of an input's metadata for the `CachedWeight` that computes it, and its first value."""
STORED = "fixpass_stored"
"""The key of the output's metadata for the names of the weights that `store` reordered."""


def folds_of(graph: fx.Graph) -> tuple[tuple[CachedWeight, Tensor], ...]:
    """The `CachedWeight` and the first value of each input that `derive` added, in order."""
    inputs = graph.find_nodes(op="placeholder")
    return tuple((n.meta[DERIVED], n.meta[VALUE]) for n in inputs if DERIVED in n.meta)


def stored_anew(graph: fx.Graph) -> tuple[str, ...]:
    """The names of the weights that `store` reordered. The graph has their old strides: drop it."""
    names: tuple[str, ...] = graph.output_node().meta.get(STORED, ())
    return names


def store(
    graph: fx.Graph,
    regions: Sequence[FoldRegion],
    orders: Sequence[Order],
    weights: Mapping[fx.Node, Weight],
    result: PassResult,
) -> None:
    """Store the weights of regions in these orders, where that is possible."""
    names: dict[str, None] = {}
    for region, order in zip(regions, orders, strict=True):
        weight = weights[region.sources[0]]
        if isinstance(order, Missed) or weight.name in names or not result.take_fuel():
            continue
        try:
            restride(weight.tensor, order, weight.name)
        # A running call reads the weight, or memory is short: the weight did not change.
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
    """Compute the value and replace it by a new input; a value that cannot be computed stays."""
    positions = [weights[source].position for source in region.sources]
    derived = CachedWeight(_named(region, subgraph), positions)
    examples = examples_of(graph, weights)
    try:
        value = derived.value(examples)
    # Memory is short, the device lacks the op, or the weight has another layout already.
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
    """Add a last input for the value of `derived`, with a copy of the metadata `meta`."""
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        new = graph.placeholder(name)
    # The graph makes names unique; arguments of a function need unique targets too.
    new.target = new.name
    new.meta = {key: item for key, item in meta.items() if key != "grapharg"}
    new.meta |= {
        DERIVED: derived,
        VALUE: value,
        "tensor_dict": {"_dynamo_static_input_type": "unguarded"},
    }
    return new


def _named(region: FoldRegion, compute: fx.GraphModule) -> WeightFunction:
    """The subgraph with its signature: equal for equal code on equal layouts."""
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
    """The difference between the value and the traced one, or ""."""
    found = (value.shape, value.stride(), value.dtype, value.device)
    if found != (fake.shape, fake.stride(), fake.dtype, fake.device):
        return f"it is {Layout.of(value)} and was traced as {Layout.of(fake)}"
    memory = value.untyped_storage()._cdata
    if any(t is not None and t.untyped_storage()._cdata == memory for t in examples):
        return "it shares memory with a weight"
    return ""
