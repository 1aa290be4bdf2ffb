"""Values derived from weights and kept: computed once, and again when a weight has changed.

One compiled graph may serve many modules, each with weights of its own: there is one value for each
set of weights. A weight that was written gets its value at the same address; one that was replaced
gets a new value, so that a call under way keeps the old one. A value whose weights are gone is
dropped when anything is derived next, not at once. Who updates weights while calls are under way
needs the gate.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.sources import Source, can_be_watched

Recipe = Callable[..., Tensor]


@dataclass(frozen=True)
class Entry:
    """A value, and the weights that it was derived from as they were then."""

    sources: tuple[Source, ...]
    checks: tuple[tuple[int, Callable[[Tensor], bool]], ...]
    """For each source its position among the graph's arguments, and what is asked there."""
    value: Tensor | None
    """None where the weight itself is the value."""


class Derived:
    """What a recipe gives for some arguments of a compiled graph.

    recipe: gives a tensor that shares no memory with its arguments, of which it is a function.
    positions: where in the graph's arguments those of the recipe are. is_value: whether a weight,
    the only argument, is what the recipe would make of it, as it lies; a write has to change that.
    like: a tensor without data of the shape, strides and dtype that the graph was compiled for;
    None takes those of the first value.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        positions: Sequence[int],
        is_value: Callable[[Tensor], bool] | None = None,
        like: Tensor | None = None,
    ) -> None:
        self.name = name
        self.positions = tuple(positions)
        self.refreshed = 0
        self._recipe = recipe
        self._is_value = is_value
        self._like = like
        self._entries: dict[int | tuple[int, ...], Entry] = {}
        self._lock = threading.Lock()
        drop_dead()
        _ALL.add(self)

    def value(self, args: Sequence[Any]) -> Tensor:
        """The value for the graph's arguments `args`, which are the weights of this very call."""
        # Written out for speed: this is asked at every call.
        positions = self.positions
        if len(positions) == 1:
            entry = self._entries.get(args[positions[0]].data_ptr())
        else:
            entry = self._entries.get(tuple([args[position].data_ptr() for position in positions]))
        if entry is not None:
            for position, is_same in entry.checks:
                if not is_same(args[position]):
                    break
            else:
                if entry.value is not None:
                    return entry.value
                weight: Tensor = args[positions[0]]
                return weight.detach()
        return self._refresh([args[position] for position in positions])

    @property
    def nbytes(self) -> int:
        """Bytes that are held at present."""
        values = [entry.value for entry in list(self._entries.values())]
        return sum(value.nbytes for value in values if value is not None)

    def drop_dead(self) -> None:
        """Give back the values whose weights are gone."""
        for key, entry in list(self._entries.items()):
            if any(source.is_gone for source in entry.sources):
                self._entries.pop(key, None)

    def forget(self) -> None:
        """Derive everything again at the next call."""
        self._entries.clear()

    def _refresh(self, weights: Sequence[Tensor]) -> Tensor:
        if not all(map(can_be_watched, weights)):
            return self._compute(weights)
        with self._lock:
            pointers = tuple(weight.data_ptr() for weight in weights)
            key = pointers if len(pointers) > 1 else pointers[0]
            entry = self._entries.get(key)
            pairs = list(zip(entry.sources, weights, strict=True)) if entry is not None else []
            if entry is not None and all(source.is_same(weight) for source, weight in pairs):
                return weights[0].detach() if entry.value is None else entry.value
            # Looked at before they are read: what is written meanwhile is seen at the next call.
            sources = tuple(Source(weight) for weight in weights)
            own = not self._is_itself(weights)
            value = self._compute(weights) if own else weights[0].detach()
            old = entry.value if entry is not None else None
            if own and old is not None and all(s.has_memory_of(weight) for s, weight in pairs):
                with torch.no_grad(), torch.inference_mode(False):
                    value = old.copy_(value)
            checks = [source.is_same for source in sources]
            self._entries[key] = Entry(
                sources,
                tuple(zip(self.positions, checks, strict=True)),
                value if own else None,
            )
            self.refreshed += 1
            drop_dead()
            return value

    def _is_itself(self, weights: Sequence[Tensor]) -> bool:
        """Whether the weight can stand for its value, with the strides that were compiled for."""
        if self._is_value is None or not self._is_value(weights[0]):
            return False
        like, weight = self._like, weights[0]
        return like is None or (weight.shape, weight.stride()) == (like.shape, like.stride())

    def _compute(self, weights: Sequence[Tensor]) -> Tensor:
        # The call may be in inference mode or under autocast, and a later one outside of it.
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
            # The objects themselves: whether a weight is folded is known of those.
            value = self._recipe(*weights)
            if self._like is None:
                self._like = torch.empty_like(value, device="meta")
            return self._as_compiled(value)

    def _as_compiled(self, value: Tensor) -> Tensor:
        """The value with the strides that the graph was compiled for."""
        like = self._like
        assert like is not None
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            raise WeightError(
                f"{self.name} is derived from weights and was {like.dtype} {tuple(like.shape)} "
                f"when its graph was compiled, and is {value.dtype} {tuple(value.shape)} now: "
                "compile again after torch._dynamo.reset()"
            )
        if value.stride() == like.stride():
            return value
        strided = torch.empty_strided(
            like.shape, like.stride(), dtype=like.dtype, device=value.device
        )
        return strided.copy_(value)


_ALL: WeakSet[Derived] = WeakSet()


def drop_dead() -> None:
    """Give back the memory of all values whose weights are gone."""
    for derived in list(_ALL):
        derived.drop_dead()
