"""`s = x + residual; rms_norm(s)` with both results used becomes `fixpass::add_rms_norm`.

A sum that only the norm reads stays an ordinary add, which fuses anyway. Nothing is done where
an operand is broadcast or rounded differently from the sum.
"""

from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)
from fixpass.lowering.layout import Layout, dense_stride, same_shape
from fixpass.passes.canonicalize_norms.norm import Norm, build_norm
from fixpass.passes.rewrite import NO_REMARK, Match, Missed, Rewrite, arg, call, is_call, val_of

aten = torch.ops.aten


@dataclass(frozen=True)
class ResidualNorm(Rewrite):
    """Anchored at the norm; the sum is looked for behind it."""

    anchors = (torch.ops.fixpass.rms_norm.default,)

    def match(self, anchor: fx.Node) -> Norm | Missed:
        total, weight, bias, eps = (arg(anchor, i) for i in range(4))
        if not is_call(total, aten.add.Tensor) or total.kwargs or len(total.users) < 2:
            return NO_REMARK
        if anchor.kwargs.get("kernel_name"):
            return Missed(f"the model asks for {anchor.kwargs['kernel_name']}, which does not add")
        operands = (arg(total, 0), arg(total, 1))
        wrong = _wrong_operands(total, operands) or _wrong_order(anchor, total)
        if wrong:
            return Missed(wrong)
        if any(isinstance(node, fx.Node) and not node < total for node in (weight, bias)):
            return Missed(f"the weight is computed after the sum {total.name}")
        later, earlier = sorted(operands, reverse=True)
        return Norm(
            (total, anchor),
            f"{total.name} joined as add_rms_norm of {Layout.of(later.meta['val'])}",
            0,
            "add_rms_norm",
            (later, earlier, weight, bias),
            eps,
            dict(anchor.kwargs),
        )

    def replace(self, graph: fx.Graph, match: Match) -> tuple[fx.Node, ...]:
        assert isinstance(match, Norm)
        total, norm = match.replaced
        vals = (norm.meta["val"], total.meta["val"])
        pair = build_norm(graph, match, total, vals)
        with graph.inserting_after(pair):
            new_total = call(graph, getitem, (pair, 1))
            new_norm = call(graph, getitem, (pair, 0))
        new_total.meta = {**total.meta}
        new_norm.meta = {**norm.meta}
        return new_total, new_norm


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


def _wrong_order(norm: fx.Node, total: fx.Node) -> str:
    layout = Layout.of(total.meta["val"])
    order = norm.kwargs.get("order") or range(layout.rank)
    assert isinstance(order, (list, tuple, range))
    if layout.has_stride(dense_stride(layout.shape, order)) is not True:
        return f"the sum {layout} and the norm differ in the order of their dimensions"
    return ""
