"""The regions of a graph that fold-weights takes out: their subgraphs, and orders of their weights.

A region ends in a computed tensor that the rest of the graph reads, directly or through views. The
views stay in the graph. The subgraph runs the nodes of the region one by one, as eager code does.
If the weight can be stored in an order in which the region is a view, the region needs no memory of
its own. `order_for` finds this order: it runs the region's nodes on fake tensors in each order.
This module changes no weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fixpass.passes.fold_weights.constant_values import Value, is_computed
from fixpass.passes.fold_weights.graph_weights import Weight
from fixpass.passes.rewrite import NO_REMARK, Missed, guards_suppressed, is_call
from fixpass.runtime.weights import shuffle_op
from fixpass.runtime.weights.parameter_layout import obstacle_to_restride

Order = tuple[int, ...] | Missed
"""The order of dimensions in which a weight could be stored instead, or why there is none."""
_RANK = 4
"""The most dimensions of a weight whose orders are tried."""
_shuffle = torch.ops.fixpass.shuffle_weight
# The import defines the op.
assert shuffle_op


@dataclass(frozen=True)
class FoldRegion:
    """A computed value that leaves the graph."""

    node: fx.Node
    val: Tensor
    sources: tuple[fx.Node, ...]
    """The weights that it reads, in the order of the graph."""
    nodes: tuple[fx.Node, ...]
    moved: int
    """Bytes read and written to compute it."""

    @property
    def nbytes(self) -> int:
        """The size of the value in bytes."""
        return prod(self.val.shape) * self.val.element_size()

    @property
    def source_bytes(self) -> int:
        fakes = (source.meta["example_value"] for source in self.sources)
        return sum(prod(fake.shape) * fake.element_size() for fake in fakes)

    @property
    def is_returned(self) -> bool:
        """Whether the graph returns it or a view of it, that is, a tensor of the same storage."""
        mine = _storage(self.node)
        returned: list[fx.Node] = []
        fx.node.map_arg(self.node.graph.output_node().args, returned.append)
        return mine is None or any(_storage(node) == mine for node in returned)

    @property
    def layout(self) -> str:
        """The name of the weight layout that the region computes, or ""."""
        if not is_call(self.node, _shuffle, _shuffle.default) or self.node.kwargs:
            return ""
        weight, layout = self.node.args
        return str(layout) if weight in self.sources else ""

    @property
    def steps(self) -> str:
        """The names of the region's calls, for remarks."""
        names = dict.fromkeys(_name(node) for node in self.nodes if node.op.startswith("call"))
        return ", ".join(names)


def regions_in(values: Mapping[fx.Node, Value]) -> Iterator[FoldRegion]:
    """The regions of a graph, in the order of its nodes."""
    escapes: dict[fx.Node, bool] = {}
    for node in reversed(list(values)):
        escapes[node] = any(
            user not in values or (not values[user].is_computed and escapes[user])
            for user in node.users
        )
    for node, value in values.items():
        if value.is_computed and escapes[node] and value.sources and isinstance(value.val, Tensor):
            yield _region(node, value, values)


def build(region: FoldRegion) -> fx.GraphModule:
    """The subgraph as a module: it takes the region's sources in order and returns the value."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for index, source in enumerate(region.sources):
        copied[source] = graph.placeholder(f"weight_{index}")
    for node in region.nodes:
        copied[node] = graph.node_copy(node, lambda source: copied[source])
        copied[node].meta = {}
    graph.output(copied[region.node])
    return fx.GraphModule(torch.nn.Module(), graph)


def _region(node: fx.Node, value: Value, values: Mapping[fx.Node, Value]) -> FoldRegion:
    needed: set[fx.Node] = set()
    stack = [node]
    while stack:
        item = stack.pop()
        if item in values and item not in needed:
            needed.add(item)
            stack += item.all_input_nodes
    sources = sorted(value.sources)
    moved = sum(values[item].moved for item in needed)
    return FoldRegion(node, value.val, tuple(sources), tuple(sorted(needed)), moved)


def _storage(node: fx.Node) -> int | None:
    """The storage of the fake tensor that Dynamo recorded."""
    val = node.meta.get("example_value")
    if not isinstance(val, Tensor) or val.layout != torch.strided:
        return None
    return int(val.untyped_storage()._cdata)


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target)
    return target if isinstance(target, str) else str(target.__name__)


def order_for(
    region: FoldRegion, regions: Sequence[FoldRegion], weights: Mapping[fx.Node, Weight]
) -> tuple[int, ...] | Missed:
    """The order of the weight's dimensions in which the region is a view of it, or why none is."""
    source, name = region.sources[0], weights[region.sources[0]].name
    if len(region.sources) > 1:
        return Missed("it has several weights")
    if source.meta["example_value"].dim() > _RANK:
        return Missed(f"{name} has more than {_RANK} dimensions")
    if why := obstacle_to_restride(weights[source].tensor):
        return Missed(f"{name}: {why}")
    mine = {node for other in regions if other.sources == region.sources for node in other.nodes}
    readers = [user for user in source.users if user not in mine]
    if readers:
        return Missed(f"{name} is read as it is, too, by {readers[0].name}")
    fake = source.meta["example_value"]
    for order in permutations(range(fake.dim())):
        with guards_suppressed(fake):
            shape = [fake.shape[dim] for dim in order]
            inverse = [order.index(dim) for dim in range(len(order))]
            moved = torch.empty(shape, dtype=fake.dtype, device=fake.device).permute(inverse)
        if not is_computed(region.nodes, {source: moved}):
            return order
    return Missed("no order of its dimensions makes it a view")


def orders_of(
    regions: Sequence[FoldRegion], weights: Mapping[fx.Node, Weight], *, wanted: bool
) -> list[Order]:
    """For each region, the order of dimensions in which its weight could be stored, or why not.

    wanted: False tries no order and leaves no remark.
    """
    if not wanted:
        return [NO_REMARK] * len(regions)
    return [
        Missed(_layout_remark(region, weights))
        if region.layout
        else order_for(region, regions, weights)
        for region in regions
    ]


def describe(order: Order) -> str:
    """The end of a remark: whether the value is a view of the weight in another order."""
    if isinstance(order, Missed):
        return f"; not in place: {order.why}" if order.why else ""
    return f"; a weight stored in the order {order} would make it a view"


def _layout_remark(region: FoldRegion, weights: Mapping[fx.Node, Weight]) -> str:
    name = weights[region.sources[0]].name
    call = f"fixpass.weights.set_layouts(model, {{{name!r}: {region.layout!r}}})"
    return f"only its module can show logical values: {call} folds it there"
