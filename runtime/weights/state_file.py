"""A small file that says which weights a model in a file or in shared memory holds.

Such a model outlives its process. The file is written before the first byte of a commit changes
and after the last; where a process dies between the two, the next one reads what is the matter. It
says nothing of the bytes themselves.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights.lock import lock_of


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

    Where that process died in a commit, calls in the gate of `model` raise PoisonedError, and only
    an update of all weights is taken. None where there is no file.
    """
    found = read_state(path)
    if found is not None:
        gate = lock_of(model)
        gate.version = max(gate.version, found.version)
        gate.poisoned = "" if found.state == "committed" else f"{path} says {found}"
    return found
