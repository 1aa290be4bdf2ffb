"""Four ways to write new bytes into live weights, and the way back from a failure in each.

direct         Bytes go straight into the parameters while the lock is closed. No memory; no way
               back: where a file breaks in the middle, calls raise PoisonedError until all weights
               are loaded again.
buffered       Bytes are read into memory first: 1 x the update. After a failure in the middle the
               bytes, which are at hand, are written once more.
undo_log       The old bytes go to a temporary file first: 1 x on disk. A failure brings them back.
double_buffer  Bytes go to a second set of memory, which is then put in place: 1 x the weights, for
               good. Calls go on until the last moment; addresses change.

The lock is closed for the commit section, which no interrupt splits: see commit_guards.
"""

import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fixpass.runtime.errors import CheckpointError, UpdateError, VersionError
from fixpass.runtime.weights.commit_guards import DoubleBuffer, UndoLog, run_section
from fixpass.runtime.weights.derived import Staged
from fixpass.runtime.weights.files import OpenFile
from fixpass.runtime.weights.lock import WeightsLock, bump, closed, lock_of, over_ids
from fixpass.runtime.weights.options import Options
from fixpass.runtime.weights.plan_cache import Manifest
from fixpass.runtime.weights.read import Work
from fixpass.runtime.weights.state_file import SavedState, write_state
from fixpass.runtime.weights.stored import MemoryPiece
from fixpass.runtime.weights.targets import WeightTarget, gc_paused, local_box, tensors_of, walk
from fixpass.runtime.weights.weight_version import committed, write_keys

_PART = 1 << 20  # elements looked at for NaN at once


