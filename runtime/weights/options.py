"""How an update is made: its options, checked when they are given."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights.mapping import Mapping

Mode = Literal["buffered", "undo_log", "double_buffer"]
"""How live weights are written, and what undoes it: see commit."""

Scope = Literal["model", "parameters", "parts"]
"""What must be whole: all of the model, each parameter that is written, or no more than parts."""

SAME_NAMES = Mapping()


def _ignore(count: int) -> None:
    return None


@dataclass(frozen=True)
class Options:
    """What an update is given.

    mode, scope: as above. version: what the model has afterwards; None for one more than now.
    base: the version or the digest that the update changes; None for any. mapping: from names of
    the checkpoint. cast: round between float dtypes. finite: refuse NaN and infinities. timeout:
    seconds to wait for calls under way. threads: that read and copy, 0 for one a processor.
    state_file: says which weights a model has that outlives its process. advance: called with
    bytes written.
    """

    mode: Mode = "buffered"
    version: int | None = None
    base: int | str | None = None
    scope: Scope = "model"
    mapping: Mapping = SAME_NAMES
    cast: bool = False
    finite: bool = False
    timeout: float | None = None
    threads: int = 0
    state_file: Path | None = None
    advance: Callable[[int], object] = _ignore
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        for what, value, known in (
            ("mode", self.mode, get_args(Mode)),
            ("scope", self.scope, get_args(Scope)),
        ):
            if value not in known:
                raise UpdateError(f"{what} is one of {', '.join(known)}, not {value!r}")
