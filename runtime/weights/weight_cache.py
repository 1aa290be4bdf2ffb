"""Cache values that compiled graphs compute from weights; compute them anew when weights change.

One compiled graph may serve many modules, each with weights of its own, and one weight many graphs:
there is one value per function and set of weights. When a weight is written, its value is computed
into the same memory, unless autograd or a packer holds the old value. When a weight is replaced, it
gets a new value, so that a call under way keeps the old one. Values whose weights are gone are
dropped when the next value is computed. An update during calls needs the lock.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.weight_version import WeightVersion, announce_steps, can_be_watched

Compute = Callable[..., Tensor]


class Packer(Protocol):
    """Makes of a value the tensor that calls get in its place: a new one each time."""

    def __call__(self, value: Tensor) -> Tensor: ...

    def nbytes(self, packed: Tensor) -> int:
        """Bytes that are kept for it."""


@dataclass(frozen=True)
class WeightFunction:
    """How a value is computed from weights."""

    name: str
    compute: Compute
    """A pure function of the weights, whose result shares no memory with them."""
    is_value: Callable[[Tensor], bool] | None = None
    """Whether the only weight already is its own value. Only a write may change the answer."""
    like: Tensor | None = None
    """A tensor without data, of the shape, strides and dtype that graphs were compiled for; None
    takes any."""
    signature: str = ""
    """Equal for functions that compute the same, which share their values; "" shares nothing."""
    packer: Packer | None = None


@dataclass(frozen=True)
class CacheEntry:
    """A value, and the weights as they were when it was computed."""

    versions: tuple[WeightVersion, ...]
    value: Tensor | None
    """None where the weight itself is the value."""


class WeightCache:
    """The values of one function, by the addresses of the weights."""

    def __init__(self, function: WeightFunction) -> None:
        self.function = function
        self.refreshed = 0
        """How many values were computed."""
        self.entries: dict[int | tuple[int, ...], CacheEntry] = {}
        self._lock = threading.Lock()
        _ALL.add(self)

    def refresh(self, weights: Sequence[Tensor]) -> Tensor:
        """The value of weights that have changed, or are new here."""
        if not all(map(can_be_watched, weights)):
            return self._compute(weights)
        with self._lock:
            pointers = tuple(weight.data_ptr() for weight in weights)
            key = pointers if len(pointers) > 1 else pointers[0]
            entry = self.entries.get(key)
            pairs = list(zip(entry.versions, weights, strict=True)) if entry is not None else []
            if entry is not None and all(version.is_same(weight) for version, weight in pairs):
                return weights[0].detach() if entry.value is None else entry.value
            # Taken before the weights are read: the next call sees a write that comes meanwhile.
            versions = tuple(WeightVersion(weight) for weight in weights)
            own = not self._is_itself(weights)
            value = self._compute(weights) if own else weights[0].detach()
            old = entry.value if entry is not None and self.function.packer is None else None
            stays = own and all(version.has_memory_of(weight) for version, weight in pairs)
            if stays and old is not None and not _is_held(old):
                with torch.no_grad(), torch.inference_mode(False):
                    value = old.copy_(value)
            self.entries[key] = CacheEntry(versions, value if own else None)
            self.refreshed += 1
            drop_dead()
            return value

    def drop_dead(self) -> None:
        """Drop the values whose weights are gone."""
        for key, entry in list(self.entries.items()):
            if any(version.is_gone for version in entry.versions):
                self.entries.pop(key, None)

    def _is_itself(self, weights: Sequence[Tensor]) -> bool:
        """Whether the weight can stand for its value, with the strides that were compiled for."""
        is_value, like, weight = self.function.is_value, self.function.like, weights[0]
        if is_value is None or not is_value(weight):
            return False
        return like is None or (weight.shape, weight.stride()) == (like.shape, like.stride())

    def _compute(self, weights: Sequence[Tensor]) -> Tensor:
        function = self.function
        # The call may be in inference mode or under autocast, and a later one outside of it.
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
            # The objects themselves: layouts are recorded by object.
            value = function.compute(*weights)
            value = value if function.like is None else _as_compiled(value, function)
            return value if function.packer is None else function.packer(value)


class CachedWeight:
    """A function of weights as one compiled graph calls it."""

    def __init__(self, function: WeightFunction, positions: Sequence[int]) -> None:
        self.positions = tuple(positions)
        """Where the function's weights are among the arguments of the graph."""
        drop_dead()
        announce_steps()
        cache = _SHARED.get(function.signature) if function.signature else None
        self.cache = WeightCache(function) if cache is None else cache
        if function.signature:
            _SHARED[function.signature] = self.cache
        self._entries = self.cache.entries

    def value(self, args: Sequence[Any]) -> Tensor:
        """The value for a call with the arguments `args`, among them the weights as they are."""
        # Written out for speed: every call comes here.
        positions = self.positions
        if len(positions) == 1:
            weight: Tensor = args[positions[0]]
            entry = self._entries.get(weight.data_ptr())
            if entry is None or not entry.versions[0].is_same(weight):
                return self.cache.refresh([weight])
            return weight.detach() if entry.value is None else entry.value
        weights = [args[position] for position in positions]
        entry = self._entries.get(tuple([weight.data_ptr() for weight in weights]))
        if entry is not None and entry.value is not None:
            for version, weight in zip(entry.versions, weights, strict=True):
                if not version.is_same(weight):
                    break
            else:
                return entry.value
        return self.cache.refresh(weights)

    @property
    def nbytes(self) -> int:
        """Bytes that are held now, for all graphs that share the function."""
        values = [entry.value for entry in list(self._entries.values())]
        packer = self.cache.function.packer
        kept = [value for value in values if value is not None]
        return sum(value.nbytes if packer is None else packer.nbytes(value) for value in kept)


def _is_held(value: Tensor) -> bool:
    """Whether C++ code holds the value or its memory: autograd does, for a backward to come."""
    (users, sharers), (one, alone) = map(_references, (value, torch.empty(1)))
    return users > one or sharers > alone


def _references(tensor: Tensor) -> tuple[int, int]:
    """Of a tensor and of its storage, in C++."""
    sharers = int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))
    return tensor._use_count(), sharers  # type: ignore[attr-defined]


def _as_compiled(value: Tensor, function: WeightFunction) -> Tensor:
    """The value with the strides that graphs were compiled for."""
    like = function.like
    assert like is not None
    if (value.shape, value.dtype) != (like.shape, like.dtype):
        raise WeightError(
            f"{function.name} is computed from weights and was {like.dtype} {tuple(like.shape)} "
            f"when its graph was compiled, and is {value.dtype} {tuple(value.shape)} now: compile "
            "again after torch._dynamo.reset()"
        )
    if value.stride() == like.stride():
        return value
    strided = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=value.device)
    return strided.copy_(value)


_ALL: WeakSet[WeightCache] = WeakSet()
_SHARED: WeakValueDictionary[str, WeightCache] = WeakValueDictionary()


def drop_dead() -> None:
    """Drop all values whose weights are gone."""
    for cache in list(_ALL):
        cache.drop_dead()
