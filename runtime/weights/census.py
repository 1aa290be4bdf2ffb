"""List the tensors that a model reaches, which share memory, and which follow from weights.

A weight here is a parameter or a persistent buffer: a checkpoint can give it. Every other tensor
that has a relation to a weight, and memory of its own, is stale after that weight was written,
unless it is declared (see derived).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fixpass.runtime.modules import INNER, unwrapped
from fixpass.runtime.weights.data_flow import DataFlow
from fixpass.runtime.weights.derived import SEARCHED, declared_in
from fixpass.runtime.weights.reachable import (
    Held,
    can_compare,
    place_of,
    plain_values,
    reachable,
)
from fixpass.runtime.weights.relations import FEW, Relation, Source, relation_of
from fixpass.runtime.weights.targets import walk

MOST_WEIGHTS = 64
"""Weights that a tensor is compared with, where it does not belong to the whole model."""
MOST_PAIRS = 100_000
"""Pairs of a tensor and a weight that are compared: some seconds."""


class Entry(NamedTuple):
    """One tensor or number of a census."""

    names: tuple[str, ...]
    """All paths that lead to it, the shortest first."""
    kind: str
    """weight, buffer, attribute, object, container, closure or global."""
    value: Tensor | float
    shares: tuple[str, ...]
    """The first names of other tensors that lie in the same memory."""
    relation: Relation | None
    """How it follows from weights; None where nothing is known."""
    is_declared: bool

    @property
    def is_exposed(self) -> bool:
        """Whether a write of the weights leaves it as it is."""
        if self.relation is None or self.is_declared:
            return False
        # A checkpoint may give both of two weights with equal values.
        return self.kind != "weight" or self.relation.is_made

    def __str__(self) -> str:
        value = self.value
        facts = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value}"
        shares = f"shares memory with {', '.join(self.shares[:3])}" if self.shares else ""
        declared = "declared" if self.is_declared else ""
        notes = [str(self.relation or ""), declared, shares]
        return "; ".join(
            [f"{', '.join(self.names[:3])}: {self.kind}, {facts}", *filter(None, notes)]
        )


@dataclass(frozen=True)
class Census:
    """The tensors that a model reaches. `print` shows one a line."""

    entries: tuple[Entry, ...]
    not_compared: tuple[str, ...] = ()
    """Tensors that were not compared with weights, as there are too many."""

    @property
    def derived(self) -> tuple[Entry, ...]:
        """The tensors that follow from weights."""
        return tuple(entry for entry in self.entries if entry.relation is not None)

    @property
    def exposed(self) -> tuple[Entry, ...]:
        """The tensors that follow from weights and that no update refreshes."""
        return tuple(entry for entry in self.entries if entry.is_exposed)

    def stale_since(self, earlier: "Census") -> tuple[Entry, ...]:
        """The tensors that followed from weights in an earlier census, and now do not.

        Tensors whose relation is known by a call alone (`census(process=...)`) are left out.
        """
        values = {name: entry.value for entry in self.entries for name in entry.names}
        relations = {n: e.relation for e in earlier.entries for n in e.names if e.relation}
        found = []
        for entry in self.entries:
            relation = next((relations[n] for n in entry.names if n in relations), None)
            if relation is None or any(name not in values for name in relation.of):
                continue
            sources = [plain_values(values[name]) for name in relation.of]
            with torch.no_grad():
                if not relation.holds(plain_values(entry.value), sources):
                    found.append(entry)
        return tuple(found)

    def __str__(self) -> str:
        lines = list(map(str, self.entries))
        if self.not_compared:
            lines.append(f"{len(self.not_compared):,} tensors were not compared with weights")
        return "\n".join(lines)


_MADE: WeakKeyDictionary[nn.Module, dict[str, Relation]] = WeakKeyDictionary()
"""What post-processing has made of weights, by the names of a model."""


def census(
    model: nn.Module,
    *,
    module_globals: bool = False,
    process: Callable[[nn.Module], object] | None = None,
) -> Census:
    """List every tensor that a model reaches, and tell which follow from its weights.

    Args:
        model: parameters, buffers, attributes, and tensors in objects, containers and closures.
        module_globals: also global variables of the Python modules that define the model's classes.
        process: post-processing that makes tensors of weights, called once with the model. What it
            computes from weights is known then, also where values do not show it. Later censuses
            and updates of the model know it too.

    Example:
        >>> print(census(model))

    """
    model = unwrapped(model)
    if process is not None:
        with DataFlow(_weights(model)) as flow:
            process(model)
        present = _weights(model)
        for held in reachable(model):
            if (made := flow.relation(held.value, process, present)) is not None:
                _MADE.setdefault(model, {})[held.name] = made
        SEARCHED.clear()
    found = reachable(model, module_globals=module_globals)
    return _Search(model, compare_weights=True).census(found)


def followers(model: nn.Module) -> list[Entry]:
    """The tensors that follow from weights, are not declared, and that no checkpoint gives.

    Weights are not compared with weights: only `census(process=...)` finds those that follow.
    """
    model = unwrapped(model)
    search = _Search(model, compare_weights=False)
    held = [one for one in reachable(model) if search.may_follow(one)]
    return list(search.census(held).exposed) if held else []


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {target.name: target.tensor for target in walk(model)[0]}


class _Search:
    """The search for relations in one model."""

    def __init__(self, model: nn.Module, *, compare_weights: bool) -> None:
        self._compare_weights = compare_weights
        self._pairs = 0
        self._made = _MADE.get(model, {})
        found, transient = walk(model)
        self._weights = {target.name: target.tensor for target in found}
        self._ids = set(map(id, self._weights.values()))
        self._buffers = set(map(id, transient))
        self._declared, self._declared_names = declared_in(model)
        self._scopes: dict[str, list[Source]] = {}
        self._skipped: list[str] = []

    def may_follow(self, one: Held) -> bool:
        """Whether the value is not a checkpoint's weight, or was made by post-processing."""
        return id(one.value) not in self._ids or one.name in self._made

    def census(self, held: Iterable[Held]) -> Census:
        """The entries of tensors, and of numbers that follow from a weight."""
        groups: dict[int, list[Held]] = {}
        numbers = []
        for one in held:
            if isinstance(one.value, Tensor):
                groups.setdefault(id(one.value), []).append(one)
            else:
                numbers.append([one])
        places: dict[int, list[str]] = {}
        for name, weight in self._weights.items():
            places.setdefault(place_of(weight), []).append(name)
        for group in groups.values():
            if id(group[0].value) not in self._ids:
                places.setdefault(place_of(group[0].value), []).append(group[0].name)
        entries = [self._entry(group, places) for group in (*groups.values(), *numbers)]
        kept = [e for e in entries if isinstance(e.value, Tensor) or e.relation is not None]
        return Census(tuple(kept), tuple(self._skipped))

    def _entry(self, group: list[Held], places: dict[int, list[str]]) -> Entry:
        first, value = group[0], group[0].value
        is_weight, place = id(value) in self._ids, place_of(value)
        here = {one.name for one in group}
        shares = tuple(other for other in places[place] if other not in here) if place else ()
        is_view = not is_weight and any(other in self._weights for other in shares)
        relation = None if is_view else self._relation(group, is_weight=is_weight)
        is_buffer = id(value) in self._buffers
        kind = "weight" if is_weight else "buffer" if is_buffer else _kind(first)
        names = tuple(dict.fromkeys(one.name for one in group))
        is_declared = id(value) in self._declared or not here.isdisjoint(self._declared_names)
        return Entry(names, kind, value, shares, relation, is_declared)

    def _relation(self, group: list[Held], *, is_weight: bool) -> Relation | None:
        name, value, module = group[0]
        made = next((self._made[one.name] for one in group if one.name in self._made), None)
        if made is not None and name in made.of:
            # A weight that was processed in its place: the checkpoint gives it.
            made = None
        plain = plain_values(value)
        if (is_weight and not self._compare_weights) or not can_compare(plain):
            return made
        scope = self._under(module) if is_weight else self._scope(module)
        sources = [(n, s) for n, s in scope if place_of(s) != place_of(plain)]
        if not isinstance(value, Tensor):
            sources = [source for source in sources if source[1].numel() <= FEW]
        self._pairs += len(sources)
        if (is_weight and len(sources) > MOST_WEIGHTS) or self._pairs > MOST_PAIRS:
            self._skipped.append(name)
            return made
        with torch.no_grad():
            found = relation_of(plain, sources)
        if is_weight:
            return made or found
        return found or made or self._former_of(group)

    def _scope(self, module: str) -> list[Source]:
        """The weights of a module and of the one around it; of the whole model where none are."""
        parts = [part for part in module.split(".") if part and part not in INNER]
        for depth in (len(parts) - 1, len(parts)):
            found = self._under(".".join(parts[: max(depth, 0)]))
            if found and (len(found) <= MOST_WEIGHTS or depth == len(parts)):
                return found
        return self._under("")

    def _under(self, prefix: str) -> list[Source]:
        if not self._scopes:
            for name, tensor in self._weights.items():
                if can_compare(plain := plain_values(tensor)):
                    parts = name.split(".")
                    for depth in range(len(parts)):
                        within = ".".join(parts[:depth])
                        self._scopes.setdefault(within, []).append((name, plain))
        return self._scopes.get(prefix, [])

    def _former_of(self, group: list[Held]) -> Relation | None:
        """The relation of a tensor that has the name of a weight, but is another object."""
        for one in group:
            key = _LAST.search(one.name)
            last = one.name.rpartition(".")[2] if key is None else key[1]
            name = f"{one.module}.{last}".removeprefix(".")
            if name in self._weights:
                return Relation("another tensor under the name", (name,), _never)
        return None


_LAST = re.compile(r"\['([^']+)'\]$")


def _never(tensor: Tensor, weights: Sequence[Tensor]) -> bool:
    return False


def _kind(held: Held) -> str:
    path = held.name.removeprefix(held.module).removeprefix(".")
    marks = ((":", "global"), ("<", "closure"), ("[", "container"), (".", "object"))
    return next((kind for mark, kind in marks if mark in path), "attribute")
