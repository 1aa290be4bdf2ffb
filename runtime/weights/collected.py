"""What an update was given, and what it takes to write it: every byte's place, checked.

Tensors are known by their names in the checkpoint, parts by the parameter and where they begin.
Names, shapes, dtypes, experts by their index and the bytes that each parameter gets are all checked
here, before anything is written.
"""

import math
from collections.abc import Iterable, Sequence
from collections.abc import Mapping as Named
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fixpass.runtime.errors import CheckpointError, UpdateError
from fixpass.runtime.weights.box import Box, Shape
from fixpass.runtime.weights.destination import destination
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.options import Scope
from fixpass.runtime.weights.own_loaders import OwnLoads
from fixpass.runtime.weights.place import Placed, check_dtype
from fixpass.runtime.weights.places import Places
from fixpass.runtime.weights.plan import NOTHING_STORED, Plan, make_plan, placed_copies
from fixpass.runtime.weights.read import Advance, Copy, copies, read
from fixpass.runtime.weights.report import LoadReport, some
from fixpass.runtime.weights.stored import FilePiece, MemoryPiece, Stored, describe


@dataclass(frozen=True)
class Prepared:
    """Copies to make, loads that parameters' own loaders do, and the report of it all.

    copies: as if no parameter were folded; `places.putting` makes them true. written: names of
    parameters. covered: of those not written whole, bytes written and all bytes.
    """

    copies: list[Copy]
    own: list[OwnLoads]
    report: LoadReport
    written: tuple[str, ...]
    covered: Named[str, tuple[int, int]]
    places: Places


@dataclass
class Collected:
    """Stored tensors by their names in the checkpoint; parts by parameter, with their start."""

    whole: dict[str, Stored] = field(default_factory=dict)
    parts: dict[str, list[tuple[Stored, Shape]]] = field(default_factory=dict)

    def add(self, stored: Stored) -> None:
        if stored.name in self.whole or stored.name in self.parts:
            raise UpdateError(f"{stored.name!r} was loaded twice in one update")
        self.whole[stored.name] = stored

    def add_part(self, stored: Stored, start: Sequence[int]) -> None:
        if stored.name in self.whole:
            raise UpdateError(f"{stored.name!r} was loaded twice in one update")
        self.parts.setdefault(stored.name, []).append((stored, tuple(start)))

    def prepare(self, places: Places, mapping: Mapping, scope: Scope, cast: bool) -> Prepared:
        """What it takes to write all of this; CheckpointError for whatever does not fit."""
        try:
            plan = make_plan(self.whole, mapping, dict(places.targets), cast=cast)
            covered = self._add_parts(plan, places, cast)
        except CheckpointError as error:
            folded = [f"{n!r} is folded into {f.plan.layout}" for n, f in places.foldings.items()]
            if named := [text for text in folded if text.split(" is ")[0] in str(error)]:
                error.add_note("; ".join(named))
            raise
        untouched = [m for m in plan.missing if m.why == NOTHING_STORED]
        partial = [m for m in plan.missing if m.why != NOTHING_STORED]
        _check_scope(plan, scope, covered, bool(partial))
        if scope != "model":
            plan.missing = partial
        gone = {missing.name for missing in untouched}
        written = (*plan.loaded, *(m.name for m in partial if m.name not in gone))
        written = (*written, *(name for name in covered if name not in plan.loaded))
        return Prepared(plan.copies, plan.own, plan.report(), written, covered, places)

    def _add_parts(self, plan: Plan, places: Places, cast: bool) -> dict[str, tuple[int, int]]:
        covered = {}
        for name, parts in self.parts.items():
            target = places.targets.get(name)
            if target is None:
                plan.unexpected.append(name)
                continue
            where = destination(target.tensor, repr(name))
            placed = []
            for stored, start in parts:
                check_dtype(stored, name, target.tensor.dtype, cast=cast)
                placed.append(_placed(stored, start, where.whole, name))
            _check_apart(placed, name)
            for item in placed:
                plan.copies.extend(placed_copies(item, where, name))
            size = target.tensor.dtype.itemsize
            done = sum(item.box.numel for item in placed) * size
            total = math.prod(where.whole) * size
            plan.missing = [missing for missing in plan.missing if missing.name != name]
            if done == total:
                plan.loaded.append(name)
            else:
                covered[name] = done, total
        return covered


