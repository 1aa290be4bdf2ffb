"""Turns recorded accesses into traffic per view and faults.

Addresses are compared in units of the smallest item any view or access has, so operands
of several item sizes may share a storage. Programs of one launch run in no order; two
launches run one after the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from torch import Tensor

OUT_OF_STORAGE = "out of storage"
OUTSIDE_VIEWS = "in storage, outside every view"
MISALIGNED = "misaligned"
RACE = "race between programs"


@dataclass(frozen=True)
class Access:
    """One load, store or atomic of one program: addresses, and which lie in a storage."""

    kind: str
    program: int
    itemsize: int
    addresses: Any
    inside: Any


@dataclass(frozen=True)
class Launched:
    kernel: str
    grid: tuple[int, ...]
    accesses: list[Access]


@dataclass(frozen=True)
class Fault:
    """`count` accesses of one kind of wrong, and where the first of them was."""

    kind: str
    kernel: str
    access: str
    program: int
    place: str
    count: int

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.count} {self.access} of {self.kernel}, "
            f"first in program {self.program} at {self.place}"
        )


@dataclass(frozen=True)
class ViewTraffic:
    """Bytes of one view: what it holds, what was moved, and how often the busiest was."""

    name: str
    start: int
    size: int
    loaded: int
    stored: int
    distinct_loaded: int
    distinct_stored: int
    most_loads: int
    most_stores: int


@dataclass(frozen=True)
class MemoryReport:
    """The traffic and the faults of one launcher call."""

    loaded: int
    stored: int
    distinct_loaded: int
    distinct_stored: int
    views: dict[str, ViewTraffic]
    faults: tuple[Fault, ...]
    launches: tuple[tuple[str, tuple[int, ...]], ...]

    def moved(self, reads: Sequence[str], writes: Sequence[str]) -> float:
        """Bytes moved over the least possible: these views' elements read or written once.

        What was moved for the other views (a weight, say) is left out. Views may overlap.
        """
        named = (*reads, *writes)
        others = {
            (view.start, view.size): view.loaded + view.stored
            for name, view in self.views.items()
            if name not in named
        }
        moved = self.loaded + self.stored - sum(others.values())
        return moved / sum(self.views[name].size for name in named)

    def __str__(self) -> str:
        lines = [f"{kernel}{list(grid)}" for kernel, grid in self.launches]
        lines += [
            f"{view.name}: {view.size} bytes, loaded {view.loaded} (one at most "
            f"{view.most_loads} times), stored {view.stored} (at most {view.most_stores})"
            for view in self.views.values()
        ]
        return "\n".join([*lines, *map(str, self.faults)])


def summarize(views: dict[str, Tensor], launches: list[Launched]) -> MemoryReport:
    unit = gcd(
        *(tensor.element_size() for tensor in views.values()),
        *(access.itemsize for launch in launches for access in launch.accesses),
    )
    held = {name: _view_units(tensor, unit) for name, tensor in views.items()}
    loads, stores = (
        _joined(launches, kinds, unit) for kinds in (("load", "atomic"), ("store", "atomic"))
    )
    faults = [fault for launch in launches for fault in _faults(launch, views, held, unit)]
    return MemoryReport(
        loaded=len(loads) * unit,
        stored=len(stores) * unit,
        distinct_loaded=len(np.unique(loads)) * unit,
        distinct_stored=len(np.unique(stores)) * unit,
        views={
            name: _traffic(name, views[name], units, loads, stores, unit)
            for name, units in held.items()
        },
        faults=tuple(faults),
        launches=tuple((launch.kernel, launch.grid) for launch in launches),
    )


def _view_units(tensor: Tensor, unit: int) -> Any:
    """The sorted distinct addresses of a view, in units."""
    if tensor.numel() == 0:
        return np.zeros(0, dtype=np.uint64)
    item = tensor.element_size()
    offsets = np.zeros((1,), dtype=np.uint64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = np.arange(1 if stride == 0 else size, dtype=np.uint64) * np.uint64(stride * item)
        offsets = (offsets[:, None] + steps[None, :]).ravel()
    return np.unique(_units(offsets + np.uint64(tensor.data_ptr()), item, unit))


def _units(addresses: Any, item: int, unit: int) -> Any:
    if item == unit:
        return addresses
    steps = np.arange(0, item, unit, dtype=np.uint64)
    return (addresses[:, None] + steps[None, :]).ravel()


def _joined(launches: list[Launched], kinds: tuple[str, ...], unit: int) -> Any:
    pieces = [
        _units(access.addresses[access.inside], access.itemsize, unit)
        for launch in launches
        for access in launch.accesses
        if access.kind in kinds
    ]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint64)


def _inside(addresses: Any, units: Any) -> Any:
    if len(units) == 0:
        return np.zeros(addresses.shape, dtype=bool)
    at = np.minimum(np.searchsorted(units, addresses), len(units) - 1)
    return units[at] == addresses


def _traffic(
    name: str, tensor: Tensor, units: Any, loads: Any, stores: Any, unit: int
) -> ViewTraffic:
    counts = [
        np.unique(touched[_inside(touched, units)], return_counts=True)[1]
        for touched in (loads, stores)
    ]
    loaded, stored = (int(each.sum()) * unit for each in counts)
    distinct_loaded, distinct_stored = (len(each) * unit for each in counts)
    most_loads, most_stores = (int(each.max(initial=0)) for each in counts)
    size = tensor.numel() * tensor.element_size()
    return ViewTraffic(
        name, tensor.data_ptr(), size, loaded, stored,
        distinct_loaded, distinct_stored, most_loads, most_stores,
    )  # fmt: skip


def _faults(
    launch: Launched, views: dict[str, Tensor], held: dict[str, Any], unit: int
) -> Iterator[Fault]:
    every = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *held.values()]))
    first: dict[tuple[str, str], tuple[int, int]] = {}
    counts: dict[tuple[str, str], int] = {}
    for access in launch.accesses:
        for kind, wrong in _wrong_in(access, every, unit):
            if wrong.any():
                key = (kind, access.kind)
                first.setdefault(key, (access.program, int(access.addresses[wrong][0])))
                counts[key] = counts.get(key, 0) + int(wrong.sum())
    for (kind, kind_of_access), (program, address) in first.items():
        place = _locate(address, views)
        count = counts[kind, kind_of_access]
        yield Fault(kind, launch.kernel, f"{kind_of_access}s", program, place, count)
    yield from _races(launch, views, unit)


def _wrong_in(access: Access, every: Any, unit: int) -> Iterator[tuple[str, Any]]:
    yield OUT_OF_STORAGE, ~access.inside
    yield MISALIGNED, access.addresses % np.uint64(access.itemsize) != 0
    units = _units(access.addresses, access.itemsize, unit)
    known = _inside(units, every).reshape(len(access.addresses), -1).all(axis=1)
    yield OUTSIDE_VIEWS, access.inside & ~known


def _races(launch: Launched, views: dict[str, Tensor], unit: int) -> Iterator[Fault]:
    """An address that several programs touch, and one of them by a plain store.

    Atomics do not race with each other; they do with a plain load.
    """
    touched = {kind: _touched(launch, kind, unit) for kind in ("load", "store", "atomic")}
    watched = np.intersect1d(touched["atomic"][0], touched["load"][0])
    contended = np.unique(np.concatenate([touched["store"][0], watched]))
    addresses, programs = (np.concatenate(each) for each in zip(*touched.values(), strict=True))
    kept = _inside(addresses, contended)
    addresses, programs = addresses[kept], programs[kept]
    order = np.lexsort((programs, addresses))
    addresses, programs = addresses[order], programs[order]
    clash = (addresses[1:] == addresses[:-1]) & (programs[1:] != programs[:-1])
    if clash.any():
        at = int(np.argmax(clash)) + 1
        place = _locate(int(addresses[at]), views)
        yield Fault(RACE, launch.kernel, "accesses", int(programs[at]), place, int(clash.sum()))


def _touched(launch: Launched, kind: str, unit: int) -> tuple[Any, Any]:
    """Unit addresses touched in this way, and by which program each."""
    addresses, programs = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.int64)]
    for access in launch.accesses:
        if access.kind == kind:
            units = _units(access.addresses[access.inside], access.itemsize, unit)
            addresses.append(units)
            programs.append(np.full(len(units), access.program))
    return np.concatenate(addresses), np.concatenate(programs)


def _locate(address: int, views: dict[str, Tensor]) -> str:
    """An address in terms of the operand whose storage is nearest."""

    def distance(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        low = storage.data_ptr()
        return max(low - address, address - (low + storage.nbytes() - 1), 0)

    name = min(views, key=lambda each: distance(views[each]))
    tensor = views[name]
    elements = (address - tensor.data_ptr()) // tensor.element_size()
    return f"{name} + {elements} elements" if elements >= 0 else f"{name} - {-elements} elements"
