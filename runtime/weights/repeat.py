"""A reload that is like the last one: what was checked in full is not planned again.

The headers of the files, and then the model, are compared with what the kept plan was made for, at
a few microseconds a tensor, and bytes go where they went before. Anything that is different goes
the ordinary way, and so do mode "journal" and checks for NaN.
"""

import ctypes
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fixpass.runtime.checkpoint import vectored
from fixpass.runtime.checkpoint.read import run
from fixpass.runtime.checkpoint.safetensors_files import Files
from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights import double
from fixpass.runtime.weights.closing import Closing
from fixpass.runtime.weights.collected import add_cut_off
from fixpass.runtime.weights.gate import gate_of, over_ids
from fixpass.runtime.weights.kept import Kept, Span, kept_for
from fixpass.runtime.weights.look import parts_of, pointers_of, walk
from fixpass.runtime.weights.options import Options
from fixpass.runtime.weights.transaction import UpdateReport, alone
from fixpass.runtime.weights.writes import committed


class _ChangedError(Exception):
    """The model is not what the plan was made for."""


def repeated(model: nn.Module, files: Files, options: Options) -> UpdateReport | None:
    """Do the reload from these files as the last one was done; None where it is not like it.

    Raises what the ordinary way raises; then the weights are those of before.
    """
    kept = kept_for(model)
    if kept is None or not kept.is_for(files, options):
        return None
    with alone(model, options) as base:
        repeat = _Repeat(model, options, kept, files, base)
        try:
            seconds = repeat.staged() if options.mode == "staged" else repeat.double()
        except _ChangedError:
            return None
        committed(model)
        load = replace(kept.report, seconds=time.perf_counter() - options.began)
        return UpdateReport(load, gate_of(model).version, options.mode, seconds, {})


@dataclass(frozen=True)
class _Repeat:
    """One reload. Bytes are read first; the model is looked at behind the closed gate, once."""

    model: nn.Module
    options: Options
    kept: Kept
    files: Files
    base: int

    def staged(self) -> float:
        """Read everything into memory of the update's own; then write it. Seconds of the gate."""
        # In pieces that malloc uses again: fresh pages would take longer than all the rest.
        staging = [torch.empty(span.num_bytes, dtype=torch.uint8) for _, span in self._spans]
        self._read(array("Q", (memory.data_ptr(), memory.numel())) for memory in staging)
        gates, closing = over_ids(self.kept.ids), self._closing
        with closing.closed(gates) as began:
            tensors = self._tensors()
            # Should anybody give one of them other memory now, the old is still there.
            held = [part.untyped_storage() for part in parts_of(tensors)]
            pointers = pointers_of(tensors)
            moves = [
                partial(_scatter, memory.data_ptr(), span, pointers)
                for memory, (_, span) in zip(staging, self._spans, strict=True)
            ]

            def write() -> None:
                run(moves, self.options.threads, self.options.advance)
                torch.autograd.graph.increment_version(parts_of(self.kept.of(tensors)))

            closing.forward(gates, write)
        del staging, held
        return time.perf_counter() - began

    def double(self) -> float:
        """Read into the second set of memory; then put it in place."""
        spare = double.spare_of(self.model, [self.kept.ids[i] for i in self.kept.written])
        if spare is None:
            raise _ChangedError
        fresh, pointers = pointers_of(spare.views), [0] * len(self.kept.ids)
        for index, pointer in zip(self.kept.written, fresh, strict=True):
            pointers[index] = pointer
        self._read(_addresses(span, pointers) for _, span in self._spans)
        gates, closing = over_ids(self.kept.ids), self._closing
        with closing.closed(gates) as began:
            written = self.kept.of(self._tensors())
            if pointers_of(written) != spare.pointers:
                raise _ChangedError
            back = double.exchange(written, spare.views)
            try:
                closing.finish(gates, moved=True)
            except BaseException:
                double.exchange(written, back)
                raise
            double.keep_spare(self.model, written, fresh, back)
        return time.perf_counter() - began

    @property
    def _closing(self) -> Closing:
        return Closing(self.model, self.base, self.options, _ignore)

    def _tensors(self) -> Sequence[Tensor]:
        """The tensors of the walk.

        Nothing but bytes is written to them from here on, so they need no second look.
        """
        names, tensors = walk(unwrapped(self.model))
        if not self.kept.fits(names, tensors):
            raise _ChangedError
        return tensors

    @property
    def _spans(self) -> Iterator[tuple[Path, Span]]:
        for header, spans in zip(self.files.headers, self.kept.spans, strict=True):
            for span in spans:
                yield header.path, span

    def _read(self, numbers: Iterable["array[int]"]) -> None:
        """Read each span to the addresses and sizes that are given for it."""
        advance = self.options.advance if self.options.mode == "double" else _ignore
        work = (
            partial(_fill, path, span, where)
            for (path, span), where in zip(self._spans, numbers, strict=True)
        )
        try:
            run(work, self.options.threads, advance)
        except CheckpointError as error:
            add_cut_off(error, self.files.tensors().values())
            raise


def _fill(path: Path, span: Span, numbers: "array[int]") -> int:
    vectored.fill(path, span.offset, span.num_bytes, numbers)
    return span.num_bytes


def _addresses(span: Span, pointers: Sequence[int]) -> "array[int]":
    """Addresses and sizes of the parts of a span, in turn."""
    numbers = array("Q", bytes(16 * len(span.sizes)))
    numbers[::2], numbers[1::2] = span.addresses(pointers), array("Q", span.sizes)
    return numbers


def _scatter(source: int, span: Span, pointers: Sequence[int]) -> int:
    """Bring the bytes of a span, read to the address `source`, to where they belong."""
    sources = map(source.__add__, span.starts)
    deque(map(ctypes.memmove, span.addresses(pointers), sources, span.sizes), maxlen=0)
    return span.num_bytes


def _ignore(_: int) -> None:
    return None
