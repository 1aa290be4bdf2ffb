"""Safetensors checkpoints: one file, an index with its shards, files of a glob, or a folder.

Only headers are read. A name that two files hold, a shard that is not there and a shard outside
the folder of the index are errors. A link to a file elsewhere is followed, as caches are made of
links; a name in an index may not lead elsewhere.
"""

import glob
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.formats.header import RawHeader, raw_header, tensors_in
from fixpass.runtime.weights.report import some
from fixpass.runtime.weights.stored import Stored

INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Files:
    """The raw headers of a checkpoint's files, and what its index says of names, if it has one.

    Equal ones hold tensors of equal names, dtypes and shapes at equal places, whatever their
    values and wherever the files are.
    """

    headers: tuple[RawHeader, ...]
    places: Mapping[str, str] = field(default_factory=dict)
    index: Path | None = field(default=None, compare=False)

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
