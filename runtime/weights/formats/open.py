"""Open a checkpoint by its path: safetensors files, a DCP folder, or a file of torch.save."""

import glob
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.formats import dcp
from fixpass.runtime.weights.formats import safetensors as safetensors_files
from fixpass.runtime.weights.formats.safetensors import Files
from fixpass.runtime.weights.stored import Stored

Source = str | Path | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]

# Files of torch.save, which are pickles.
PICKLES = (".pt", ".pth", ".bin")


def opened(
    source: str | Path, *, weights_only: bool = True
) -> Files | list[Stored] | Mapping[str, Tensor]:
    """Open a checkpoint. Of safetensors files and DCP folders only headers are read.

    Args:
        source: a safetensors file, an index of several, a glob pattern, a folder of either, a
            folder of torch.distributed.checkpoint, or a file of torch.save.
        weights_only: False lets pickles run code.

    Returns:
        The headers of safetensors files, the tensors of a DCP folder, or the state dict of a file
        of torch.save.

    Raises:
        CheckpointError: the source is none of these, or is broken.

    """
    if (files := _files_of(source)) is not None:
        return files
    path = Path(source)
    if not path.is_dir():
        return _from_torch_save(path, weights_only)
    if (path / dcp.METADATA).is_file():
        return list(dcp.from_dcp(path, weights_only=weights_only).values())
    raise CheckpointError(
        f"{path} holds no .safetensors file, no index of them and no {dcp.METADATA}"
    )


def _files_of(source: str | Path) -> Files | None:
    """The safetensors files that a path means; None where it means something else."""
    path = Path(source)
    if path.is_dir():
        return safetensors_files.from_folder(path)
    if glob.has_magic(str(source)) and not path.exists():
        return safetensors_files.from_glob(str(source))
    if path.name.endswith(safetensors_files.INDEX_SUFFIX):
        return safetensors_files.from_index(path)
    return None if path.suffix in PICKLES else safetensors_files.from_files([path])


def _from_torch_save(path: Path, weights_only: bool) -> Mapping[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    # A broken or unsafe file raises whatever its bytes lead to.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a state dict")
    return found
