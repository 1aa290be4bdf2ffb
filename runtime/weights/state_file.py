"""The state of live weights: a small file with their version, and a digest of all their bytes.

A model in a file or in shared memory outlives its process. The state file is written before the
first byte of a commit changes and after the last; where a process dies between the two, the next
process reads of the mixture there.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights.formats.open import raw_bytes
from fixpass.runtime.weights.lock import lock_of
from fixpass.runtime.weights.parameter_layout import logical, record_of
from fixpass.runtime.weights.targets import local_box, targets


@dataclass(frozen=True)
class SavedState:
    """state: "committed", or "committing" from `version` to `to`; pid: of who wrote it."""

    state: Literal["committed", "committing"]
    version: int
    to: int
    mode: str
    pid: int

    def __str__(self) -> str:
        if self.state == "committed":
            return f"committed: all weights are of version {self.version}"
        return (
            f"committing: process {self.pid} ended in the middle of a {self.mode} commit, and the "
            f"weights may be a mixture of versions {self.version} and {self.to}: load all of them "
            "again"
        )


def write_state(path: Path, state: SavedState) -> None:
    """Replace the file in one step; on disk when this returns."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with fresh.open("w") as file:
            json.dump(asdict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def read_state(path: str | Path) -> SavedState | None:
    """What the file says; None where there is none. UpdateError where it is broken."""
    try:
        found = json.loads(Path(path).read_text())
        return SavedState(**found)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UpdateError(f"{path} is no state of an update: {error}") from error


def resume(model: nn.Module, path: str | Path) -> SavedState | None:
    """Give a model that outlived its process the version that its weights have.

    If that process died in a commit, calls that take the read lock of `model` raise PoisonedError
    until all weights are updated. None if there is no file.
    """
    found = read_state(path)
    if found is not None:
        lock = lock_of(model)
        lock.version = max(lock.version, found.version)
        lock.poisoned = "" if found.state == "committed" else f"{path} says {found}"
    return found


def digest(model: nn.Module) -> str:
    """Of names, dtypes, shapes and values of parameters and persistent buffers on this rank."""
    found = hashlib.blake2b(digest_size=16)
    with torch.no_grad():
        for name, target in sorted(targets(model).items()):
            has_layout = record_of(target.tensor) is not None
            value = logical(target.tensor) if has_layout else local_box(target.tensor.detach())[0]
            found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            found.update(raw_bytes(value))
    return found.hexdigest()
