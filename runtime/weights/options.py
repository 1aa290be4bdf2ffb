"""The options of a load, an update and a reload, and the values that each may have."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fixpass.runtime.errors import CheckpointError, UpdateError
from fixpass.runtime.weights.mapping import SAME_NAMES, Mapping

if TYPE_CHECKING:
    import torch.distributed as dist

    from fixpass.runtime.weights.group_commit import Attempt
    from fixpass.runtime.weights.update_group import UpdateGroup

Strict = Literal["none", "missing", "complete", "exact"]

# What raises at each level, besides data that does not fit, which always does.
RAISES: dict[Strict, tuple[str, ...]] = {
    "none": (),
    "missing": ("missing",),
    "complete": ("missing", "unexpected"),
    "exact": ("missing", "unexpected", "skipped", "initialised"),
}

Mode = Literal["direct", "buffered", "undo_log", "double_buffer"]
"""How live weights are written, and the way back from a failure: see commit."""

Scope = Literal["model", "parameters", "parts"]
"""What must be whole: all of the model, each parameter that is written, or only the given parts."""

OnStale = Literal["warn", "raise", "ignore"]
"""What an update does about tensors that it leaves stale: warn after it, or raise before it."""

Missed = Literal["error", "ones", "zeros"]
"""What becomes of a parameter that nothing is stored for."""

_FORMER = {"staged": "buffered", "journal": "undo_log", "double": "double_buffer"}


def _ignore(count: int) -> None:
    return None


@dataclass(frozen=True)
class Options:
    """The options of one load or update; `update` and `load` explain them."""

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
    strict: Strict | None = None
    """The level at which a load raises; None raises as `scope` says."""
    missing: Missed = "error"
    on_stale: OnStale = "ignore"
    group: "dist.ProcessGroup | UpdateGroup | None" = None
    """The ranks that make the update with this one: a process group, or an UpdateGroup."""
    attempt: "Attempt | None" = None
    """The part that this rank has in the group's update, while one is open."""
    advance: Callable[[int], object] = _ignore
    """Called with the number of bytes that were moved."""
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.strict is not None and self.strict not in RAISES:
            raise CheckpointError(f"strict is one of {', '.join(RAISES)}, not {self.strict!r}")
        for what, value, known in (
            ("mode", self.mode, get_args(Mode)),
            ("scope", self.scope, get_args(Scope)),
            ("on_stale", self.on_stale, get_args(OnStale)),
        ):
            if value not in known:
                raise UpdateError(f"{what} is one of {', '.join(known)}, not {value!r}")
        if self.finite and self.mode == "direct":
            raise UpdateError(
                "finite=True needs a mode that leaves the old weights: 'buffered', 'undo_log' or "
                "'double_buffer'"
            )


def mode_named(mode: str) -> Mode:
    """The mode of a name; a former name warns. The caller of the caller is blamed."""
    if mode in _FORMER:
        text = f"mode={mode!r} is now called {_FORMER[mode]!r}"
        warnings.warn(text, DeprecationWarning, stacklevel=3)
        mode = _FORMER[mode]
    return mode  # type: ignore[return-value]
