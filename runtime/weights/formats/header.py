"""The header of a safetensors file, read as if it came from an enemy.

A file is eight bytes with the length of its header, the header as JSON, and the tensors' bytes
with no gap between them. All of that is checked against the size of the file; no data is read.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.box import Box, Shape
from fixpass.runtime.weights.stored import FilePiece, Stored

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
    """A header as it stands in a file of `size` bytes; equal ones describe equal tensors.

    `origin` names the file in words.
    """

    path: Path = field(compare=False)
    origin: str
    size: int
    text: bytes

    @property
    def begin(self) -> int:
        """Where the tensors' bytes begin in the file."""
        return 8 + len(self.text)


def raw_header(path: Path, origin: str = "") -> RawHeader:
    """The header of a safetensors file, of which only its length has been looked at."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
                raise _broken(path, f"its header of {length:,} bytes is not in its {size:,} bytes")
            text = file.read(length)
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from error
    if len(text) != length:
        raise _broken(path, "it became shorter while it was read")
    return RawHeader(path, origin or path.name, size, text)


def tensors_in(header: RawHeader) -> list[Stored]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises CheckpointError where the file is not exactly what its header says.
    """
    entries = _parse(header.path, header.text)
    return _tensors(header.path, header.origin, entries, header.begin, header.size)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise _broken(path, f"its header has {twice!r} twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _tensors(
    path: Path, origin: str, header: dict[str, Any], begin: int, size: int
) -> list[Stored]:
    found = []
    for name, entry in header.items():
        dtype, shape, start, stop = _entry(path, name, entry)
        piece = FilePiece(path, begin + start, Box.whole(shape))
        expected = math.prod(shape) * dtype.itemsize
        if stop - start != expected:
            raise _broken(path, f"{name!r} has {stop - start:,} bytes for a shape of {expected:,}")
        found.append((start, stop, Stored(name, dtype, shape, (piece,), origin)))
    found.sort(key=lambda item: item[:2])
    end = 0
    for start, stop, stored in found:
        if start != end:
            how = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise _broken(path, f"{stored.name!r} {how}, at byte {start:,}")
        end = stop
    if begin + end != size:
        raise _broken(path, f"its tensors end at byte {begin + end:,} and the file at {size:,}")
    return [stored for _, _, stored in found]


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, Shape, int, int]:
    match entry:
        case {"dtype": str(kind), "shape": list(sizes), "data_offsets": [start, stop]}:
            numbers: Sequence[Any] = [*sizes, start, stop]
        case _:
            raise _broken(path, f"the entry of {name!r} has no dtype, shape and data_offsets")
    # True is an int to Python, and no size to anyone else.
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
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