def in_staging(tensors: Iterable[Stored], threads: int) -> list[Stored]:
    """The tensors with their values in memory that is the update's own."""
    kept: list[Stored] = []
    work: list[Copy] = []
    for stored in tensors:
        pieces = [piece for piece in stored.pieces if isinstance(piece, MemoryPiece)]
        if len(pieces) == len(stored.pieces):
            pieces = [MemoryPiece(piece.tensor.clone(), piece.box) for piece in pieces]
        else:
            values, whole = (
                torch.empty(stored.shape, dtype=stored.dtype, device="cpu"),
                Box.whole(stored.shape),
            )
            work.extend(copies(stored, whole, values))
            pieces = [MemoryPiece(values, whole)]
        kept.append(replace(stored, pieces=tuple(pieces)))
    if work:
        read_files(work, threads)
    return kept


def read_files(work: Sequence[Copy], threads: int, advance: Advance = lambda count: None) -> None:
    """`read`, whose errors name the tensors of a file that became shorter."""
    try:
        read(work, threads=threads, advance=advance)
    except CheckpointError as error:
        add_cut_off(error, [copy.stored for copy in work])
        raise


def add_cut_off(error: CheckpointError, tensors: Iterable[Stored]) -> None:
    """Say which tensors are not in their files any more, which are shorter than they were."""
    sizes: dict[Path, int] = {}
    found = []
    for stored in tensors:
        for piece in stored.pieces:
            if isinstance(piece, FilePiece):
                if piece.path not in sizes:
                    sizes[piece.path] = piece.path.stat().st_size if piece.path.exists() else 0
                if piece.offset + piece.box.numel * stored.dtype.itemsize > sizes[piece.path]:
                    found.append(str(stored))
    if found:
        error.add_note(f"not in the file any more: {some(found)}; the weights are as before")


def _placed(stored: Stored, start: Shape, whole: Shape, name: str) -> Placed:
    rank = len(whole)
    shape = (1,) * (rank - len(stored.shape)) + stored.shape
    start = (*start, *(0,) * (rank - len(start)))
    box = Box(start, shape)
    if len(shape) != rank or len(start) != rank or not box.within(whole):
        raise CheckpointError(
            f"{stored} at {list(start)} is not within {name!r}, {describe(stored.dtype, whole)}"
        )
    pieces = [
        MemoryPiece(piece.tensor.reshape(shape), Box.whole(shape))
        for piece in stored.pieces
        if isinstance(piece, MemoryPiece)
    ]
    return Placed(replace(stored, shape=shape, pieces=tuple(pieces)), Box.whole(shape), box)


def _check_apart(placed: list[Placed], name: str) -> None:
    ordered = sorted(placed, key=lambda item: item.box.start)
    for index, item in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other.box.start and other.box.start[0] >= item.box.stop[0]:
                break
            if item.box.intersection(other.box):
                raise CheckpointError(
                    f"two parts of {name!r} overlap: from {list(item.box.start)} and from "
                    f"{list(other.box.start)} on"
                )


def _check_scope(
    plan: Plan, scope: Scope, covered: Named[str, tuple[int, int]], partial: bool
) -> None:
    faults = plan.report().faults("complete" if scope == "model" else "none")
    if scope != "model" and plan.unexpected:
        faults.append(f"unexpected: {some(plan.unexpected)}")
    if scope == "parameters" and partial:
        gone = tuple(m for m in plan.missing if m.why != NOTHING_STORED)
        faults.append(f"missing: {some(gone)}")
    if scope != "parts" and covered:
        parts = [f"{name} ({a:,} of {b:,} bytes)" for name, (a, b) in covered.items()]
        faults.append(f"not covered: {some(parts)}")
    if faults:
        raise CheckpointError("\n".join([*faults, f"scope={scope!r} raises for these"]))


def values_of(stored: Stored) -> list[Tensor]:
    """The tensors in memory that hold a stored tensor; none where it is in files."""
    return [piece.tensor for piece in stored.pieces if isinstance(piece, MemoryPiece)]
