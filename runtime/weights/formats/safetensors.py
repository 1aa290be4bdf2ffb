"""Read safetensors checkpoints: one file, an index with its shards, a glob, or a folder.

A file is eight bytes with the length of its header, the header as JSON, and the tensors' bytes with
no gap between them. The header is read as if an enemy had written it: everything is checked against
the size of the file. A name that two files hold, a shard that is not there and a shard outside the
folder of the index are errors. A link to a file elsewhere is followed, as caches are made of links.
"""

import glob
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.files import OpenFile
from fixpass.runtime.weights.reports import some
from fixpass.runtime.weights.stored import Box, FilePiece, Shape, Stored

INDEX_SUFFIX = ".safetensors.index.json"

# The bound that the format itself sets.
MOST_HEADER_BYTES = 100_000_000

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True, slots=True)
class RawHeader:
    """A header as it stands in an open file. Equal headers describe equal tensors."""

    file: OpenFile = field(compare=False)
    origin: str
    """The file's name in messages."""
    size: int
    """Bytes of the whole file."""
    text: bytes

    @property
    def begin(self) -> int:
        """The byte of the file at which the tensors begin."""
        return 8 + len(self.text)


def raw_header(path: Path, origin: str = "") -> RawHeader:
    """The header of a safetensors file. Only its length has been checked."""
    try:
        file = OpenFile(path)
        size = file.size
        length = int.from_bytes(file.bytes_at(0, 8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise _broken(path, f"its header of {length:,} bytes is not in its {size:,} bytes")
        text = file.bytes_at(8, length)
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from error
    if len(text) != length:
        raise _broken(path, "it became shorter while it was read")
    return RawHeader(file, origin or path.name, size, text)


def tensors_in(header: RawHeader) -> list[Stored]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises CheckpointError where the file is not exactly what its header says.
    """
    path, begin, found = header.file.path, header.begin, []
    for name, entry in _parse(path, header.text).items():
        dtype, shape, start, stop = _entry(path, name, entry)
        expected = math.prod(shape) * dtype.itemsize
        if stop - start != expected:
            raise _broken(path, f"{name!r} has {stop - start:,} bytes for a shape of {expected:,}")
        piece = FilePiece(header.file, begin + start, Box((0,) * len(shape), shape))
        found.append((start, stop, Stored(name, dtype, shape, (piece,), header.origin)))
    found.sort(key=_START_AND_STOP)
    end = 0
    for start, stop, stored in found:
        if start != end:
            how = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise _broken(path, f"{stored.name!r} {how}, at byte {start:,}")
        end = stop
    if begin + end != header.size:
        raise _broken(
            path, f"its tensors end at byte {begin + end:,} and the file at {header.size:,}"
        )
    return [stored for _, _, stored in found]


_START_AND_STOP = itemgetter(0, 1)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise _broken(path, f"its header has {twice!r} twice")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    # No JSON, no UTF-8, or a number with more digits than Python reads.
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, Shape, int, int]:
    match entry:
        case {"dtype": str(kind), "shape": list(sizes), "data_offsets": [start, stop]}:
            numbers: Sequence[Any] = [*sizes, start, stop]
        case _:
            raise _broken(path, f"the entry of {name!r} has no dtype, shape and data_offsets")
    # True is an int to Python, and no size to anyone else.
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers) or (
        0 in sizes and math.prod(filter(None, sizes)) >= 1 << 63
    ):
        raise _broken(path, f"the shape or the offsets of {name!r} are not sizes: {entry!r:.200}")
    if start > stop:
        raise _broken(path, f"{name!r} ends before it starts")
    if kind == "F4" and sizes and sizes[-1] % 2 == 0:
        # Two values a byte, and torch counts bytes.
        return torch.float4_e2m1fn_x2, (*sizes[:-1], sizes[-1] // 2), start, stop
    if kind not in DTYPES:
        raise _broken(path, f"{name!r} has dtype {kind!r}, which torch has not")
    return DTYPES[kind], tuple(sizes), start, stop


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a valid safetensors file: {why}. Fetch or save it again")


@dataclass(frozen=True, slots=True)
class Files:
    """The raw headers of a checkpoint's open files, and the weight map of its index.

    Equal files hold tensors of equal names, dtypes and shapes at equal places, whatever their
    values and wherever the files are.
    """

    headers: tuple[RawHeader, ...]
    places: Mapping[str, str] = field(default_factory=dict)
    """The shard of each name that the index lists; empty without an index."""
    index: Path | None = field(default=None, compare=False)

    @property
    def opened(self) -> list[OpenFile]:
        return [header.file for header in self.headers]

    @property
    def num_bytes(self) -> int:
        """Of the tensors in all files."""
        return sum(header.size - header.begin for header in self.headers)

    def tensors(self) -> dict[str, Stored]:
        """The tensors; CheckpointError where a header or the index is wrong."""
        found: dict[str, Stored] = {}
        for header in self.headers:
            for stored in tensors_in(header):
                if other := found.get(stored.name):
                    raise CheckpointError(
                        f"{stored.name!r} is in {other.origin} and in {stored.origin}: which one "
                        "is meant? Name the files to load"
                    )
                found[stored.name] = stored
        for name, shard in self.places.items():
            where = found[name].origin if name in found else "not there"
            if where != shard:
                where = where if name not in found else f"in {where}"
                raise CheckpointError(
                    f"{self.index} says that {name!r} is in {shard}, and it is {where}"
                )
        return found


def from_files(paths: Iterable[Path], folder: Path | None = None) -> Files:
    """Several files; messages name them as they are called from `folder`, or by their last part."""
    return Files(
        tuple(
            raw_header(path, path.relative_to(folder).as_posix() if folder else path.name)
            for path in paths
        )
    )


def from_glob(pattern: str) -> Files:
    """All files that a pattern matches."""
    paths = sorted(map(Path, glob.glob(pattern)))
    if not paths:
        raise CheckpointError(f"no file matches {pattern!r}")
    return from_files(paths)


def from_index(path: Path) -> Files:
    """The shards that an index names."""
    places = _weight_map(path)
    for shard in set(places.values()):
        _check_name(path, shard)
    names = {shard: PurePosixPath(shard).as_posix() for shard in set(places.values())}
    shards = sorted(set(names.values()))
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} names {some(missing, 5)} and there is no such file beside it"
        )
    found = from_files((path.parent / shard for shard in shards), path.parent)
    return replace(found, places={n: names[shard] for n, shard in places.items()}, index=path)


def from_folder(folder: Path) -> Files | None:
    """The shards of a folder's index, or else all its files; None where there are none."""
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder} has {some([i.name for i in indices], 5)}: name one of them"
        )
    if indices:
        return from_index(indices[0])
    paths = sorted(folder.glob("*.safetensors"))
    return from_files(paths) if paths else None


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    match index:
        case {"weight_map": dict(places)} if all(isinstance(v, str) for v in places.values()):
            return places
    raise CheckpointError(f"{path} has no weight_map from names to files")


def _check_name(path: Path, shard: str) -> None:
    parts = PurePosixPath(shard.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or "\0" in shard or not parts.name:
        raise CheckpointError(f"{path} names {shard!r}, which is not in the folder of the index")
