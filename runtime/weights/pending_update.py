"""The tensors that were given to an update and are not written yet."""

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from fixpass.runtime.errors import CheckpointError, UpdateError
from fixpass.runtime.weights.files import TEMPORARY, OpenFile, Source
from fixpass.runtime.weights.formats.open import check_values, from_iterator, in_memory
from fixpass.runtime.weights.formats.safetensors import Files
from fixpass.runtime.weights.plan_cache import SourceSignature
from fixpass.runtime.weights.reports import some
from fixpass.runtime.weights.stored import Checkpoint, FilePiece, Stored
from fixpass.runtime.weights.targets import MemoryRanges, tensors_of


class PendingUpdate:
    """Tensors in memory, tensors in files, and tensors for parts of parameters."""

    def __init__(self, model: nn.Module, *, copies: bool) -> None:
        """Copies: whether values in memory are copied when they are given."""
        self.parts: dict[str, list[tuple[Stored, tuple[int, ...]]]] = {}
        """Tensors for parts of a parameter, and where each part begins."""
        self._model = model
        self._copies = copies
        self._tensors: dict[str, Tensor] = {}
        self._stored: dict[str, Stored] = {}
        self._files: Files | None = None
        self._stream: OpenFile | None = None
        """The temporary file, where all of `_stored` came from one iterator."""

    @cached_property
    def _live(self) -> MemoryRanges:
        return MemoryRanges.of(tensors_of(self._model))

    def add(self, name: str, tensor: Tensor, start: Sequence[int] | None) -> None:
        """Take a tensor in memory."""
        check_values(name, tensor)
        if name in self._tensors or name in self._stored or (start is None and name in self.parts):
            raise UpdateError(f"{name!r} was loaded twice in one update")
        # The model's own values are copied in any case: the commit writes over them.
        tensor = tensor.detach()
        if self._copies or self._live.holds(tensor):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        if start is None:
            self._tensors[name] = tensor
        else:
            part = in_memory(name, tensor), tuple(start)
            self.parts.setdefault(name, []).append(part)

    def add_iterator(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take tensors whose memory may be used again at once."""
        if self._copies:
            for name, tensor in tensors:
                self.add(name, tensor, None)
            return
        is_first, file = not self._stored, OpenFile.temporary()
        self.add_stored(from_iterator(tensors, file).values())
        self._stream = file if is_first else None

    def add_stored(self, tensors: Iterable[Stored] | Files) -> None:
        """Take tensors in files."""
        if isinstance(tensors, Files):
            self._files = tensors
            return
        for stored in tensors:
            if stored.name in self._tensors or stored.name in self._stored:
                raise UpdateError(f"{stored.name!r} was loaded twice in one update")
            self._stored[stored.name] = stored
        self._stream = None

    @property
    def signature(self) -> SourceSignature | None:
        """The signature of the source; None where the next one can't be compared with it."""
        if self.parts or (self._stored and self._stream is None):
            return None
        if bool(self._tensors) + bool(self._stored) + (self._files is not None) > 1:
            return None
        if self._files is not None:
            return SourceSignature.of_files(self._files)
        if self._stream is not None:
            return SourceSignature.of_stream(self._stored)
        return SourceSignature.of_tensors(self._tensors)

    @property
    def sources(self) -> list[Source]:
        """The sources of a plan in the order of the signature."""
        stream = [] if self._stream is None else [self._stream]
        return [*self.opened, *stream, *self._tensors.values()]

    @property
    def opened(self) -> list[OpenFile]:
        """The files that are read, but for temporary ones."""
        if self._files is not None:
            return self._files.opened
        pieces = [piece for stored in self._stored.values() for piece in stored.pieces]
        files = {id(p.file): p.file for p in pieces if isinstance(p, FilePiece)}
        return [file for file in files.values() if file.path is not TEMPORARY]

    def checkpoint(self) -> Checkpoint:
        """All tensors but those for parts."""
        found = dict(self._stored)
        if self._files is not None:
            found |= self._files.tensors()
        for name, tensor in self._tensors.items():
            found[name] = in_memory(name, tensor)
        return found

    def note_cut_off(self, error: CheckpointError) -> None:
        """Say in a note which tensors are no longer in a file that became shorter."""
        if not self.opened:
            return
        sizes = {id(file): file.size for file in self.opened}
        found = [
            stored
            for stored in self.checkpoint().values()
            for piece in stored.pieces
            if isinstance(piece, FilePiece) and id(piece.file) in sizes
            if piece.offset + piece.box.numel * stored.dtype.itemsize > sizes[id(piece.file)]
        ]
        if found:
            error.add_note(f"not in the file any more: {some(tuple(found))}")
