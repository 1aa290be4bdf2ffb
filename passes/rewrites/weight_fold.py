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
from fixpass.passes.rewrite import Missed
from fixpass.passes.rewrites.weight_recipe import Cut
from fixpass.passes.rewrites.weight_sources import Weight, examples_of
from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.relayout import restride
from fixpass.runtime.weights.shuffle_op import has_layout
from fixpass.runtime.weights.weight_cache import CachedWeight, WeightFunction

Order = tuple[int, ...] | Missed
"""In which order of its dimensions a weight could be stored instead, or why in none."""

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
    cuts: Sequence[Cut],
    orders: Sequence[Order],
    weights: Mapping[fx.Node, Weight],
    result: PassResult,
) -> None:
    """WeightCache the weights of cuts in these orders; what cannot be is left to be derived."""
    names: dict[str, None] = {}
    for cut, order in zip(cuts, orders, strict=True):
        weight = weights[cut.sources[0]]
        if isinstance(order, Missed) or weight.name in names or not result.take_fuel():
            continue
        try:
            restride(weight.tensor, order, weight.name)
        # A call that reads it, or no memory to begin with: the weight is as it was.
        except (WeightError, torch.OutOfMemoryError):
            continue
        text = f"{weight.name} is stored in the order {order}: {cut.steps} is a view of it"
        result.applied(cut.node, text, bytes_saved=cut.moved)
        names[weight.name] = None
    graph.output_node().meta[STORED] = tuple(names)


def derive(
    graph: fx.Graph,
    cut: Cut,
    recipe: fx.GraphModule,
    weights: Mapping[fx.Node, Weight],
    result: PassResult,
    aside: str,
) -> None:
    """Compute the value and let an input stand for it; a value that cannot be had is left."""
    positions = [weights[source].position for source in cut.sources]
    derived = CachedWeight(_named(cut, recipe), positions)
    examples = examples_of(graph, weights)
    try:
        value = derived.value(examples)
    # No memory, an op that fake tensors promised and this device lacks, a weight folded otherwise.
    except (RuntimeError, WeightError) as error:
        result.missed(cut.node, f"it could not be computed: {type(error).__name__}: {error}")
        return
    if why := _unlike(value, cut.val, [] if cut.layout else examples):
        result.missed(cut.node, why)
        return
    if not result.take_fuel():
        return
    new = introduce(graph, f"folded_{cut.node.name}", cut.node.meta, derived, value)
    names = ", ".join(weights[source].name for source in cut.sources)
    if not (cut.layout and has_layout(weights[cut.sources[0]].tensor, cut.layout)):
        text = f"{cut.steps} of {names} kept as {Layout.of(cut.val)}, {cut.nbytes:,} bytes{aside}"
    else:
        text = f"{names} is folded into {cut.layout} itself: nothing is kept beside it"
    result.applied(new, text, bytes_saved=cut.moved)
    cut.node.replace_all_uses_with(new)
    _erase(graph, cut)


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


def _named(cut: Cut, compute: fx.GraphModule) -> WeightFunction:
    """The recipe with what is known of its value; equal code on equal layouts computes the same."""
    is_value = partial(has_layout, layout=cut.layout) if cut.layout else None
    like = torch.empty_strided(cut.val.shape, cut.val.stride(), dtype=cut.val.dtype, device="meta")
    fakes = [source.meta["example_value"] for source in cut.sources]
    layouts = [f"{Layout.of(fake)} {fake.stride()} {fake.device}" for fake in (*fakes, cut.val)]
    signature = "\n".join((compute.code, *layouts))
    return WeightFunction(cut.node.name, compute, is_value, like, signature)


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