@dataclass(frozen=True)
class Commit:
    """An update that is planned, and the model that it is for."""

    model: nn.Module
    options: Options
    base: int
    """The version of the weights when the update was opened."""
    manifest: Manifest
    """The model as it was planned for."""
    written: Sequence[WeightTarget]
    work: Work
    files: Sequence[OpenFile]
    covers_all: bool
    """Whether every parameter of the model is written whole, so that no mixture is left."""
    is_whole: bool
    """Whether the written parameters are written whole, byte for byte."""
    views: Sequence[Tensor] = ()
    """Tensors outside of the walk that lie in the memory of the model's weights."""
    staged: Staged | None = None
    """New values of declared tensors."""

    def run(self) -> float:
        """Write the update; the seconds for which calls were held back."""
        ways = {
            "direct": self._direct,
            "buffered": self._buffered,
            "undo_log": self._undo_log,
            "double_buffer": self._double_buffer,
        }
        return ways[self.options.mode]()

    def _direct(self) -> float:
        self._check_files()
        return self._closed(self._write_or_poison)

    def _write_or_poison(self, locks: Collection[WeightsLock]) -> None:
        try:
            self._write(self.work)
            self._check_files()
        except BaseException as error:
            self._poison(locks, error)
            if isinstance(error, CheckpointError):
                error.add_note(
                    "Parameters may hold old and new bytes: mode='undo_log' brings the old ones "
                    "back, mode='buffered' reads before it writes"
                )
            raise

    def _buffered(self) -> float:
        work = self.work.buffered(self.options.threads)
        if self.options.finite:
            check_finite(
                (copy.stored.name, copy.source.of(copy.piece.tensor))
                for copy in work.copies
                if isinstance(copy.piece, MemoryPiece)
            )
        self._check_files()
        return self._closed(partial(self._write_or_write_again, work))

    def _write_or_write_again(
        self, work: Work, locks: Collection[WeightsLock]
    ) -> BaseException | None:
        try:
            self._write(work)
        except BaseException as error:
            # The old bytes are gone and the new ones at hand: the way to whole weights is forward.
            try:
                self._write(work)
            except BaseException as again:
                self._poison(locks, again)
                raise
            return error
        return None

    def _undo_log(self) -> float:
        tensors = [target.tensor for target in self.written]
        before = write_keys(tensors)
        # Calls go on while the old bytes are written down.
        log = UndoLog(self.work.tensors)

        def write(locks: Collection[WeightsLock]) -> None:
            if write_keys(tensors) != before:
                raise UpdateError("weights were written while an update was open: begin again")
            try:
                self._write(self.work)
                if self.options.finite:
                    check_finite((target.name, target.tensor) for target in self.written)
                self._check_files()
            except BaseException as error:
                self._restore(log, locks, error)
                raise

        self._check_files()
        return self._closed(write)

    def _restore(self, log: UndoLog, locks: Collection[WeightsLock], error: BaseException) -> None:
        try:
            log.restore()
        except BaseException:
            self._poison(locks, error)
            raise

    def _double_buffer(self) -> float:
        written = [target.tensor for target in self.written]
        with gc_paused():
            double = DoubleBuffer(self.model, written, self.views)
            work = self.work.elsewhere(double.on_back)
        if not self.is_whole or any(t.nbytes < _owned(t) for t in self.work.tensors):
            double.copy_old()
        self._write(work)
        if self.options.finite:
            check_finite((target.name, double.on_back(target.tensor)) for target in self.written)
        self._check_files()
        return self._closed(lambda locks: double.flip())

    def _write(self, work: Work) -> None:
        work.run(self.options.threads, self.options.advance)

    def _check_files(self) -> None:
        for file in self.files:
            # Of one file, the descriptor has all of one version, whatever lies at its path now.
            file.check(is_at_path=len(self.files) > 1)

    def _closed(self, write: Callable[[Collection[WeightsLock]], BaseException | None]) -> float:
        own = lock_of(self.model)
        locks = {own, *over_ids([id(target.tensor) for target in self.written], own)}
        if self.options.attempt is not None:
            self.options.attempt.staged()
        with closed(locks, self.options.timeout):
            began = time.perf_counter()
            run_section(partial(self._section, locks, write))
            return time.perf_counter() - began

    def _section(
        self,
        locks: Collection[WeightsLock],
        write: Callable[[Collection[WeightsLock]], BaseException | None],
    ) -> None:
        own = lock_of(self.model)
        before, to = own.version, self.options.version or own.version + 1
        if before != self.base:
            raise VersionError(
                f"the weights became version {before} while an update of version {self.base} was "
                "open: begin it again"
            )
        with gc_paused():
            self.manifest.check({target.name: target.tensor for target in walk(self.model)[0]})
        self._save("committing", before, to)
        try:
            if self.options.attempt is not None:
                self.options.attempt.agree(before, to)
            with nullcontext() if self.staged is None else self.staged.in_place():
                _synchronize(self.work.tensors)
                interrupt = write(locks)
                _synchronize(self.work.tensors)
                self._finish(locks)
        except BaseException:
            # Weights that are whole, old or new, are committed.
            if not own.poisoned:
                self._save_or_warn(own.version)
            raise
        self._save_or_warn(own.version)
        if interrupt is not None:
            interrupt.add_note("the update was finished first: its weights are in place")
            raise interrupt

    def _finish(self, locks: Collection[WeightsLock]) -> None:
        """Give the new weights their version."""
        try:
            poisoned = [lock for lock in locks if lock.poisoned]
            if poisoned and self.covers_all:
                mine = {id(tensor) for tensor in tensors_of(self.model)}
                for lock in poisoned:
                    # A lock that covers more tensors may still have a mixture.
                    if mine.issuperset(id(tensor) for tensor in lock.covers()):
                        lock.poisoned = ""
            bump(self.model, self.options.version, locks)
            committed(self.model)
        except BaseException as error:
            self._poison(locks, error)
            raise

    def _poison(self, locks: Iterable[WeightsLock], error: BaseException) -> None:
        """Let calls raise until all weights are written again."""
        text = (
            f"an update failed in mid-commit ({error!r}) and its weights are a mixture: update "
            "all weights of the model"
        )
        for lock in locks:
            lock.poisoned = text

    def _save(self, state: Literal["committed", "committing"], version: int, to: int) -> None:
        if self.options.state_file is not None:
            write_state(
                self.options.state_file,
                SavedState(state, version, to, self.options.mode, os.getpid()),
            )

    def _save_or_warn(self, version: int) -> None:
        """Say in the state file that the weights are whole; they are so in any case."""
        try:
            self._save("committed", version, version)
        except OSError as error:
            warnings.warn(
                f"the weights are whole and of version {version}, and {self.options.state_file} "
                f"could not be written ({error}): it still says that a commit is under way",
                stacklevel=2,
            )


def check_finite(values: Iterable[tuple[str, Tensor]]) -> None:
    """Raise UpdateError for a tensor that holds a NaN or an infinity."""
    for name, tensor in values:
        local = local_box(tensor.detach())[0]
        if not local.is_floating_point():
            continue
        flat = local.reshape(-1) if local.is_contiguous() else local
        for part in flat.split(_PART) if flat.dim() else (flat,):
            if not part.float().isfinite().all():
                raise UpdateError(f"{name!r} would hold a NaN or an infinity: nothing was changed")


def _owned(tensor: Tensor) -> int:
    """Bytes of all the memory that a tensor lies in."""
    return tensor.untyped_storage().nbytes()


def _synchronize(tensors: Iterable[Tensor]) -> None:
    """Wait for the devices of tensors: another thread has other streams."""
    for device in {tensor.device for tensor in tensors if not tensor.is_cpu}:
        torch.accelerator.synchronize(device)
