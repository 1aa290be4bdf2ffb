"""Read folders of torch.distributed.checkpoint, without running code that they hold.

Their metadata is a pickle. It is opened with an unpickler that knows the few classes such a file
needs and nothing else, unless the caller trusts the folder. The tensors' bytes are then read from
where they lie in the shards, as from a safetensors file. Values that are no tensors (steps, random
states) are left out.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.files import OpenFile
from fixpass.runtime.weights.stored import Box, FilePiece, Shape, Stored, dense_strides

METADATA = ".metadata"

_KNOWN = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
        "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "torch": "Size device",
    "pathlib": "Path PosixPath PurePosixPath",
    "collections": "OrderedDict",
}


def from_dcp(folder: Path, *, weights_only: bool = True) -> dict[str, Stored]:
    """The tensors of a DCP folder; with `weights_only=False` its metadata may run any code."""
    path = folder / METADATA
    try:
        data = path.read_bytes()
        unpickler = _Unpickler(path, data) if weights_only else pickle.Unpickler(io.BytesIO(data))
        metadata = unpickler.load()
    except CheckpointError:
        raise
    # A broken pickle raises whatever the bytes lead it to.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    if not isinstance(metadata, torch_metadata.Metadata):
        raise CheckpointError(f"{path} holds no metadata of torch.distributed.checkpoint")
    places = {
        (index.fqn, tuple(index.offset or ())): info
        for index, info in (metadata.storage_data or {}).items()
        if isinstance(info, _StorageInfo)
    }
    files: dict[Path, OpenFile] = {}
    return {
        name: _stored(folder, name, entry, places, files)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, torch_metadata.TensorStorageMetadata)
    }


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        found = None
        if name in _KNOWN.get(module, "").split():
            found = super().find_class(module, name)
        elif module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            found = vars(torch)[name]
        if found is None:
            raise CheckpointError(
                f"{self.path} wants {module}.{name}, which no such file needs; weights_only=False "
                "loads it, and runs whatever it holds"
            )
        return found


def _stored(
    folder: Path,
    name: str,
    entry: torch_metadata.TensorStorageMetadata,
    places: Mapping[tuple[str, Shape], _StorageInfo],
    files: dict[Path, OpenFile],
) -> Stored:
    dtype, shape = entry.properties.dtype, tuple(entry.size)
    boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    _check_cover(folder, name, shape, boxes)
    pieces, origins = [], set()
    for box in boxes:
        info = places.get((name, box.start))
        if info is None:
            raise CheckpointError(f"{folder}: no file holds {name!r} from {list(box.start)} on")
        relative = PurePosixPath(info.relative_path)
        if relative.is_absolute() or ".." in relative.parts:
            raise CheckpointError(f"{folder}: {name!r} is in {relative}, outside the folder")
        if info.transform_descriptors:
            raise CheckpointError(f"{folder}: {name!r} is compressed; load it with torch and save")
        origins.add(str(relative))
        try:
            path = folder / relative
            file = files.get(path) or files.setdefault(path, OpenFile(path))
            pieces.append(_piece(file, info, dtype, box))
        # Broken bytes raise whatever they lead to.
        except Exception as error:
            raise CheckpointError(
                f"{folder / relative}: {name!r} cannot be read: {error}"
            ) from error
    return Stored(name, dtype, shape, tuple(pieces), ", ".join(sorted(origins)))


def _check_cover(folder: Path, name: str, shape: Shape, boxes: list[Box]) -> None:
    covered = sum(box.numel for box in boxes)
    overlap = any(a.intersection(b) for i, a in enumerate(boxes) for b in boxes[:i])
    if overlap or covered != math.prod(shape) or not all(box.within(shape) for box in boxes):
        raise CheckpointError(f"{folder}: the shards of {name!r} do not make up {list(shape)}")


def _piece(file: OpenFile, info: _StorageInfo, dtype: torch.dtype, box: Box) -> FilePiece:
    """The place of a shard's bytes; each shard is a file of torch.save inside a larger one."""
    window = _Window(file, info.offset, info.length)
    saved = torch.load(cast(BinaryIO, window), map_location="meta", weights_only=True)
    window.seek(0)
    with zipfile.ZipFile(window) as archive:
        (record,) = [i for i in archive.infolist() if i.filename.endswith("/data/0")]
    window.seek(record.header_offset)
    local = window.read(30)
    expected = (dtype, box.shape, dense_strides(box.shape), 0)
    if (saved.dtype, tuple(saved.shape), saved.stride(), saved.storage_offset()) != expected:
        raise ValueError(f"it is not a dense {dtype} of {list(box.shape)}")
    names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    start = record.header_offset + 30 + names
    size = box.numel * dtype.itemsize
    if record.compress_type != zipfile.ZIP_STORED or start + size > info.length:
        raise ValueError("its bytes are not in the file as they are")
    return FilePiece(file, info.offset + start, box)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own; a part that is not in the file is an error."""

    def __init__(self, file: OpenFile, offset: int, length: int) -> None:
        if offset + length > file.size:
            raise ValueError("the file is shorter than the metadata says")
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self.position, self.length)[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.length - self.position))
        data = self.file.bytes_at(self.offset + self.position, count)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
