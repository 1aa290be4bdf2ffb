"""A reload that is like the last one: what was checked in full is not planned again.

Where the bytes come from, and then the model, are compared with what the kept plan was made for,
at a few microseconds a tensor, and bytes go where they went before. Anything that is different goes
the ordinary way, and so do checks for NaN.
"""

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fixpass.runtime.errors import CheckpointError, UpdateError
from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights import double_buffer as double
from fixpass.runtime.weights.closing import Closing
from fixpass.runtime.weights.kept import Kept, kept_for
from fixpass.runtime.weights.lock import WeightsLock, lock_of, over_ids
from fixpass.runtime.weights.look import parts_of, pointers_of, walk, writes_of
from fixpass.runtime.weights.occupied import share_memory
from fixpass.runtime.weights.old_bytes import OldBytes
from fixpass.runtime.weights.options import Options
from fixpass.runtime.weights.origins import FromMemory, Origin, UnlikeError
from fixpass.runtime.weights.read import Task, run
from fixpass.runtime.weights.spans import Span
from fixpass.runtime.weights.stream import Stream
from fixpass.runtime.weights.targets import reshard
from fixpass.runtime.weights.update import UpdateReport, alone
from fixpass.runtime.weights.weight_version import committed


def repeated(model: nn.Module, origin: Origin | Stream, options: Options) -> UpdateReport | None:
    """Do the reload from this origin as the last one was done; None where it is not like it.

    Raises what the ordinary way raises; then the weights are those of before.
    """
    kept = kept_for(model)
    if kept is None or not kept.is_for(origin, options):
        return None
    with alone(model, options) as base:
        if kept.seen.layouts.sharding:
            reshard(model)
        repeat = _Repeat(model, options, kept, origin, base)
        try:
            ways = {
                "buffered": repeat.staged,
                "double_buffer": repeat.double,
                "undo_log": repeat.journal,
            }
            seconds = ways[options.mode]()
        except UnlikeError:
            return None
        committed(model)
        load = replace(kept.report, seconds=time.perf_counter() - options.began)
        return UpdateReport(load, lock_of(model).version, options.mode, seconds, {})


def _ignore(_: int) -> None:
    return None


@dataclass(frozen=True)
class _Repeat:
    """One reload. Bytes are read first; the model is looked at behind the closed gate, once."""

    model: nn.Module
    options: Options
    kept: Kept
    origin: Origin | Stream
    base: int

    def staged(self) -> float:
        """Read everything into memory of the update's own; then write it. Seconds of the gate."""
        # In pieces that malloc uses again: fresh pages would take longer than all the rest.
        sizes = [span.num_bytes for span in self.kept.spans]
        staging = [torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes]
        if isinstance(self.origin, Stream):
            addresses = list(map(Span.within, self.kept.spans, staging))
            self._take(self.origin, addresses, staging)
        else:
            self._read(self.origin, self.origin.into(self.kept.spans, staging))
        gates, closing = over_ids(self.kept.ids, lock_of(self.model)), self._closing
        with closing.closed(gates) as began:
            tensors, pointers, _ = self._tensors()
            written = parts_of(self.kept.of(tensors))
            # Should anybody give one of them other memory now, the old is still there.
            held = list(map(Tensor.untyped_storage, written))
            moves = [
                partial(span.scatter, memory, pointers)
                for span, memory in zip(self.kept.spans, staging, strict=True)
            ]

            def write() -> None:
                run(moves, self.options.threads, self.options.advance)
                torch.autograd.graph.increment_version(written)

            closing.forward(gates, write)
            del held
        return time.perf_counter() - began

    def double(self) -> float:
        """Read into the second set of memory; then put it in place."""
        spare = double.take_spare(self.model, self.kept.ids, self.kept.layouts, self.kept)
        if spare is None:
            raise UnlikeError
        fresh, pointers = pointers_of(spare.views), [0] * len(self.kept.seen.ids)
        for index, pointer in zip(self.kept.written, fresh, strict=True):
            pointers[index] = pointer
        if isinstance(self.origin, Stream):
            addresses = [span.addresses(pointers) for span in self.kept.spans]
            self._take(self.origin, addresses, spare.views)
        else:
            self._read(self.origin, self.origin.to(self.kept.spans, pointers))
        gates, closing = over_ids(self.kept.ids, lock_of(self.model)), self._closing
        with closing.closed(gates) as began:
            tensors, now, transient = self._tensors()
            written = self.kept.of(tensors)
            rest = [*self.kept.others(tensors), *transient]
            if self.kept.of(now) != spare.pointers or share_memory(written, rest):
                raise UnlikeError
            back = double.exchange(written, spare.views)
            try:
                closing.finish(gates, moved=True)
            except BaseException:
                double.exchange(written, back)
                raise
            double.keep_spare(self.model, written, fresh, back, self.kept)
        self._advance()
        return time.perf_counter() - began

    def journal(self) -> float:
        """Write the old bytes down while calls go on; then read over them. Seconds of the gate."""
        assert not isinstance(self.origin, Stream)
        tensors, pointers, _ = self._tensors()
        written = parts_of(self.kept.of(tensors))
        given = self.origin.tensors if isinstance(self.origin, FromMemory) else ()
        if share_memory(written, given):
            raise UnlikeError
        # Should anybody give one of them other memory now, the old is still there.
        held, before = list(map(Tensor.untyped_storage, written)), writes_of(written)
        gates, closing = over_ids(self.kept.ids, lock_of(self.model)), self._closing
        with OldBytes(self.kept.spans, pointers) as old, closing.closed(gates) as began:
            if pointers_of(tensors) != pointers:
                raise UnlikeError
            if writes_of(written) != before:
                raise UpdateError("weights were written while an update was open: begin again")
            try:
                work = self.origin.to(self.kept.spans, pointers)
                self._read(self.origin, work)
                # Until here the model may have been given other memory.
                if self._tensors()[1] != pointers:
                    raise UnlikeError
                torch.autograd.graph.increment_version(written)
                closing.finish(gates)
            except BaseException as error:
                self._restore(old, gates, error)
                raise
        del held
        self._advance()
        return time.perf_counter() - began

    def _restore(self, old: OldBytes, gates: Collection[WeightsLock], error: BaseException) -> None:
        try:
            old.restore()
        except BaseException:
            self._closing.poison(gates, error)
            raise

    @property
    def _closing(self) -> Closing:
        return Closing(self.model, self.base, self.options, _ignore)

    def _tensors(self) -> tuple[Sequence[Tensor], list[int], Sequence[Tensor]]:
        """The tensors of the walk, their addresses, and other buffers.

        Nothing but bytes is written to them from here on, so they need no second look.
        """
        names, tensors, transient = walk(unwrapped(self.model))
        if not self.kept.seen.holds(names, tensors):
            raise UnlikeError
        pointers = pointers_of(tensors)
        if 0 in self.kept.of(pointers):
            raise UnlikeError
        return tensors, pointers, transient

    def _take(
        self, origin: Stream, addresses: Iterable[Iterable[int]], memory: Sequence[Tensor]
    ) -> None:
        assert isinstance(self.kept.origin, FromMemory)
        origin.read(self.kept.origin, self.kept.spans, addresses, memory)

    def _advance(self) -> None:
        self.options.advance(sum(span.num_bytes for span in self.kept.spans))

    def _read(self, origin: Origin, work: Iterable[Task]) -> None:
        # Progress is what is in place: all of this may have to be read again.
        try:
            run(work, self.options.threads, _ignore)
        except CheckpointError as error:
            origin.explain(error)
            raise
