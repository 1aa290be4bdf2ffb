"""Detect writes to weights: `WeightVersion` of one; `watch` finds those outside of updates.

Two things are compared. `write_key` is torch's count of writes and the address: it misses writes
through `.data`, numpy or a storage, which torch does not count. A sample of words spread over the
memory finds those, unless they change few values.
"""

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights.targets import local_box, local_part, local_parts, pointers_of, targets

WORDS = 16
"""Words of at most 8 bytes that `WeightVersion` compares on CPU."""
SAMPLES = 256
"""Words of at most 8 bytes that `watch` compares on any device."""

WriteKey = tuple[int, int]
"""Count of writes, address."""

_WORD_TYPES: dict[int, tuple[Any, torch.dtype]] = {
    8: (ctypes.c_uint64, torch.int64),
    4: (ctypes.c_uint32, torch.int32),
    2: (ctypes.c_uint16, torch.int16),
    1: (ctypes.c_uint8, torch.uint8),
}


class WeightVersion:
    """One weight as it was: `is_same(tensor)` takes about 0.5 us and is asked at every call.

    It holds no reference to the weight, not even a weak one: `torch.utils.swap_tensors` refuses
    tensors with weak references. It holds the storage weakly: so no other storage gets the address
    of this one's own object, and memory that was freed and allocated again is told apart.
    """

    __slots__ = ("_cdata", "_count", "_impl", "_pointer", "_sampled", "_storage", "_words")

    def __init__(self, tensor: Tensor) -> None:
        self._impl = tensor._cdata
        self._count, self._pointer = write_key(tensor)
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._cdata = tensor.untyped_storage()._cdata
        self._words = _words_of(tensor, WORDS) if tensor.device.type == "cpu" else None
        self._sampled = b"" if self._words is None else self._words.tobytes()

    def is_same(self, tensor: Tensor) -> bool:
        """Whether `tensor` is that weight, and nothing that was compared has changed."""
        return (
            tensor._cdata == self._impl
            and tensor._version == self._count
            and tensor.data_ptr() == self._pointer
            and tensor.untyped_storage()._cdata == self._cdata
            # Last: the words lie in this memory.
            and (self._words is None or self._words.tobytes() == self._sampled)
        )

    def has_memory_of(self, tensor: Tensor) -> bool:
        """Whether `tensor` lies in the memory of that weight."""
        return tensor.data_ptr() == self._pointer and tensor.untyped_storage()._cdata == self._cdata

    @property
    def is_gone(self) -> bool:
        """Whether the memory was freed."""
        return bool(self._storage.expired())


def can_be_watched(tensor: object) -> bool:
    """Whether `WeightVersion` can see changes of `tensor`."""
    if not isinstance(tensor, Tensor) or isinstance(tensor, FakeTensor):
        return False
    return tensor.layout == torch.strided and not tensor.is_inference()


def write_key(param: Tensor) -> WriteKey:
    """The key of one parameter: see `write_keys`."""
    return write_keys((param,))[0]


def write_keys(params: Sequence[Tensor]) -> tuple[WriteKey, ...]:
    """Keys that change when a parameter is written as torch counts it, or gets other memory.

    torch does not count the writes of a tensor made in inference mode: its count is -1.
    """
    parts = local_parts(params)
    try:
        counts = list(map(attrgetter("_version"), parts))
    # Tensors made in inference mode have none.
    except RuntimeError:
        counts = [-1 if part.is_inference() else part._version for part in parts]
    return tuple(zip(counts, pointers_of(parts), strict=True))


def fingerprint(tensor: Tensor, samples: int = SAMPLES) -> int:
    """A number of some words of this rank's part of a tensor; of all with samples=0."""
    local = local_box(tensor.detach())[0]
    if _rows(local)[1] > 1:
        # Its sample would be one word a row.
        local = local.contiguous()
    if local.device.type == "cpu":
        view = _words_of(local, samples)
        return 0 if view is None else hash(view.tobytes())
    width, part = _sample(local, samples)
    offset = local.storage_offset() * local.element_size() // width
    words = torch.empty(0, dtype=_WORD_TYPES[width][1], device=local.device)
    words.set_(local.untyped_storage(), offset, (part.stop,), (1,))
    return hash(tuple(words[part].tolist()))


def _words_of(tensor: Tensor, samples: int) -> memoryview | None:
    """Words spread over the memory of a tensor on CPU, as a view that reads them anew each time."""
    if tensor.numel() == 0:
        return None
    width, part = _sample(tensor, samples)
    return memoryview((_WORD_TYPES[width][0] * part.stop).from_address(tensor.data_ptr()))[part]


