"""Whether a weight laid out in memory in another order makes a cut a view of it.

Asked by running the cut's nodes on fake tensors with the strides of each order: where nothing of
them is work any more, nothing has to be kept. It changes no weight.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations

import torch
from torch import fx

from fixpass.passes.edit import guards_suppressed
from fixpass.passes.rewrite import Missed
from fixpass.passes.rewrites.weight_recipe import Cut
from fixpass.passes.rewrites.weight_sources import Weight
from fixpass.passes.rewrites.weight_values import works
from fixpass.runtime.weights.relayout import obstacle_to_restride

_RANK = 4
"""Weights of more dimensions have too many orders to try."""


def order_for(
    cut: Cut, cuts: Sequence[Cut], weights: Mapping[fx.Node, Weight]
) -> tuple[int, ...] | Missed:
    """The order in which the cut's weight has to be stored for the cut to be a view of it."""
    source, name = cut.sources[0], weights[cut.sources[0]].name
    if len(cut.sources) > 1:
        return Missed("it has several weights")
    if source.meta["example_value"].dim() > _RANK:
        return Missed(f"{name} has more than {_RANK} dimensions")
    if why := obstacle_to_restride(weights[source].tensor):
        return Missed(f"{name}: {why}")
    mine = {node for other in cuts if other.sources == cut.sources for node in other.nodes}
    readers = [user for user in source.users if user not in mine]
    if readers:
        return Missed(f"{name} is read as it is, too, by {readers[0].name}")
    fake = source.meta["example_value"]
    for order in permutations(range(fake.dim())):
        with guards_suppressed(fake):
            shape = [fake.shape[dim] for dim in order]
            inverse = [order.index(dim) for dim in range(len(order))]
            moved = torch.empty(shape, dtype=fake.dtype, device=fake.device).permute(inverse)
        if not works(cut.nodes, {source: moved}):
            return order
    return Missed("no order of its dimensions makes it a view")
