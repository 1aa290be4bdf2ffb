"""`s = x + residual; rms_norm(s)` with both results used becomes `fixpass::add_rms_norm`.

The norm may read the sum through views that keep its rows. A sum that only the norm reads stays
an ordinary add, which fuses anyway. An add that broadcasts an operand, or rounds it differently
from the sum, is not joined.
"""

from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch import fx

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)
from fixpass.lowering.layout import Layout, dense_stride, known_equal, same_shape
from fixpass.passes.canonicalize_norms.norm import Norm, build_norm
from fixpass.passes.canonicalize_norms.scale import CONVERT
from fixpass.passes.rewrite import (
    NO_REMARK,
    RESHAPES,
    Editor,
    Match,
    Missed,
    Rewrite,
    arg,
    call,
    guards_suppressed,
    is_call,
    val_of,
)

aten = torch.ops.aten
_ROW_VIEWS = (*RESHAPES, aten.unsqueeze.default, aten.squeeze.dim)


class ResidualNorm(Rewrite):
    """Anchored at a norm op that stands in the graph before any rewrite."""

    anchors = (torch.ops.fixpass.rms_norm.default,)

    def match(self, anchor: fx.Node) -> Norm | Missed:
        inputs, eps = tuple(arg(anchor, i) for i in range(3)), arg(anchor, 3)
        norm = Norm((anchor,), "", 0, "rms_norm", inputs, eps, dict(anchor.kwargs))
        found = joined(norm, {anchor})
        return found if len(found.replaced) > 1 else Missed(found.missed) or NO_REMARK

    def replace(self, graph: fx.Graph, match: Match) -> tuple[fx.Node, ...]:
        assert isinstance(match, Norm)
        return build(graph, match)


def joined(norm: Norm, own: set[fx.Node]) -> Norm:
    """`norm` together with the add in front of it, where something else reads the sum too.

    own: the nodes of the norm. Where the add could be joined and is not, `missed` says why.
    """
    views, total = _behind_views(norm.inputs[0])
    if norm.op != "rms_norm" or not is_call(total, aten.add.Tensor) or total.kwargs:
        return norm
    inside = {*own, *views}
    if not any(_is_read_outside(node, inside) for node in (total, *views)):
        return norm
    operands = (arg(total, 0), arg(total, 1))
    wrong = (
        _wrong_kernel(norm)
        or _wrong_operands(total, operands)
        or _wrong_order(norm, total, views)
        or _wrong_place(norm, total)
    )
    if wrong:
        return replace(norm, missed=wrong)
    later, earlier = sorted(operands, reverse=True)
    text = f"{total.name} joined as add_rms_norm of {Layout.of(later.meta['val'])}"
    return replace(
        norm,
        replaced=(total, *norm.replaced),
        text=", ".join(filter(None, (norm.text, text))),
        op="add_rms_norm",
        inputs=(later, earlier, *norm.inputs[1:]),
        views=views,
    )


def build(graph: fx.Graph, norm: Norm) -> tuple[fx.Node, ...]:
    """The new nodes for `norm.replaced`, with or without an add."""
    last = norm.replaced[-1]
    if len(norm.replaced) == 1:
        return (build_norm(graph, norm, last, last.meta["val"]),)
    total = norm.replaced[0]
    rows = last.meta["val"]
    if norm.views:
        with guards_suppressed(rows):
            rows = rows.view(total.meta["val"].shape)
    pair = build_norm(graph, norm, total, (rows, total.meta["val"]))
    with graph.inserting_after(pair):
        new_total = call(graph, getitem, (pair, 1))
        new_norm = call(graph, getitem, (pair, 0))
    new_total.meta = {**total.meta}
    new_norm.meta = {**last.meta, "val": rows}
    for view in norm.views:
        val = last.meta["val"] if view is norm.views[-1] else None
        new_norm = Editor(graph, last).call(view.target, (new_norm, *view.args[1:]), val=val)
    return new_total, new_norm


def _behind_views(node: Any) -> tuple[tuple[fx.Node, ...], Any]:
    """The views between a sum and its norm, in their order, and the node that they view."""
    views: list[fx.Node] = []
    while is_call(node, *_ROW_VIEWS):
        before, after = val_of(node.args[0]), val_of(node)
        if before is None or after is None or not before.dim() or not after.dim():
            break
        if known_equal(before.shape[-1], after.shape[-1]) is not True:
            break
        views.insert(0, node)
        node = node.args[0]
    return tuple(views), node


def _is_read_outside(node: fx.Node, inside: set[fx.Node]) -> bool:
    return any(
        user not in inside and not (is_call(user, CONVERT) and inside.issuperset(user.users))
        for user in node.users
    )


def _wrong_kernel(norm: Norm) -> str:
    kernel = norm.steps.get("kernel_name")
    return f"the model asks for {kernel}, which does not add" if kernel else ""


def _wrong_operands(total: fx.Node, operands: tuple[object, ...]) -> str:
    vals = [val_of(operand) for operand in operands]
    if any(val is None for val in vals) or operands[0] is operands[1]:
        return f"{total.name} does not add two tensors"
    layouts = [Layout.of(val) for val in vals if val is not None]
    out = Layout.of(total.meta["val"])
    for layout in layouts:
        if same_shape(layout, out) is not True:
            return f"{total.name} broadcasts {layout} to {out}"
        if layout.dtype != out.dtype:
            return f"{total.name} converts {layout} to {out}"
    return ""


def _wrong_order(norm: Norm, total: fx.Node, views: tuple[fx.Node, ...]) -> str:
    layout = Layout.of(total.meta["val"])
    order = norm.steps.get("order") or range(layout.rank)
    is_reordered = bool(views) and "order" in norm.steps
    if is_reordered or layout.has_stride(dense_stride(layout.shape, order)) is not True:
        return f"the sum {layout} and the norm differ in the order of their dimensions"
    return ""


def _wrong_place(norm: Norm, total: fx.Node) -> str:
    parameters = norm.inputs[1:]
    if any(isinstance(node, fx.Node) and not node < total for node in parameters):
        return f"the weight is computed after the sum {total.name}"
    return ""