def _sample(tensor: Tensor, samples: int) -> tuple[int, slice]:
    """Bytes of a word, and about `samples` words of those that the tensor's memory holds."""
    (run, rows, pitch), itemsize = _rows(tensor), tensor.element_size()
    numbers = run * itemsize | pitch * itemsize | tensor.data_ptr() | 8
    width = numbers & -numbers
    run, pitch = run * itemsize // width, pitch * itemsize // width
    if rows == 1:
        # An odd step: an even one would look into the same few columns of every row.
        step = run // samples | 1 if samples else 1
        return width, slice(step // 2, run, step)
    # One word a row, each in another column, so that none is of another tensor.
    count = min(samples, rows)
    step = rows // count * pitch + run // count
    return width, slice(0, (count - 1) * step + 1, step)


def _rows(tensor: Tensor) -> tuple[int, int, int]:
    """Elements that lie together, how many such rows there are, elements from row to row."""
    run, rows, pitch = 1, 1, 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if step == run and rows == 1:
            run *= size
        # A stride of 0 names the same elements again.
        elif step and size > rows:
            rows, pitch = size, step
    return run, rows, pitch


class UnseenWriteWarning(UserWarning):
    """Weights were written in a way that torch does not count."""


@dataclass(frozen=True)
class Writes:
    """Names of weights that were written."""

    seen: tuple[str, ...]
    """By writes that torch counts."""
    replaced: tuple[str, ...]
    """Another tensor has the name now."""
    unseen: tuple[str, ...]
    """By writes that torch does not count."""

    def __bool__(self) -> bool:
        return bool(self.seen or self.replaced or self.unseen)


class Watch:
    """The parameters and persistent buffers of a model, as they were at the last look.

    It holds the tensors.
    """

    def __init__(self, model: nn.Module, samples: int = SAMPLES) -> None:
        self._samples = samples
        self._looks = self._look(model)

    def _look(self, model: nn.Module) -> dict[str, tuple[Tensor, WriteKey, int]]:
        tensors = {name: target.tensor for name, target in targets(model).items()}
        return {n: (t, write_key(t), fingerprint(t, self._samples)) for n, t in tensors.items()}

    def refresh(self, model: nn.Module) -> None:
        """Take the present weights as known."""
        self._looks = self._look(model)

    def check(self, model: nn.Module) -> Writes:
        """The writes since the last look, with a warning of those that torch did not count."""
        looks, self._looks = self._looks, self._look(model)
        seen, replaced, unseen = [], [], []
        for name, (tensor, key, words) in self._looks.items():
            before = looks.get(name)
            if before is None or before[0] is not tensor:
                replaced.append(name)
            elif before[1] != key:
                seen.append(name)
            elif before[2] != words:
                unseen.append(name)
        if unseen:
            warnings.warn(
                f"{len(unseen)} weights were written in a way that torch does not count, among "
                f"them {unseen[0]}: values computed from them may be stale. Write them in "
                "fixpass.weights.update, or call fixpass.weights.announce_loads once",
                UnseenWriteWarning,
                stacklevel=2,
            )
        return Writes(tuple(seen), tuple(replaced), tuple(unseen))


_WATCHES: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()


def watch(model: nn.Module, samples: int = SAMPLES) -> None:
    """Watch the weights of a model for writes that are not updates: see `writes`.

    `samples` words of each parameter and persistent buffer are compared; 0 compares all.
    """
    inside = unwrapped(model)
    announce_steps()
    _WATCHES[inside] = Watch(inside, samples)


def writes(model: nn.Module) -> Writes:
    """The writes to a watched model since the last call, other than updates.

    A model that is not watched is watched from now on.
    """
    inside = unwrapped(model)
    found = _WATCHES.get(inside)
    if found is None:
        watch(inside)
        return Writes((), (), ())
    return found.check(inside)


def committed(model: nn.Module) -> None:
    """Take the present weights as known to the watch of a model, after an update of it."""
    inside = unwrapped(model)
    if (found := _WATCHES.get(inside)) is not None:
        found.refresh(inside)


def announce_loads(model: nn.Module) -> tuple[str, ...]:
    """Count the writes of each `weight_loader` that is an attribute of a parameter.

    Loaders write through `.data`, which torch does not count. The attribute becomes a function
    that calls the former one, which stays under `__wrapped__`. Loaders of a class stay as they are.
    The names of these parameters are returned.
    """
    done = []
    for name, target in targets(model).items():
        loader = vars(target.tensor).get("weight_loader")
        if callable(loader) and not isinstance(loader, _Announcing):
            target.tensor.__dict__["weight_loader"] = _Announcing(loader)
            done.append(name)
    return tuple(done)


_STEPS: list[RemovableHandle] = []


def announce_steps() -> None:
    """Count the writes of every optimizer step from now on, in the whole process.

    Fused steps write parameters without raising their versions (torch 2.13), and so do kernels of
    other libraries.
    """
    if not _STEPS:
        _STEPS.append(register_optimizer_step_post_hook(_announce_step))


def _announce_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        # A step leaves parameters without a gradient alone.
        written = [local_part(param) for param in group["params"] if param.grad is not None]
        torch.autograd.graph.increment_version(written)


class _Announcing:
    """A loader after which torch counts a write of its first argument."""

    def __init__(self, loader: Callable[..., Any]) -> None:
        functools.update_wrapper(self, loader)
        self._loader = loader

    def __call__(self, param: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._loader(param, *args, **kwargs)
        finally:
            torch.autograd.graph.increment_version(param)
