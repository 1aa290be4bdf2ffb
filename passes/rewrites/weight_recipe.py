"""Where to cut a graph between what weights alone decide and the rest, and the recipe of each cut.

A cut is a computed tensor that the rest of the graph reads, itself or through views: the views
stay in the graph. A recipe runs the nodes behind the cut op by op, as eager would.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fixpass.passes.rewrite import is_call
from fixpass.passes.rewrites.weight_values import Value
from fixpass.runtime.weights import shuffle_op

_shuffle = torch.ops.fixpass.shuffle_weight
# Importing it defines the op.
assert shuffle_op


@dataclass(frozen=True)
class Cut:
    """A computed value that leaves the graph.

    sources: the weights it reads, in graph order. moved: bytes read and written to compute it.
    """

    node: fx.Node
    val: Tensor
    sources: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    moved: int

    @property
    def nbytes(self) -> int:
        """Bytes that the value takes where it is kept."""
        return prod(self.val.shape) * self.val.element_size()

    @property
    def source_bytes(self) -> int:
        fakes = (source.meta["example_value"] for source in self.sources)
        return sum(prod(fake.shape) * fake.element_size() for fake in fakes)

    @property
    def is_returned(self) -> bool:
        """Whether the graph returns it, itself or a view of it: told by Dynamo's fake tensors."""
        mine = _storage(self.node)
        returned: list[fx.Node] = []
        fx.node.map_arg(self.node.graph.output_node().args, returned.append)
        return mine is None or any(_storage(node) == mine for node in returned)

    @property
    def layout(self) -> str:
        """The layout where the value is a weight in one, else ""."""
        if not is_call(self.node, _shuffle, _shuffle.default) or self.node.kwargs:
            return ""
        weight, layout = self.node.args
        return str(layout) if weight in self.sources else ""

    @property
    def steps(self) -> str:
        """What is done to the weights, by the names of the calls that are no views."""
        names = dict.fromkeys(_name(node) for node in self.nodes if node.op.startswith("call"))
        return ", ".join(names)


def cuts_in(values: Mapping[fx.Node, Value]) -> Iterator[Cut]:
    """The cuts of a graph, in the order of its nodes."""
    escapes: dict[fx.Node, bool] = {}
    for node in reversed(list(values)):
        escapes[node] = any(
            user not in values or (not values[user].works and escapes[user]) for user in node.users
        )
    for node, value in values.items():
        if value.works and escapes[node] and value.sources and isinstance(value.val, Tensor):
            yield _cut(node, value, values)


def build(cut: Cut) -> fx.GraphModule:
    """The recipe: called with the cut's sources in order, it gives the value."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for index, source in enumerate(cut.sources):
        copied[source] = graph.placeholder(f"weight_{index}")
    for node in cut.nodes:
        copied[node] = graph.node_copy(node, lambda source: copied[source])
        copied[node].meta = {}
    graph.output(copied[cut.node])
    return fx.GraphModule(torch.nn.Module(), graph)


def _cut(node: fx.Node, value: Value, values: Mapping[fx.Node, Value]) -> Cut:
    needed: set[fx.Node] = set()
    stack = [node]
    while stack:
        item = stack.pop()
        if item in values and item not in needed:
            needed.add(item)
            stack += item.all_input_nodes
    sources = sorted(value.sources)
    moved = sum(values[item].moved for item in needed)
    return Cut(node, value.val, tuple(sources), tuple(sorted(needed)), moved)


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
