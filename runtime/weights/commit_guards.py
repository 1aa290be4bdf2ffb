"""What guards a commit: a thread that no interrupt splits, an undo log, and a second set of memory.

Signals and PyThreadState_SetAsyncExc hit the thread that called the update. `run_section` lets that
thread only wait, and raises the interrupt when the section has ended; up to two interrupts in a row
are held back. UndoLog writes old bytes to a temporary file, since parameters may take most of the
memory. DoubleBuffer writes new memory while calls go on, then exchanges it, and keeps the old
memory for the next update: twice the bytes of the updated weights, for good. Addresses change at
each commit: not for captured graphs, nor for memory that is shared with other processes.
"""

import sys
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights.checkpoint_view import shows_checkpoint
from fixpass.runtime.weights.files import MOST_PARTS, OpenFile, in_turn
from fixpass.runtime.weights.parameter_layout import any_layout_set, packed, record, record_of
from fixpass.runtime.weights.read import Copy, Work, copies
from fixpass.runtime.weights.stored import Box, FilePiece, Stored
from fixpass.runtime.weights.targets import PLAIN, gc_paused, pointers_of, same_part, walk

T = TypeVar("T")


class _Section:
    """A function that runs once, and the end of its run."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._inference = torch.is_inference_mode_enabled()
        self._tickets: list[None] = [None]
        self._running = allocate_lock()
        self._running.acquire()
        self.is_over = False
        self.result: object = None
        self.error: BaseException | None = None

    def take(self) -> bool:
        """Take the right to run the function, which exists once; whether it was there."""
        try:
            self._tickets.pop()
        except IndexError:
            return False
        return True

    def run(self) -> None:
        if not self.take():
            return
        try:
            with torch.inference_mode(self._inference), torch.no_grad():
                self.result = self._function()
        # Raised again in the thread that waits.
        except BaseException as error:
            self.error = error
        finally:
            self.is_over = True
            self._running.release()

    def wait(self) -> None:
        """Wait for the end, also where an interrupt ends the waiting."""
        try:
            while not self.is_over:
                with self._running:
                    pass
        finally:
            if not self.is_over:
                try:
                    self.wait()
                finally:
                    if not self.is_over:
                        self.wait()


def run_section(function: Callable[[], T]) -> T:
    """Call a function in another thread, without gradients, and wait for its end.

    Raises the exception of the function. An interrupt of the calling thread is raised when the
    function has ended; a note says how that was.
    """
    section = _Section(function)
    try:
        start_new_thread(section.run, ())
        section.wait()
    except BaseException as interrupt:
        # The thread may not have begun yet: without the ticket it never will.
        if section.take():
            raise
        section.wait()
        if section.error is None:
            interrupt.add_note("the update was finished first: its weights are in place")
        else:
            interrupt.add_note(f"the update failed: {section.error!r}")
        raise
    if section.error is not None:
        raise section.error
    return section.result  # type: ignore[return-value]


PART = 8 << 20
"""Bytes of a tensor that are made dense at once."""


class UndoLog:
    """The values of some tensors at the time when it was made."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Write the values down. Raises CheckpointError where the file has no room."""
        self._tensors = tensors
        self._starts: list[int] = []
        self._file, self._end = OpenFile.temporary(), 0
        waiting: list[Tensor] = []
        end = 0
        for tensor in tensors:
            self._starts.append(end)
            for part in _parts(tensor):
                waiting.append(part.cpu().resolve_conj().resolve_neg().contiguous())
                end += part.nbytes
                if len(waiting) == MOST_PARTS or end - self._end >= PART:
                    self._write(waiting, end)
                    waiting = []
        self._write(waiting, end)

    def _write(self, tensors: Sequence[Tensor], end: int) -> None:
        sizes = [tensor.nbytes for tensor in tensors]
        self._file.write(self._end, end - self._end, in_turn(pointers_of(tensors), sizes))
        self._end = end

    def restore(self) -> None:
        """Write the old values back."""
        Work.of(self._copies(), self._tensors).run(threads=1)

    def _copies(self) -> Iterator[Copy]:
        for position, (start, tensor) in enumerate(zip(self._starts, self._tensors, strict=True)):
            whole = Box.whole(tuple(tensor.shape))
            piece = FilePiece(self._file, start, whole)
            stored = Stored("", tensor.dtype, whole.shape, (piece,), "the undo log")
            yield from copies(stored, whole, tensor, position)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.is_cpu and tensor.is_contiguous():
        yield tensor
        return
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    step = max(1, PART * len(rows) // max(1, tensor.nbytes))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


_address = attrgetter("_cdata")

_SPARE: WeakKeyDictionary[nn.Module, list[torch.UntypedStorage]] = WeakKeyDictionary()
"""The memory that was in use before the last update of a model."""


class DoubleBuffer:
    """Other memory for some tensors of a model, and for all its tensors that share theirs."""

    def __init__(
        self, model: nn.Module, written: Sequence[Tensor], views: Iterable[Tensor] = ()
    ) -> None:
        """Take the memory that was in use before the last update, or new memory.

        `views` are tensors that the model reaches beside its parameters and buffers; they follow.

        Raises UpdateError for a tensor whose memory can't be exchanged.
        """
        self._model = unwrapped(model)
        _check(written)
        spare: dict[tuple[int, torch.device], list[torch.UntypedStorage]] = {}
        for storage in reversed(list(_unshared(_SPARE.pop(self._model, [])))):
            spare.setdefault((storage.nbytes(), storage.device), []).append(storage)
        storages = map(Tensor.untyped_storage, written)
        self._live = {storage.data_ptr(): storage for storage in storages}
        self._back: dict[int, torch.UntypedStorage] = {}
        for pointer, live in self._live.items():
            size, device = live.nbytes(), live.device
            fits = spare.get((size, device))
            self._back[pointer] = fits.pop() if fits else torch.UntypedStorage(size, device=device)
        found, transient = walk(self._model)
        moved = {
            id(tensor): tensor
            for tensor in (*(target.tensor for target in found), *transient, *views)
            if tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in self._back
        }
        packs = {id(p.pack): p.pack for t in moved.values() if (p := packed(t)) is not None}
        self._moved = [*moved.values(), *packs.values()]

    def copy_old(self) -> None:
        """Copy the old bytes, for an update that does not write all of them."""
        for pointer, live in self._live.items():
            self._back[pointer].copy_(live)

    def flip(self) -> None:
        """Put the other memory in place. The caller has closed the lock."""
        with gc_paused():
            before = [tensor.data for tensor in self._moved]
            try:
                _point(self._moved, [self.on_back(tensor) for tensor in self._moved])
            except BaseException:
                _point(self._moved, before)
                raise
        _SPARE[self._model] = list(self._live.values())

    def on_back(self, tensor: Tensor) -> Tensor:
        """The part of the other memory that corresponds to `tensor`."""
        return same_part(tensor, self._back[tensor.untyped_storage().data_ptr()])


def _unshared(storages: Sequence[torch.UntypedStorage]) -> Iterator[torch.UntypedStorage]:
    """The storages that no tensor and nothing of the user holds."""
    held = [torch.UntypedStorage(1), *storages]
    counts = map(torch._C._storage_Use_Count, map(_address, held))
    # A storage has one object in Python, however many hold that.
    once, *users = zip(counts, map(sys.getrefcount, held), strict=True)
    # Of the storages, `storages` holds one reference more than of the first.
    alone = once[0], once[1] + 1
    return (storage for storage, found in zip(storages, users, strict=True) if found == alone)


def _point(tensors: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    for tensor, data in zip(tensors, views, strict=True):
        tensor.data = data
    torch.autograd.graph.increment_version(tensors)
    for tensor in tensors if any_layout_set() else ():
        if (found := record_of(tensor)) is not None:
            record(tensor, replace(found, pointer=tensor.data_ptr()))


def _check(written: Sequence[Tensor]) -> None:
    for tensor in written:
        why = ""
        if tensor.is_inference():
            why = "was made in inference mode, and its memory cannot be exchanged"
        elif type(tensor) not in PLAIN and isinstance(tensor, DTensor):
            why = "is a DTensor, whose memory FSDP2 holds too"
        elif tensor.is_cpu and tensor.untyped_storage().is_shared():
            why = "is in shared memory or in a file, which others go on to read"
        elif shows_checkpoint(tensor):
            why = "shows the checkpoint's layout now, and its memory must stay"
        if why:
            others = "buffered" if isinstance(tensor, DTensor) else "buffered' or 'undo_log"
            raise UpdateError(f"a parameter of {tuple(tensor.shape)} {why}: use mode='{others}'")
