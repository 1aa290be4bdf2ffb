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
from fixpass.runtime.weights.files import OpenFile, in_turn
from fixpass.runtime.weights.read import Work, copies
from fixpass.runtime.weights.relayout import any_layout_set, packed, record, record_of
from fixpass.runtime.weights.stored import Box, FilePiece, Stored
from fixpass.runtime.weights.targets import walk

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
        self._stored: list[Stored] = []
        file, end = OpenFile.temporary(), 0
        for tensor in tensors:
            shape = tuple(tensor.shape)
            piece = FilePiece(file, end, Box.whole(shape))
            self._stored.append(Stored("", tensor.dtype, shape, (piece,), "the undo log"))
            for part in _parts(tensor):
                dense = part.cpu().resolve_conj().resolve_neg().contiguous()
                file.write(end, dense.nbytes, in_turn((dense.data_ptr(),), (dense.nbytes,)))
                end += dense.nbytes

    def restore(self) -> None:
        """Write the old values back."""
        work = (
            copy
            for position, (stored, tensor) in enumerate(
                zip(self._stored, self._tensors, strict=True)
            )
            for copy in copies(stored, Box.whole(stored.shape), tensor, position)
        )
        Work.of(work, self._tensors).run(threads=1)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.is_cpu and tensor.is_contiguous():
        yield tensor
        return
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    step = max(1, PART * len(rows) // max(1, tensor.nbytes))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


_address = attrgetter("_cdata")

_SPARE: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()
"""As bytes, the memory that was in use before the last update of a model."""


class DoubleBuffer:
    """Other memory for some tensors of a model, and for all its tensors that share theirs."""

    def __init__(
        self, model: nn.Module, written: Iterable[Tensor], views: Iterable[Tensor] = ()
    ) -> None:
        """Take the memory that was in use before the last update, or new memory.

        `views` are tensors that the model reaches beside its parameters and buffers; they follow.

        Raises UpdateError for a tensor whose memory can't be exchanged.
        """
        self._model = unwrapped(model)
        self._live: dict[int, Tensor] = {}
        self._back: dict[int, Tensor] = {}
        spare: dict[tuple[int, torch.device], list[Tensor]] = {}
        for tensor in reversed(list(_unshared(_SPARE.pop(self._model, [])))):
            spare.setdefault((tensor.nbytes, tensor.device), []).append(tensor)
        for tensor in written:
            _check(tensor)
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in self._back:
                live = _bytes_of(tensor)
                fits = spare.get((live.nbytes, live.device))
                self._live[pointer] = live
                self._back[pointer] = fits.pop() if fits else torch.empty_like(live)
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
        before = [tensor.data for tensor in self._moved]
        try:
            _point(self._moved, [self.on_back(tensor) for tensor in self._moved])
        except BaseException:
            _point(self._moved, before)
            raise
        _SPARE[self._model] = list(self._live.values())

    def on_back(self, tensor: Tensor) -> Tensor:
        """The same part of the other memory."""
        back = self._back[tensor.untyped_storage().data_ptr()]
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return view.set_(
            back.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )


def _unshared(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The tensors whose memory no other tensor and no storage object of the user holds."""
    lone = torch.empty(1, device="cpu")
    # All are held while they are counted, as the address of one that is not may be used again.
    storages = list(map(Tensor.untyped_storage, (lone, *tensors)))
    counts = map(torch._C._storage_Use_Count, map(_address, storages))
    # A storage has one object in Python, however many hold that.
    once, *held = zip(counts, map(sys.getrefcount, storages), strict=True)
    return (tensor for tensor, count in zip(tensors, held, strict=True) if count == once)


def _point(tensors: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    for tensor, data in zip(tensors, views, strict=True):
        tensor.data = data
    torch.autograd.graph.increment_version(tensors)
    for tensor in tensors if any_layout_set() else ():
        if (found := record_of(tensor)) is not None:
            record(tensor, replace(found, pointer=tensor.data_ptr()))


def _bytes_of(tensor: Tensor) -> Tensor:
    """All of a tensor's memory."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _check(tensor: Tensor) -> None:
    what, others = f"a parameter of {tuple(tensor.shape)} ", "use mode='buffered' or 'undo_log'"
    if tensor.is_inference():
        raise UpdateError(
            what + f"was made in inference mode, and its memory cannot be exchanged: {others}"
        )
    if isinstance(tensor, DTensor):
        raise UpdateError(
            what + "is a DTensor, whose memory FSDP2 holds too: not mode='double_buffer'"
        )
    if tensor.device.type == "cpu" and tensor.untyped_storage().is_shared():
        raise UpdateError(
            what + f"is in shared memory or in a file, which others go on to read: {others}"
        )
    if shows_checkpoint(tensor):
        raise UpdateError(
            what + f"shows the checkpoint's layout now, and its memory must stay: {others}"
        )
