"""Rewrite: an anchor op, what is matched around it, and what replaces the match.

`apply_rewrite` visits every anchor once. A match that cannot be taken says why, and a replacement
is built completely before anything is taken out, so that an error leaves the graph whole.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from operator import getitem
from typing import Any, TypeGuard

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fixpass.lowering.layout import Layout, dense_order, same_sizes
from fixpass.lowering.relayout import hint
from fixpass.passes.base import Choice, PassResult

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Missed:
    """Why an anchor was not matched. Falsy. An empty reason is not worth a remark."""

    why: str

    def __bool__(self) -> bool:
        return False


NO_REMARK = Missed("")


@dataclass(frozen=True)
class Match:
    """The result of a match: the nodes whose values are replaced, and a line for the report.

    effects: nodes with effects that the replacement has itself; they go with what is replaced.
    choice: the kernel that the replacement calls, where the rewrite chose one.
    missed: why the match does not reach further, for a remark of its own.
    """

    replaced: tuple[fx.Node, ...]
    text: str
    bytes_saved: int = 0
    effects: tuple[fx.Node, ...] = field(default=(), kw_only=True)
    choice: Choice | None = field(default=None, kw_only=True)
    missed: str = field(default="", kw_only=True)


class Rewrite(ABC):
    """One rewrite idea. `anchors` are the op overloads from which it starts."""

    anchors: tuple[Any, ...]

    @abstractmethod
    def match(self, anchor: fx.Node) -> Match | Missed:
        """Look around the anchor; change nothing."""

    @abstractmethod
    def replace(self, graph: fx.Graph, match: Match) -> tuple[fx.Node, ...]:
        """Build the new nodes, one for each of `match.replaced`, and take nothing out."""


def apply_rewrite(graph: fx.Graph, rewrite: Rewrite, result: PassResult) -> None:
    """Apply `rewrite` at every anchor of `graph`."""
    for anchor in list(find_anchors(graph, rewrite.anchors)):
        if anchor._erased:
            continue
        match = rewrite.match(anchor)
        if isinstance(match, Missed):
            if match.why:
                result.missed(anchor, match.why)
            continue
        if not result.take_fuel():
            return
        new = rewrite.replace(graph, match)
        site = new[0].args[0] if is_call(new[0], getitem) else new[0]
        assert isinstance(site, fx.Node)
        result.applied(site, match.text, bytes_saved=match.bytes_saved, choice=match.choice)
        if match.missed:
            result.missed(site, match.missed)
        for old, node in zip(match.replaced, new, strict=True):
            old.replace_all_uses_with(node)
        for old in match.replaced:
            erase_dead(graph, old, match.effects)


def find_anchors(graph: fx.Graph, anchors: tuple[Any, ...]) -> Iterator[fx.Node]:
    for target in anchors:
        yield from graph.find_nodes(op="call_function", target=target)


def erase_dead(graph: fx.Graph, root: fx.Node, effects: tuple[fx.Node, ...] = ()) -> None:
    """Erase `root` and the nodes that only it needed.

    Inputs, outputs, and nodes with effects that are not in `effects` stay.
    """
    stack = [root]
    while stack:
        node = stack.pop()
        if node._erased or node.users or node.op != "call_function":
            continue
        if is_impure(node) and node not in effects:
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        stack += inputs


def is_impure(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and _has_effects(node.target)


# Cached: erasing asks this of every node, and the answer for an op never changes.
@cache
def _has_effects(op: torch._ops.OpOverload) -> bool:
    probe = fx.Graph().call_function(op)
    return probe.is_impure()


def is_call(node: Any, *targets: Any) -> TypeGuard[fx.Node]:
    """Whether `node` is a node that calls one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def call(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """A new node at the insertion point, named after the op without its overload."""
    is_op = isinstance(target, torch._ops.OpOverload)
    name = target._schema.name.partition("::")[2] if is_op else target.__name__
    node = graph.create_node("call_function", target, name=name)
    # Arguments given to `create_node` are searched for raw symbolic numbers, which costs more
    # than the rest of a rewrite. Ours hold nodes and constants.
    node.args = args
    if kwargs:
        node.kwargs = kwargs
    return node


def arg(node: fx.Node, i: int) -> Any:
    """A positional argument; its type depends on the op, so the caller has to know it."""
    return node.args[i]


def sole_user(node: fx.Node) -> fx.Node | None:
    """The only user of `node`, or None when it has none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def val_of(node: Any) -> torch.Tensor | None:
    """The fake tensor that `node` records, or None for anything else."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return val if isinstance(val, torch.Tensor) else None


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of the tensor that `node` records."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of the tensor that `node` records."""
    shape: torch.Size = node.meta["val"].shape
    return shape


def differ(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are not proved to be equal."""
    return same_sizes(left, right) is not True


@dataclass(frozen=True)
class Editor:
    """Inserts nodes in front of `anchor`, which also lends its trace metadata."""

    graph: fx.Graph
    anchor: fx.Node

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        val: Any = None,
    ) -> fx.Node:
        """A new node calling `target`.

        Its value is `val`, and what the call gives on fake tensors where that is None.
        """
        with self.graph.inserting_before(self.anchor):
            node = call(self.graph, target, args, kwargs or {})
        node.meta = {**self._lent, "val": _run(node) if val is None else val}
        return node

    @cached_property
    def _lent(self) -> dict[str, Any]:
        return {k: v for k, v in self.anchor.meta.items() if k in _LENT}

    def size(self, node: fx.Node, dim: int) -> Any:
        """The size of a dimension: an int, or a node that reads a symbolic one."""
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, (node, dim))

    def clone(self, node: fx.Node, order: tuple[int, ...] | None = None) -> fx.Node:
        """A copy in dense storage, its dimensions in `order`, outermost first."""
        dense = {"memory_format": torch.contiguous_format}
        if order is None or order == tuple(range(len(order))):
            return self.call(aten.clone.default, (node,), dense)
        inverse = [order.index(dim) for dim in range(len(order))]
        moved = self.call(aten.permute.default, (node, list(order)))
        copy = self.call(aten.clone.default, (moved,), dense)
        return self.call(aten.permute.default, (copy, inverse))

    def with_strides_of(self, node: fx.Node, wanted: torch.Tensor) -> fx.Node:
        """`node`, copied where its strides are not proved to be those of `wanted`."""
        layout = Layout.of(wanted)
        if Layout.of(node.meta["val"]).has_stride(layout.stride) is True:
            return node
        return self.clone(node, dense_order(layout))


# The metadata that a new node copies from the node that it replaces: its origin, not its value.
_LENT = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "original_aten",
    "from_node",
    "seq_nr",
)


def copy_of(
    val: FakeTensor, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> FakeTensor:
    """A fake tensor with the layout of `val` in a storage of its own, of another device or dtype.

    No operation is run: on symbolic shapes that costs ten times as much. No fake tensor mode may be
    active. The storage has the size that was seen while tracing.
    """
    shape, stride = val.shape, val.stride()
    steps = [(hint(size) - 1) * hint(step) for size, step in zip(shape, stride, strict=True)]
    size = max(0, 1 + sum(steps) + hint(val.storage_offset()))
    storage = torch.empty(size, dtype=dtype or val.dtype, device="meta")
    return FakeTensor(
        val.fake_mode, storage.as_strided(shape, stride, val.storage_offset()), device or val.device
    )


@contextmanager
def guards_suppressed(values: Any) -> Iterator[None]:
    """Run operations on fake tensors under their own mode without adding a guard."""
    leaves = (v for v in pytree.tree_leaves(values) if isinstance(v, FakeTensor))
    fake = next(leaves, None)
    if fake is None:
        yield
        return
    env = fake.fake_mode.shape_env
    with fake.fake_mode, env.suppress_guards() if env is not None else nullcontext():
        yield


def _run(node: fx.Node) -> Any:
    target: Any = node.target
    args, kwargs = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    with guards_suppressed(args):
        return target(*args, **kwargs)
