"""Values derived from weights and kept: computed once, and again when a weight has changed.

One compiled graph may serve many modules, each with weights of its own, and one weight many graphs:
there is one value for each recipe and set of weights. A weight that was written gets its value at
the same address, but for values of which calls are given a form; one that was replaced gets a new
value, so that a call under way keeps the old one. A value whose weights are gone is dropped when
anything is derived next, not at once. Who updates weights while calls are under way needs the gate.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.weight_version import WeightVersion, can_be_watched

Compute = Callable[..., Tensor]


class Packer(Protocol):
    """Makes of a value what calls are given in its place: another object each time."""

    def __call__(self, value: Tensor) -> Tensor: ...

    def nbytes(self, formed: Tensor) -> int:
        """Bytes that are kept for it."""


@dataclass(frozen=True)
class WeightFunction:
    """How a value is computed from weights.

    compute: gives a tensor that shares no memory with its arguments, of which it is a function.
    is_value: whether a weight, the only argument, is what `compute` would make of it, as it lies; a
    write has to change that. like: a tensor without data of the shape, strides and dtype that
    graphs were compiled for; None takes what is computed as it is. signature: equal for recipes
    that compute the same; "" is equal to no other. form: what calls are given of the value, if it
    is not the value.
    """

    name: str
    compute: Compute
    is_value: Callable[[Tensor], bool] | None = None
    like: Tensor | None = None
    signature: str = ""
    form: Packer | None = None


@dataclass(frozen=True)
class CacheEntry:
    """A value, and the weights that it was derived from as they were then."""

    sources: tuple[WeightVersion, ...]
    value: Tensor | None
    """None where the weight itself is the value."""


class WeightCache:
    """The values of one recipe, by the addresses of the weights."""

    def __init__(self, recipe: WeightFunction) -> None:
        self.recipe = recipe
        self.refreshed = 0
        self.entries: dict[int | tuple[int, ...], CacheEntry] = {}
        self._lock = threading.Lock()
        _ALL.add(self)

    def refresh(self, weights: Sequence[Tensor]) -> Tensor:
        """The value of weights that changed, or are new here."""
        if not all(map(can_be_watched, weights)):
            return self._compute(weights)
        with self._lock:
            pointers = tuple(weight.data_ptr() for weight in weights)
            key = pointers if len(pointers) > 1 else pointers[0]
            entry = self.entries.get(key)
            pairs = list(zip(entry.sources, weights, strict=True)) if entry is not None else []
            if entry is not None and all(source.is_same(weight) for source, weight in pairs):
                return weights[0].detach() if entry.value is None else entry.value
            # Looked at before they are read: what is written meanwhile is seen at the next call.
            sources = tuple(WeightVersion(weight) for weight in weights)
            own = not self._is_itself(weights)
            value = self._compute(weights) if own else weights[0].detach()
            old = entry.value if entry is not None and self.recipe.form is None else None
            if own and old is not None and all(s.has_memory_of(weight) for s, weight in pairs):
                with torch.no_grad(), torch.inference_mode(False):
                    value = old.copy_(value)
            self.entries[key] = CacheEntry(sources, value if own else None)
            self.refreshed += 1
            drop_dead()
            return value

    def drop_dead(self) -> None:
        """Give back the values whose weights are gone."""
        for key, entry in list(self.entries.items()):
            if any(source.is_gone for source in entry.sources):
                self.entries.pop(key, None)

    def _is_itself(self, weights: Sequence[Tensor]) -> bool:
        """Whether the weight can stand for its value, with the strides that were compiled for."""
        is_value, like, weight = self.recipe.is_value, self.recipe.like, weights[0]
        if is_value is None or not is_value(weight):
            return False
        return like is None or (weight.shape, weight.stride()) == (like.shape, like.stride())

    def _compute(self, weights: Sequence[Tensor]) -> Tensor:
        # The call may be in inference mode or under autocast, and a later one outside of it.
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
            # The objects themselves: whether a weight is folded is known of those.
            value = self.recipe.compute(*weights)
            value = value if self.recipe.like is None else _as_compiled(value, self.recipe)
            return value if self.recipe.form is None else self.recipe.form(value)


class CachedWeight:
    """What a recipe gives for some arguments of one compiled graph.

    positions: where in the graph's arguments those of the recipe are.
    """

    def __init__(self, recipe: WeightFunction, positions: Sequence[int]) -> None:
        self.positions = tuple(positions)
        drop_dead()
        store = _SHARED.get(recipe.signature) if recipe.signature else None
        self.store = WeightCache(recipe) if store is None else store
        if recipe.signature:
            _SHARED[recipe.signature] = self.store
        self._entries = self.store.entries

    def value(self, args: Sequence[Any]) -> Tensor:
        """The value for the graph's arguments `args`, which are the weights of this very call."""
        # Written out for speed: this is asked at every call.
        positions = self.positions
        if len(positions) == 1:
            weight: Tensor = args[positions[0]]
            entry = self._entries.get(weight.data_ptr())
            if entry is None or not entry.sources[0].is_same(weight):
                return self.store.refresh([weight])
            return weight.detach() if entry.value is None else entry.value
        weights = [args[position] for position in positions]
        entry = self._entries.get(tuple([weight.data_ptr() for weight in weights]))
        if entry is not None and entry.value is not None:
            for source, weight in zip(entry.sources, weights, strict=True):
                if not source.is_same(weight):
                    break
            else:
                return entry.value
        return self.store.refresh(weights)

    @property
    def nbytes(self) -> int:
        """Bytes that are held at present, for all graphs that share the recipe."""
        values = [entry.value for entry in list(self._entries.values())]
        form = self.store.recipe.form
        kept = [value for value in values if value is not None]
        return sum(value.nbytes if form is None else form.nbytes(value) for value in kept)


def _as_compiled(value: Tensor, recipe: WeightFunction) -> Tensor:
    """The value with the strides that graphs were compiled for."""
    like = recipe.like
    assert like is not None
    if (value.shape, value.dtype) != (like.shape, like.dtype):
        raise WeightError(
            f"{recipe.name} is derived from weights and was {like.dtype} {tuple(like.shape)} when "
            f"its graph was compiled, and is {value.dtype} {tuple(value.shape)} now: compile again "
            "after torch._dynamo.reset()"
        )
    if value.stride() == like.stride():
        return value
    strided = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=value.device)
    return strided.copy_(value)


_ALL: WeakSet[WeightCache] = WeakSet()
_SHARED: WeakValueDictionary[str, WeightCache] = WeakValueDictionary()


def drop_dead() -> None:
    """Give back the memory of all values whose weights are gone."""
    for store in list(_ALL):
        store.drop_dead()
