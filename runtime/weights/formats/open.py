"""Open a checkpoint, whatever it is: files, a DCP folder, a state dict or an iterator."""

import glob
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.formats import dcp, memory
from fixpass.runtime.weights.formats import safetensors as safetensors_files
from fixpass.runtime.weights.formats.safetensors import Files
from fixpass.runtime.weights.stored import Checkpoint

Source = str | Path | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]

# Files of torch.save, which are pickles.
PICKLES = (".pt", ".pth", ".bin")


@contextmanager
def opened(source: Source, *, weights_only: bool = True) -> Iterator[Checkpoint]:
    """The tensors of a checkpoint, readable until the context ends.

    A path may be a safetensors file, an index of several, a glob pattern, a folder of either or a
    folder of torch.distributed.checkpoint; or a file of torch.save. Raises CheckpointError where
    it is none of these or is broken.
    """
    if isinstance(source, str | Path):
        yield _from_path(source, weights_only)
    elif isinstance(source, Mapping):
        yield memory.from_state_dict(source)
    else:
        with tempfile.TemporaryDirectory(prefix="fixpass-") as folder:
            yield memory.from_iterator(source, Path(folder) / "tensors")


def files_of(source: str | Path) -> Files | None:
    """The safetensors files that a path means; None where it means something else."""
    path = Path(source)
    if path.is_dir():
        return safetensors_files.from_folder(path)
    if glob.has_magic(str(source)) and not path.exists():
        return safetensors_files.from_glob(str(source))
    if path.name.endswith(safetensors_files.INDEX_SUFFIX):
        return safetensors_files.from_index(path)
    return None if path.suffix in PICKLES else safetensors_files.from_files([path])


def _from_path(source: str | Path, weights_only: bool) -> Checkpoint:
    if (files := files_of(source)) is not None:
        return files.tensors()
    path = Path(source)
    if not path.is_dir():
        return _from_torch_save(path, weights_only)
    if (path / dcp.METADATA).is_file():
        return dcp.from_dcp(path, weights_only=weights_only)
    raise CheckpointError(
        f"{path} holds no .safetensors file, no index of them and no {dcp.METADATA}"
    )


def _from_torch_save(path: Path, weights_only: bool) -> Checkpoint:
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    # A broken or unsafe file raises whatever its bytes lead to.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a state dict")
    return memory.from_state_dict(found)
