"""What a graph does with a gate: the activation behind a multiply, and a norm over groups of a row.

    a = cast(sigmoid(gate))  or  cast(gate / (1 + exp(-gate))),  in float32

`fixpass.passes.canonicalize_norms.gated` builds the op from it. Nothing is changed here.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fixpass.lowering.layout import known, known_equal
from fixpass.passes.canonicalize_norms.idiom import read_weight
from fixpass.passes.canonicalize_norms.scale import ADDS, CONVERT, FLOATS, aten, peel_upcast
from fixpass.passes.rewrite import (
    RESHAPES,
    Missed,
    arg,
    differ,
    dtype_of,
    is_call,
    shape_of,
    sole_user,
    val_of,
)


@dataclass(frozen=True)
class Gate:
    """An activation of a gate, as one factor of `product`; `other` is the other factor."""

    product: fx.Node
    other: fx.Node
    gate: fx.Node
    activation: str
    dtype: torch.dtype
    """The dtype to which the activation is rounded."""
    owned: tuple[fx.Node, ...]
    """The nodes from the activation on that nothing else may read."""


def gate_of(product: Any) -> Gate | None:
    """The gate that `product` multiplies something by."""
    if not is_call(product, aten.mul.Tensor) or product.kwargs:
        return None
    pairs = ((product.args[1], product.args[0]), (product.args[0], product.args[1]))
    for factor, other in pairs:
        if isinstance(factor, fx.Node) and isinstance(other, fx.Node) and factor is not other:
            found = _read_activation(product, factor, other)
            if found is not None:
                return found
    return None


def _read_activation(product: fx.Node, factor: fx.Node, other: fx.Node) -> Gate | None:
    rounded = peel_upcast(factor)
    value = arg(rounded, 0) if is_call(rounded, CONVERT) else rounded
    silu = _read_silu(value)
    if silu is None and not is_call(value, aten.sigmoid.default):
        return None
    name, base = "sigmoid" if silu is None else "silu", arg(value, 0)
    computed, gate = val_of(value), base
    if computed is None or val_of(base) is None:
        return None
    if computed.dtype == torch.float32:
        gate = peel_upcast(base)
    elif name != "sigmoid" or value is not rounded:
        return None
    owned = tuple(dict.fromkeys((factor, rounded, *(silu or (value,)))))
    return Gate(product, other, gate, name, rounded.meta["val"].dtype, owned)


def _read_silu(value: Any) -> tuple[fx.Node, ...] | None:
    """The nodes of `g / (1 + exp(-g))`, as silu is decomposed."""
    if not is_call(value, aten.div.Tensor) or value.kwargs:
        return None
    below = arg(value, 1)
    if not is_call(below, *ADDS) or arg(below, 1) != 1 or below.kwargs:
        return None
    power = arg(below, 0)
    opposite = arg(power, 0) if is_call(power, aten.exp.default) else None
    if not is_call(opposite, aten.neg.default) or arg(opposite, 0) is not arg(value, 0):
        return None
    return (value, below, power, opposite)


@dataclass
class NormedRows:
    """A norm as the gated op has it: over rows, or over groups of a row."""

    x: fx.Node
    last: fx.Node
    """The node with the norm and its weight in the shape of x."""
    weight: fx.Node | None
    steps: dict[str, Any]
    owned: list[fx.Node] = field(default_factory=list)
    """The views in front of the norm."""


def read_rows(norm: fx.Node) -> NormedRows | Missed:
    """The norm `norm`, with the views, the weight and the casts behind it where it is over groups.

    A norm over groups that is not understood is missed.
    """
    x, weight = arg(norm, 0), arg(norm, 1)
    size = _group_size(x) if weight is None else 0
    steps = {k: v for k, v in norm.kwargs.items() if k not in ("order", "out_dtype")}
    if not size:
        return NormedRows(x, norm, weight, steps)
    rows = NormedRows(peel_upcast(arg(x, 0)), norm, None, {**steps, "group_size": size}, [x])
    if dtype_of(norm) != torch.float32:
        rows.steps["norm_dtype"] = dtype_of(norm)
    is_flat = False
    while (user := sole_user(rows.last)) is not None:
        if (
            is_call(user, *RESHAPES)
            and not is_flat
            and not differ(shape_of(user), shape_of(rows.x))
        ):
            is_flat = True
        elif not _read_cast(user, rows) and not _read_group_weight(user, rows, is_flat):
            break
        rows.last = user
    if not is_flat:
        return Missed(f"groups of {size} are not viewed as rows of {rows.x.name} again")
    return rows


def _read_cast(user: fx.Node, rows: NormedRows) -> bool:
    """Whether `user` rounds the norm: once in front of the weight and once behind it."""
    if not is_call(user, CONVERT) or arg(user, 1) not in FLOATS[:3]:
        return False
    if dtype_of(rows.last) != torch.float32:
        return False
    if rows.weight is None and "norm_dtype" in rows.steps:
        return False
    if rows.weight is None:
        rows.steps["norm_dtype"] = arg(user, 1)
    return True


def _read_group_weight(user: fx.Node, rows: NormedRows, is_flat: bool) -> bool:
    """Whether `user` applies the weight of all groups, (hidden_size,) or viewed in groups."""
    if rows.weight is not None or not is_call(user, aten.mul.Tensor) or user.kwargs:
        return False
    factor = arg(user, 1) if arg(user, 0) is rows.last else arg(user, 0)
    if not is_flat:
        if not is_call(factor, *RESHAPES) or differ(shape_of(factor), shape_of(rows.last)[-2:]):
            return False
        factor = arg(factor, 0)
    if val_of(factor) is None:
        return False
    weight, steps = read_weight(factor, dtype_of(rows.last))
    vector = val_of(weight)
    if vector is None or differ(vector.shape, shape_of(rows.x)[-1:]):
        return False
    promoted = torch.promote_types(dtype_of(rows.last), steps.get("weight_dtype", vector.dtype))
    if promoted != dtype_of(user):
        return False
    rows.weight = weight
    rows.steps.update(steps)
    return True


def _group_size(x: Any) -> int:
    """The size of the last dimension of `x`, where x views rows in groups of it; else 0."""
    if not is_call(x, *RESHAPES) or val_of(arg(x, 0)) is None:
        return 0
    before, after = shape_of(arg(x, 0)), shape_of(x)
    if len(after) != len(before) + 1 or differ(before[:-1], after[:-2]):
        return 0
    size = after[-1]
    is_part = type(size) is int and known(before[-1] % size == 0) is True
    return size if is_part and known_equal(before[-1], after[-2] * size) is True else 0
