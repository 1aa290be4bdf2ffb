"""A norm whose result is rotated (RoPE), in any spelling: the tables, the pairs, the dtypes.

The columns of each head are followed from the norm to the node that holds all of them rotated.
Nothing is changed here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fixpass.lowering.layout import known_equal
from fixpass.passes.canonicalize_norms.scale import CONVERT
from fixpass.passes.join_qk_rope.head_columns import (
    HeadColumns,
    Piece,
    Term,
    aten,
    columns_of,
)
from fixpass.passes.rewrite import (
    NO_REMARK,
    RESHAPES,
    Missed,
    arg,
    is_call,
    sole_user,
)

MOST_NODES = 64
"""The nodes that are looked at behind one norm."""
_STARTS = (
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.mul.Tensor,
    CONVERT,
    *RESHAPES,
)


@dataclass(frozen=True)
class RotatedNorm:
    """A norm with the rotation behind it."""

    norm: fx.Node
    root: fx.Node
    """The node that holds the rotated heads."""
    cos: fx.Node
    sin: fx.Node
    steps: tuple[tuple[str, Any], ...]
    """Arguments of `fixpass::qk_norm_rope`, without those of the norm."""
    split: fx.Node | None
    """The view that makes heads of the norm's rows, where the norm has none."""
    order: tuple[int, ...]
    """The dimensions of the heads in the order in which the root has them."""

    @property
    def operand(self) -> fx.Node:
        operand: fx.Node = arg(self.norm, 0)
        return operand

    @property
    def weight(self) -> fx.Node | None:
        weight: fx.Node | None = arg(self.norm, 1)
        return weight


@dataclass(frozen=True)
class _Pairs:
    cos: fx.Node
    sin: fx.Node
    rotary_dim: int
    interleaved: bool


def read_rotated(norm: fx.Node) -> RotatedNorm | Missed:
    """The rotation behind `norm`; else `Missed`, with a reason if nearly found."""
    heads, split, order = _heads(norm)
    size = heads.meta["val"].shape[-1]
    if type(size) is not int or not any(is_call(user, *_STARTS) for user in heads.users):
        return NO_REMARK
    found, root, pairs, others = _follow(heads, size)
    if root is None or pairs is None:
        sliced = any(value.is_raw and value.width < size for value in found.values())
        is_near = sliced and any(not value.is_raw for value in found.values())
        return Missed("its columns are no pairs of a rotation in the end") if is_near else NO_REMARK
    if others:
        names = ", ".join(dict.fromkeys(node.name for node in others))
        return Missed(f"its heads are also read before the rotation, by {names}")
    steps = dict(found[root].steps)
    after = sole_user(root)
    if after is not None and is_call(after, CONVERT) and "result" not in steps:
        root, steps["result"] = after, arg(after, 1)
    wrong = _wrong(norm, pairs, steps)
    if wrong:
        return Missed(wrong)
    given: dict[str, Any] = {"rotary_dim": pairs.rotary_dim}
    if split is not None:
        given["head_size"] = size
    if pairs.interleaved:
        given["interleaved"] = True
    if "operand" in steps:
        given["rope_dtype"] = steps["operand"]
    if (result := root.meta["val"].dtype) != norm.meta["val"].dtype:
        given["result_dtype"] = result
    return RotatedNorm(norm, root, pairs.cos, pairs.sin, tuple(given.items()), split, order)


def _heads(norm: fx.Node) -> tuple[fx.Node, fx.Node | None, tuple[int, ...]]:
    """The node with a head in each row, the view that makes heads, and the order of dimensions."""
    node, split = norm, None
    order = tuple(range(norm.meta["val"].dim()))
    while (user := sole_user(node)) is not None:
        rank = len(order)
        if is_call(user, aten.permute.default):
            dims = [dim % rank for dim in arg(user, 1)]
            if dims[-1] != rank - 1:
                break
            order = tuple(order[dim] for dim in dims)
        elif split is None and order == tuple(range(rank)) and _splits_heads(user):
            split, order = user, (*order, rank)
        else:
            break
        node = user
    return node, split, order


def _splits_heads(view: fx.Node) -> bool:
    if not is_call(view, *RESHAPES):
        return False
    before, after = arg(view, 0).meta["val"].shape, view.meta["val"].shape
    leads = zip(before[:-1], after[:-2], strict=False)
    # A view of pairs is a part of the rotation.
    is_split = len(after) == len(before) + 1 and after[-1] != 2
    return is_split and all(known_equal(a, b) is True for a, b in leads)


def _follow(
    heads: fx.Node, size: int
) -> tuple[dict[fx.Node, HeadColumns], fx.Node | None, _Pairs | None, list[fx.Node]]:
    """What is known of the nodes behind `heads`, the rotated heads, and other readers."""
    found = {heads: HeadColumns(((Term(range(size)),),))}
    queue, others = set(heads.users), []
    root, pairs = None, None
    while queue and len(found) < MOST_NODES:
        node = min(queue)
        queue.remove(node)
        value = columns_of(node, found) if root is None else None
        if value is None:
            others.append(node)
            continue
        found[node] = value
        pairs = _pairs(value, size)
        if pairs is not None:
            root = node
        else:
            queue |= set(node.users)
    return found, root, pairs, [*others, *queue]


def _pairs(value: HeadColumns, size: int) -> _Pairs | None:
    """The tables and the order of pairs, where the value is a whole rotated head."""
    if value.width != size or value.form not in ("row", "alternating") or len(value.pieces) < 2:
        return None
    first, second, *rest = value.pieces
    half = len(first[0].columns)
    rotary_dim = 2 * half
    is_interleaved = value.form == "alternating"
    a, b = range(half), range(half, rotary_dim)
    if is_interleaved:
        a, b = range(0, rotary_dim, 2), range(1, rotary_dim, 2)
    kept = [(Term(range(rotary_dim, size)),)] if rotary_dim < size else []
    if rest != kept:
        return None
    for entries, width in (((a, b), rotary_dim), ((range(half), range(half)), half)):
        for cos, sin in _tables(first):
            if not all(known_equal(t.meta["val"].shape[-1], width) is True for t in (cos, sin)):
                continue
            wanted = (
                {Term(a, 1, cos, entries[0]), Term(b, -1, sin, entries[0])},
                {Term(b, 1, cos, entries[1]), Term(a, 1, sin, entries[1])},
            )
            if (set(first), set(second)) == wanted:
                return _Pairs(cos, sin, rotary_dim, is_interleaved)
    return None


def _tables(piece: Piece) -> Iterator[tuple[fx.Node, fx.Node]]:
    tables = [term.table for term in piece if term.table is not None]
    if len(tables) == 2:
        yield tables[0], tables[1]
        yield tables[1], tables[0]


def _wrong(norm: fx.Node, pairs: _Pairs, steps: dict[str, torch.dtype]) -> str:
    if not is_call(norm, torch.ops.fixpass.rms_norm.default):
        return "a layer norm is rotated, and the op has RMS norms"
    if norm.args[2] is not None:
        return f"the norm has the bias {norm.args[2]}"
    if norm.kwargs.get("kernel_name"):
        return f"the model asks for {norm.kwargs['kernel_name']}, which does not rotate"
    cos, sin = pairs.cos.meta["val"], pairs.sin.meta["val"]
    if cos.dtype != sin.dtype:
        return f"cos is {cos.dtype} and sin is {sin.dtype}"
    if cos.shape != sin.shape:
        return "cos and sin differ in shape"
    if steps["sum"] != steps["product"]:
        return f"the products are {steps['product']} and their sum is {steps['sum']}"
    return ""
