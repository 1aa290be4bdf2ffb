"""Two rotated norms: whether they are one op, and that op in their place."""

from collections.abc import Iterator, Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fixpass.lowering.layout import Layout, dense_order, known
from fixpass.passes.canonicalize_norms.norm import op_overload
from fixpass.passes.cost import VIEWS
from fixpass.passes.join_qk_norms.packed_qk import hoist
from fixpass.passes.join_qk_rope.rotated_norm import RotatedNorm
from fixpass.passes.rewrite import Editor, copy_of, is_call, val_of

aten = torch.ops.aten


def why_apart(q: RotatedNorm, k: RotatedNorm) -> str:
    """Why the two are not one op; empty where they are."""
    if (_key(q.cos), _key(q.sin)) != (_key(k.cos), _key(k.sin)):
        return "other tables rotate it"
    if q.order != k.order or q.steps != k.steps:
        return "the dimensions or the dtypes of the rotations differ"
    if q.norm.args[3] != k.norm.args[3] or q.norm.kwargs != k.norm.kwargs:
        return "their eps or rounding steps differ"
    if q.operand.meta["val"].dtype != k.operand.meta["val"].dtype:
        return "they differ in dtype"
    weights = [val_of(each.weight) for each in (q, k)]
    if len({None if weight is None else weight.dtype for weight in weights}) > 1:
        return "their weights differ in dtype, or one has none"
    if q.split is not None and not _is_one_for_all_heads(q):
        return "each head has angles of its own"
    place = min(q.root, k.root)
    for each in (q, k):
        sizes = _nodes_in(each.split.args[1]) if each.split is not None else []
        for node in _late([each.operand, each.weight, each.cos, each.sin, *sizes], place):
            return f"{node.name} is computed after {place.name}"
    return ""


def describe(q: RotatedNorm, k: RotatedNorm) -> str:
    """The remark on a pair."""
    layouts = (Layout.of(each.operand.meta["val"]) for each in (q, k))
    steps = dict(q.steps)
    pairs = "GPT-J" if steps.get("interleaved") else "NeoX"
    return (
        f"{q.norm.name} and {k.norm.name} of {' and '.join(map(str, layouts))} joined with their "
        f"rotations: {steps['rotary_dim']} values of each head, in {pairs} pairs"
    )


Tables = dict[Any, fx.Node]
"""The tables that the ops of other layers read already."""


def join(
    graph: fx.Graph, q: RotatedNorm, k: RotatedNorm, made: Tables
) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The op for both norms and rotations, and what stands for the two roots."""
    edit = Editor(graph, min(q.root, k.root))
    norm_steps = {name: step for name, step in q.norm.kwargs.items() if name != "order"}
    order = _dense_order(q)
    if order is not None and order == _dense_order(k):
        norm_steps["order"] = order
    weights = [None if each.weight is None else hoist(edit, each.weight) for each in (q, k)]
    tables = [_table(edit, q, table, made) for table in (q.cos, q.sin)]
    operands = (hoist(edit, q.operand), hoist(edit, k.operand), *weights, *tables)
    args = (*operands, q.norm.args[3])
    steps = {**norm_steps, **dict(q.steps)}
    val = None
    if q.norm.kwargs.get("order") == norm_steps.get("order"):
        # The norms have the layouts of the results, and running the op costs more than the match.
        with unset_fake_temporarily():
            val = tuple(
                copy_of(each.norm.meta["val"], dtype=each.root.meta["val"].dtype) for each in (q, k)
            )
    joined = edit.call(op_overload("qk_norm_rope"), args, steps, val)
    if "nn_module_stack" in q.norm.meta:
        joined.meta["nn_module_stack"] = q.norm.meta["nn_module_stack"]
    vals = joined.meta["val"]
    parts = [edit.call(getitem, (joined, i), val=vals[i]) for i in (0, 1)]
    return joined, tuple(_placed(edit, *pair) for pair in zip(parts, (q, k), strict=True))


def _placed(edit: Editor, part: fx.Node, each: RotatedNorm) -> fx.Node:
    """The result with the shape and the strides of the root."""
    if each.split is not None:
        shape = fx.node.map_arg(each.split.args[1], lambda node: hoist(edit, node))
        part = edit.call(aten.reshape.default, (part, shape))
    if each.order != tuple(range(len(each.order))):
        part = edit.call(aten.permute.default, (part, list(each.order)))
    return edit.with_strides_of(part, each.root.meta["val"])


def _dense_order(each: RotatedNorm) -> list[int] | None:
    """The order of dimensions in which the op writes what the root has; None means contiguous."""
    if each.split is not None:
        return None
    layout = Layout.of(each.root.meta["val"])
    places = [each.order.index(dim) for dim in range(layout.rank)]
    shape, stride = ([values[i] for i in places] for values in (layout.shape, layout.stride))
    order = dense_order(Layout(tuple(shape), tuple(stride), layout.dtype))
    return None if order is None or order == tuple(range(layout.rank)) else list(order)


def _table(edit: Editor, each: RotatedNorm, table: fx.Node, made: Tables) -> fx.Node:
    """The table such that it broadcasts to the rows of the norm's operand; made once."""
    key = (_key(table), each.order, each.split is None)
    if key not in made or not made[key] < edit.anchor:
        made[key] = _make_table(edit, each, table)
    return made[key]


def _key(node: fx.Node) -> Any:
    """What two views of one tensor have in common where they are the same."""
    if not is_call(node, *VIEWS):
        return node
    return node.target, *(_key(a) if isinstance(a, fx.Node) else repr(a) for a in node.args)


def _make_table(edit: Editor, each: RotatedNorm, table: fx.Node) -> fx.Node:
    node, rank = hoist(edit, table), len(each.order)
    if each.order != tuple(range(rank)) and node.meta["val"].dim() > 1:
        while node.meta["val"].dim() < rank:
            node = edit.call(aten.unsqueeze.default, (node, 0))
        node = edit.call(
            aten.permute.default, (node, [each.order.index(dim) for dim in range(rank)])
        )
    if each.split is not None and node.meta["val"].dim() > 1:
        node = edit.call(aten.select.int, (node, node.meta["val"].dim() - 2, 0))
    return node


def _is_one_for_all_heads(each: RotatedNorm) -> bool:
    """Whether the tables have one row for all heads of a row."""
    rank, shape = len(each.order), each.cos.meta["val"].shape
    place = each.order.index(rank - 2) - rank + len(shape)
    return place < 0 or known(shape[place] == 1) is True


def _nodes_in(argument: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.node.map_arg(argument, nodes.append)
    return nodes


def _late(nodes: Sequence[fx.Node | None], place: fx.Node) -> Iterator[fx.Node]:
    """What is not computed before `place`, and is no view that can be made again there."""
    queue = [node for node in nodes if node is not None]
    while queue:
        node = queue.pop()
        if node < place:
            continue
        if not is_call(node, *VIEWS):
            yield node
        queue += node.all_input_nodes
