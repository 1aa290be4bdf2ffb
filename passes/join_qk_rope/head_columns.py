"""The columns of a head, followed through slices, products and sums: what a rotation is made of.

A `HeadColumns` says of a node which columns of the normalised head it holds, and by which columns
of which tables they were multiplied. A rotation in any spelling ends in one of a few such values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from operator import getitem
from typing import Any

import torch
from torch import fx

from fixpass.passes.canonicalize_norms.scale import CONVERT
from fixpass.passes.rewrite import RESHAPES, arg, differ, dtype_of, is_call, val_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Term:
    """Columns of the head, with a sign, times columns of a table where there is one."""

    columns: range
    sign: int = 1
    table: fx.Node | None = None
    entries: range = range(0)

    def cut(self, where: slice) -> "Term":
        return replace(self, columns=self.columns[where], entries=self.entries[where])


Piece = tuple[Term, ...]
"""The sum of its terms, whose columns are equally many."""
Steps = tuple[tuple[str, torch.dtype], ...]
"""What happened to a value, with the dtype to which each step rounded it."""


@dataclass(frozen=True)
class HeadColumns:
    """A node's last dimension: pieces side by side, or two pieces whose columns alternate.

    form: "row"; "column", with one more dimension of size 1; "pairs", with one more dimension of
    size 2; "alternating", a row again.
    """

    pieces: tuple[Piece, ...]
    steps: Steps = ()
    form: str = "row"

    @property
    def width(self) -> int:
        return sum(len(piece[0].columns) for piece in self.pieces)

    @property
    def is_raw(self) -> bool:
        """Whether nothing was multiplied yet."""
        return all(term.table is None for piece in self.pieces for term in piece)


Found = Mapping[fx.Node, HeadColumns]


def columns_of(node: fx.Node, found: Found) -> HeadColumns | None:
    """The columns of `node`, from those of its operands; None where a step is not followed."""
    rule = _RULES.get(node.target)
    return None if rule is None else rule(node, found)


def _slice(node: fx.Node, found: Found) -> HeadColumns | None:
    given: tuple[Any, ...] = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    dim, *where = given
    source = arg(node, 0)
    if not _is_last(source, dim) or not all(i is None or type(i) is int for i in where):
        return None
    value = found[source]
    return _cut(value, range(value.width)[slice(*where)])


def _cut(value: HeadColumns, where: range) -> HeadColumns | None:
    """The columns of a row at `where`."""
    if value.form != "row" or not where:
        return None
    if len(value.pieces) == 1:
        at = slice(where.start, where.stop, where.step)
        return replace(value, pieces=(tuple(term.cut(at) for term in value.pieces[0]),))
    if where.step != 1:
        return None
    pieces, start = [], 0
    for piece in value.pieces:
        stop = start + len(piece[0].columns)
        low, high = max(start, where.start), min(stop, where.stop)
        if low < high:
            at = slice(low - start, high - start)
            pieces.append(tuple(term.cut(at) for term in piece))
        start = stop
    return replace(value, pieces=tuple(pieces))


def _split(node: fx.Node, found: Found) -> HeadColumns | None:
    """A list of parts of its source; `_part` reads one of them."""
    source, dim = arg(node, 0), arg(node, -1)
    has_dim = len(node.args) == (2 if is_call(node, aten.unbind.int) else 3)
    return found[source] if has_dim and _is_last(source, dim) else None


def _part(node: fx.Node, found: Found) -> HeadColumns | None:
    parts, i = arg(node, 0), arg(node, 1)
    value = found[parts] if isinstance(parts, fx.Node) else None
    if value is None or not isinstance(i, int) or not isinstance(parts, fx.Node):
        return None
    if is_call(parts, aten.unbind.int):
        return _of_pair(value, i)
    sizes = arg(parts, 1)
    if type(sizes) is int:
        return _cut(value, range(value.width)[sizes * i : sizes * (i + 1)])
    if isinstance(sizes, fx.Node) or not all(type(size) is int for size in sizes):
        return None
    start = sum(sizes[:i])
    return _cut(value, range(start, start + sizes[i]))


def _select(node: fx.Node, found: Found) -> HeadColumns | None:
    source, dim, i = (arg(node, place) for place in range(3))
    return _of_pair(found[source], i) if _is_last(source, dim) else None


def _of_pair(value: HeadColumns, i: Any) -> HeadColumns | None:
    if value.form != "pairs" or i not in (-2, -1, 0, 1):
        return None
    return replace(value, pieces=(value.pieces[i],), form="row")


def _unsqueeze(node: fx.Node, found: Found) -> HeadColumns | None:
    value = found[arg(node, 0)]
    is_row = value.form == "row" and len(value.pieces) == 1
    return replace(value, form="column") if is_row and _is_last(node, arg(node, 1)) else None


def _view(node: fx.Node, found: Found) -> HeadColumns | None:
    value = found[arg(node, 0)]
    before, after = arg(node, 0).meta["val"].shape, node.meta["val"].shape
    if not differ(before, after):
        return value
    if value.form == "pairs":
        merges = not differ((*before[:-2], value.width), after)
        return replace(value, form="alternating") if merges else None
    splits = value.width % 2 == 0 and not differ((*before[:-1], value.width // 2, 2), after)
    return _alternating(value, "pairs") if splits and value.is_raw else None


def _alternating(value: HeadColumns, form: str = "alternating") -> HeadColumns | None:
    """A row as two pieces whose columns alternate."""
    even, odd = (_cut(value, range(i, value.width, 2)) for i in (0, 1))
    if even is None or odd is None or len(value.pieces) > 1:
        return None
    return replace(value, pieces=(*even.pieces, *odd.pieces), form=form)


def _neg(node: fx.Node, found: Found) -> HeadColumns | None:
    return _negative(found[arg(node, 0)])


def _negative(value: HeadColumns) -> HeadColumns:
    pieces = (tuple(replace(term, sign=-term.sign) for term in each) for each in value.pieces)
    return replace(value, pieces=tuple(pieces))


def _convert(node: fx.Node, found: Found) -> HeadColumns | None:
    value, dtype = found[arg(node, 0)], arg(node, 1)
    if not value.is_raw:
        is_sum = bool(value.steps) and value.steps[-1][0] == "sum"
        return replace(value, steps=(*value.steps, ("result", dtype))) if is_sum else None
    # Where no value is rounded, the order of conversions and signs does not matter.
    widens = torch.promote_types(arg(node, 0).meta["val"].dtype, dtype) == dtype
    return replace(value, steps=(("operand", dtype),)) if widens and not value.steps else None


def _mul(node: fx.Node, found: Found) -> HeadColumns | None:
    x, table = arg(node, 0), arg(node, 1)
    if x not in found:
        x, table = table, x
    val = val_of(table)
    if val is None or table in found or not isinstance(table, fx.Node) or not val.dim():
        return None
    value = found[x]
    has_shape = not differ(x.meta["val"].shape, node.meta["val"].shape)
    if not value.is_raw or not has_shape or differ(val.shape[-1:], (value.width,)):
        return None
    pieces, start = [], 0
    for i, piece in enumerate(value.pieces):
        entries = range(start, start + len(piece[0].columns))
        if value.form == "alternating":
            entries = range(i, value.width, 2)
        start = entries.stop
        pieces.append(tuple(replace(t, table=table, entries=entries) for t in piece))
    if value.form not in ("row", "alternating") or len(value.pieces) > 2:
        return None
    return replace(value, pieces=tuple(pieces), steps=(*value.steps, ("product", dtype_of(node))))


def _add(node: fx.Node, found: Found) -> HeadColumns | None:
    a, b = found.get(arg(node, 0)), found.get(arg(node, 1))
    if a is None or b is None or node.kwargs or a.steps != b.steps or a.width != b.width:
        return None
    if a.is_raw or len(node.args) > 2:
        return None
    if is_call(node, aten.sub.Tensor):
        b = _negative(b)
    if a.form != b.form:
        a, b = (each if each.form == "alternating" else _alternating(each) for each in (a, b))
    if a is None or b is None:
        return None
    if a.form == "row":
        edges = sorted({*_edges(a), *_edges(b)})
        spans = [range(*edge) for edge in pairwise(edges)]
        a, b = (_joined([_cut(each, span) for span in spans], each) for each in (a, b))
    if [len(p[0].columns) for p in a.pieces] != [len(q[0].columns) for q in b.pieces]:
        return None
    pieces = tuple(p + q for p, q in zip(a.pieces, b.pieces, strict=True))
    return replace(a, pieces=pieces, steps=(*a.steps, ("sum", dtype_of(node))))


def _edges(value: HeadColumns) -> list[int]:
    return [0, *accumulate(len(piece[0].columns) for piece in value.pieces)]


def _joined(parts: Sequence[HeadColumns | None], like: HeadColumns) -> HeadColumns:
    return replace(like, pieces=tuple(piece for part in parts if part for piece in part.pieces))


def _cat(node: fx.Node, found: Found) -> HeadColumns | None:
    sources = arg(node, 0)
    values = [found.get(source) for source in sources]
    dim = node.args[1] if len(node.args) > 1 else 0
    known_values = [value for value in values if value is not None]
    if len(known_values) < len(values) or not _is_last(node, dim):
        return None
    # Values that stay as they are stand beside rotated ones, and may be widened to their dtype.
    pairs = list(zip(sources, known_values, strict=True))
    rounded = [pair for pair in pairs if not pair[1].is_raw] or pairs
    steps = {value.steps for _, value in rounded}
    if {dtype_of(source) for source, _ in rounded} != {dtype_of(node)}:
        return None
    forms = [value.form for value in known_values]
    if len(steps) > 1:
        return None
    joined = replace(_joined(known_values, known_values[0]), steps=steps.pop())
    if forms == ["column", "column"]:
        return replace(joined, form="pairs")
    rows_follow = all(form == "row" for form in forms[1:])
    return joined if forms[0] in ("row", "alternating") and rows_follow else None


def _clone(node: fx.Node, found: Found) -> HeadColumns | None:
    return found[arg(node, 0)]


def _is_last(node: Any, dim: Any) -> bool:
    return isinstance(node, fx.Node) and dim in (-1, node.meta["val"].dim() - 1)


_RULES: Mapping[Any, Callable[[fx.Node, Found], HeadColumns | None]] = {
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _split,
    getitem: _part,
    aten.select.int: _select,
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys(RESHAPES, _view),
    aten.neg.default: _neg,
    CONVERT: _convert,
    aten.mul.Tensor: _mul,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.cat.default: _cat,
    aten.clone.default: _clone,
}
