"""Norms over groups: one weight spans several rows of the norm, which a kernel's weight does not.

    g = x.view(rows, 8, 512);  y = norm(g).view(rows, 4096) * weight

The norm of the groups becomes an op without a weight. The multiply behind the view stays. This
file only names such norms for the report.
"""

from collections.abc import Sequence

import torch
from torch import fx

from fixpass.lowering.layout import all_known, known, known_equal
from fixpass.passes.rewrite import RESHAPES, arg, aten, is_call, sole_user, val_of

_SAME_ELEMENTS = (*RESHAPES, torch.ops.prims.convert_element_type.default, aten.clone.default)


def describe_groups(last: fx.Node) -> str:
    """The end of a remark, on the groups of the weightless norm `last`; empty without groups."""
    size = last.meta["val"].shape[-1]
    node = last
    while (user := sole_user(node)) is not None:
        if is_call(user, aten.mul.Tensor):
            other = arg(user, 1) if arg(user, 0) is node else arg(user, 0)
            return _spans(user, other, node, size)
        if not is_call(user, *_SAME_ELEMENTS):
            return ""
        node = user
    return ""


def _spans(product: fx.Node, other: object, node: fx.Node, size: int) -> str:
    """The text, where `other` is the weight of all groups that `product` applies to `node`."""
    weight, rows = val_of(other), val_of(node)
    if weight is None or rows is None or weight.dim() not in (1, 2):
        return ""
    tail = rows.shape[-weight.dim() :]
    same = (known_equal(a, b) for a, b in zip(weight.shape, tail, strict=False))
    if known(weight.numel() == size) is True or all_known(same) is not True:
        return ""
    groups = f"a norm over groups of {size} of {weight.numel()}"
    return f", {groups}: {product.name} applies the weight of all groups"


def describe_channels(source: fx.Node, dims: Sequence[int]) -> str:
    """The groups of channels that `dims` of `source` reduce, as `F.group_norm` does; else empty."""
    if not is_call(source, *RESHAPES) or [d % 4 for d in dims] != [2, 3]:
        return ""
    (reshaped,) = source.all_input_nodes[:1]
    shape, before = source.meta["val"].shape, reshaped.meta["val"].shape
    if len(shape) != 4 or known(before[1] == shape[1] * shape[2]) is not True:
        return ""
    return f"normalises groups of {shape[2]} of {before[1]} channels, which no kernel computes"
