"""Three ways to write an update into live weights, and what undoes each of them.

staged   all values are in memory of the update's own: 1 x its bytes. Nothing can go wrong but
the machine; an interrupt in mid-commit is finished first, then raised.
journal  values are read in the closed gate, and the old bytes are kept in a temporary file:
8 MiB a thread of memory, 1 x on disk. Any exception brings the old bytes back.
double   values go to a second set of memory, which is then put in place: 1 x its bytes, kept.
Calls go on until the last moment; addresses change.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fixpass.runtime.attributes import note, remembered
from fixpass.runtime.errors import CheckpointError, UpdateError
from fixpass.runtime.weights.box import Box
from fixpass.runtime.weights.closing import Closing
from fixpass.runtime.weights.collected import Prepared, read_files, values_of
from fixpass.runtime.weights.destination import destination
from fixpass.runtime.weights.double_buffer import DoubleBuffer
from fixpass.runtime.weights.local import local_box
from fixpass.runtime.weights.lock import WeightsLock, over
from fixpass.runtime.weights.manifest import Manifest
from fixpass.runtime.weights.options import Options
from fixpass.runtime.weights.own_loaders import OwnLoads, call, in_memory
from fixpass.runtime.weights.places import Places, places
from fixpass.runtime.weights.read import Copy, copies
from fixpass.runtime.weights.relayout import logical
from fixpass.runtime.weights.stored import MemoryPiece, Stored
from fixpass.runtime.weights.targets import Target, targets
from fixpass.runtime.weights.undo_log import UndoLog
from fixpass.runtime.weights.weight_version import write_keys

_PART = 1 << 20  # elements looked at for NaN at once


@dataclass(frozen=True)
class Commit:
    """What a commit needs. `prepare` checks the update against places and says what to write."""

    model: nn.Module
    live: Mapping[str, Target]
    manifest: Manifest
    base: int
    prepare: Callable[[Places], Prepared]
    options: Options

    def run(self) -> tuple[Prepared, float]:
        """Write the update; what was written, and the seconds for which calls were held back."""
        self.manifest.check(self.tensors)
        prepared = self.prepare(places(self.live))
        if self.options.mode == "double_buffer":
            return self._double(prepared)
        work = prepared.places.putting([*prepared.copies, *self._own(prepared)])
        if self.options.finite and self.options.mode == "buffered":
            check_finite((c.stored.name, p) for c in work for p in values_of(c.stored))
        written = [self.live[name].tensor for name in prepared.written]
        if self.options.mode == "undo_log":
            return prepared, self._journal(work, prepared.written, written)
        gates = over(written)
        closing = self._closing
        with closing.closed(gates) as began:
            closing.forward(gates, partial(self._write, work))
        return prepared, time.perf_counter() - began

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: target.tensor for name, target in self.live.items()}

    def _journal(self, work: list[Copy], names: Sequence[str], written: list[Tensor]) -> float:
        gates, journal = over(written), UndoLog()
        try:
            # Calls go on while the old bytes are written down.
            before = write_keys(written)
            for param in written:
                journal.keep(param)
            with self._closing.closed(gates) as began:
                if write_keys(written) != before:
                    raise UpdateError("weights were written while an update was open: begin again")
                self._write_or_restore(gates, journal, work, zip(names, written, strict=True))
            return time.perf_counter() - began
        finally:
            journal.close()

    def _write_or_restore(
        self,
        gates: Collection[WeightsLock],
        journal: UndoLog,
        work: list[Copy],
        written: Iterable[tuple[str, Tensor]],
    ) -> None:
        try:
            with journal:
                self._write(work)
                if self.options.finite:
                    check_finite(written)
                self._closing.finish(gates)
        except BaseException as error:
            if not journal.restored:
                self._closing.poison(gates, error)
            raise

    def _double(self, prepared: Prepared) -> tuple[Prepared, float]:
        written = [self.live[name].tensor for name in prepared.written]
        double = DoubleBuffer(self.model, written)
        copies = [*prepared.copies, *self._own(prepared)]
        moved = [replace(copy, target=double.on_back(copy.target)) for copy in copies]
        work = places(self.live, double.back).putting(moved)
        double.keep_the_rest(0 if prepared.covered or prepared.own else _bytes(written))
        self._write(work)
        if self.options.finite:
            back = double.back
            check_finite((name, back[id(self.live[name].tensor)]) for name in prepared.written)
        gates = over(written)
        closing = self._closing
        with closing.closed(gates) as began:
            double.flip()
            try:
                closing.finish(gates, moved=True)
            except BaseException:
                double.flip()
                raise
        return prepared, time.perf_counter() - began

    def _write(self, work: list[Copy]) -> None:
        read_files(work, self.options.threads, self.options.advance)

    def _own(self, prepared: Prepared) -> list[Copy]:
        """What loaders of parameters' own made of their tensors, on stand-ins, as copies."""
        return [
            copy
            for load in prepared.own
            for copy in _run_own(load, self.live[load.target.name], self.options.threads)
        ]

    @property
    def _closing(self) -> Closing:
        return Closing(self.model, self.base, self.options, self._check)

    def _check(self, moved: bool) -> None:
        now = {name: target.tensor for name, target in targets(self.model).items()}
        self.manifest.check(now, moved=moved)


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


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(t): t for t in tensors}.values())


def _run_own(load: OwnLoads, live: Target, threads: int) -> Iterator[Copy]:
    """Let a loader fill a plain parameter of the checkpoint's layout; then copy that.

    It starts with the present values, of which a loader may leave some.
    """
    param = live.tensor
    if isinstance(param, DTensor):
        whole = torch.zeros(param.shape, dtype=param.dtype, device=param.device)
    else:
        whole = logical(param)
    stand_in = (remembered(live.module, live.leaf) or note(param)).like(whole)
    for item in load.routed:
        call(load, stand_in, item, in_memory(item.stored, threads))
    where = destination(load.target.tensor, repr(load.target.name))
    values = stand_in.detach()
    stored = Stored(
        load.target.name,
        values.dtype,
        tuple(values.shape),
        (MemoryPiece(values, Box.whole(tuple(values.shape))),),
        "its weight_loader",
    )
    if tuple(values.shape) != where.whole or values.dtype != where.tensor.dtype:
        raise CheckpointError(f"the weight_loader of {load.target.name!r} changed its layout")
    yield from copies(stored, where.box, where.tensor)
