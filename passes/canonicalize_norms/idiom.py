"""RMSNorm and LayerNorm written out in PyTorch become `fixpass::rms_norm` and `layer_norm`.

    y = h * rsqrt(mean(h * h) + eps),  h = x or x - mean(x), upcast or not
    y = cast(y) * weight + bias, cast

eps, dtypes and the order of casts are read from the graph. A norm whose statistic has another
reader, such as the backward pass, stays: computing the statistic twice would cost more than the
rewrite saves.
"""

from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import fx

from fixpass.lowering.layout import Layout, known
from fixpass.passes.canonicalize_norms.grouped_norms import describe_groups
from fixpass.passes.canonicalize_norms.norm import Norm, compute_step, out_steps
from fixpass.passes.canonicalize_norms.residual import build, joined
from fixpass.passes.canonicalize_norms.scale import (
    ADDS,
    CONVERT,
    FLOATS,
    L2_NORM,
    ROOTS,
    Scale,
    aten,
    read_scale,
)
from fixpass.passes.rewrite import (
    NO_REMARK,
    Match,
    Missed,
    Rewrite,
    arg,
    dtype_of,
    is_call,
    sole_user,
    val_of,
)


@dataclass(frozen=True)
class NormIdiom(Rewrite):
    """Anchored at the reciprocal root."""

    anchors = ROOTS

    def match(self, anchor: fx.Node) -> Norm | Missed:
        scale = read_scale(anchor)
        if isinstance(scale, Missed):
            return scale
        if scale.op == L2_NORM:
            layout = Layout.of(scale.x.meta["val"])
            return Missed(f"an L2 norm of {layout}: no kernel computes one, and Inductor fuses it")
        tail = read_affine(scale)
        x, out = val_of(scale.x), val_of(tail.last)
        if x is None or out is None:
            return NO_REMARK
        steps = out_steps(x, out)
        if isinstance(steps, Missed):
            return steps
        steps = {**tail.steps, **compute_step(x, scale.compute_dtype), **steps}
        groups = "" if tail.weight else describe_groups(tail.last)
        norm = Norm(
            (tail.last,),
            f"became {scale.op} of {Layout.of(x)}{groups}",
            0,
            scale.op,
            (scale.x, tail.weight, tail.bias),
            scale.eps,
            steps,
            owner=tail.product,
        )
        return joined(norm, scale.own)

    def replace(self, graph: fx.Graph, match: Match) -> tuple[fx.Node, ...]:
        assert isinstance(match, Norm)
        return build(graph, match)


@dataclass(frozen=True)
class Tail:
    """The last node of a norm, its weight and bias, and the rounding steps between."""

    last: fx.Node
    product: fx.Node | None
    """The node that applies the weight."""
    weight: fx.Node | None
    bias: fx.Node | None
    steps: dict[str, Any]


def read_affine(scale: Scale) -> Tail:
    """Follow `y` forward through an optional cast, weight, bias and final cast."""
    steps: dict[str, Any] = {}
    last = cast = _cast_of(scale.y) or scale.y
    weight_node, product = _operand_of(last, aten.mul.Tensor)
    weight = bias = None
    if weight_node is not None and product is not None:
        if cast is not scale.y:
            steps["norm_dtype"] = dtype_of(cast)
        weight, prepared = read_weight(weight_node, dtype_of(cast))
        steps.update(prepared)
        last = product
    if weight is not None or last is scale.y:
        bias, total = _operand_of(last, aten.add.Tensor)
        last = total or last
    if last is not scale.y and last is not cast:
        last = _cast_of(last) or last
    return Tail(_behind_copies(last), product, weight, bias, steps)


def _operand_of(node: fx.Node, op: Any) -> tuple[fx.Node | None, fx.Node | None]:
    """The 1-D operand that the only user of `node` applies to it with `op`, and that user."""
    user = sole_user(node := _behind_copies(node))
    if user is None or not is_call(user, op) or user.kwargs or arg(user, 0) is arg(user, 1):
        return None, None
    other = arg(user, 1) if arg(user, 0) is node else arg(user, 0)
    vector, rows = val_of(other), val_of(node)
    if vector is None or rows is None or vector.dim() != 1 or not rows.dim():
        return None, None
    if not vector.dtype.is_floating_point or known(vector.shape[0] == rows.shape[-1]) is not True:
        return None, None
    return other, user


def _behind_copies(node: fx.Node) -> fx.Node:
    """The last of the copies that are made of `node` alone; a copy changes no value."""
    while (user := sole_user(node)) is not None and is_call(user, aten.clone.default):
        node = user
    return node


def _cast_of(node: fx.Node) -> fx.Node | None:
    """The only user of `node`, behind copies, when it converts to another floating dtype."""
    user = sole_user(_behind_copies(node))
    if user is None or not is_call(user, CONVERT):
        return None
    return user if arg(user, 1).is_floating_point else None


def read_weight(node: fx.Node, norm_dtype: torch.dtype) -> tuple[fx.Node, dict[str, Any]]:
    """The stored weight behind `offset + weight.to(dtype)`, and the steps that lead to it."""
    steps: dict[str, Any] = {}
    stored = node
    if is_call(stored, *ADDS) and isinstance(arg(stored, 1), Real) and not stored.kwargs:
        steps["weight_offset"] = float(arg(stored, 1))
        stored = arg(stored, 0)
    if is_call(stored, CONVERT) and _is_vector(arg(stored, 0)):
        dtype, source = arg(stored, 1), arg(stored, 0)
        # Without an offset, type promotion makes the same conversion by itself.
        promoted = torch.promote_types(dtype_of(source), norm_dtype)
        if steps or promoted != torch.promote_types(dtype, norm_dtype) or promoted != dtype:
            steps["weight_dtype"] = dtype
        stored = source
    return (stored, steps) if _is_vector(stored) else (node, {})


def _is_vector(node: Any) -> bool:
    val = val_of(node)
    return val is not None and val.dim() == 1 and val.dtype in FLOATS
