"""The options of a load, an update and a reload, and their reports."""

import time
import warnings
from collections import Counter
from collections.abc import Callable
from collections.abc import Mapping as Named
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fixpass.runtime.errors import CheckpointError, UpdateError
from fixpass.runtime.weights.mapping import SAME_NAMES, Branch, Mapping

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

MOST_NAMES = 10


@dataclass(frozen=True, slots=True)
class Skipped:
    """A stored tensor that was not loaded: what its name became, by which branch, and why."""

    name: str
    mapped: str
    branch: Branch
    why: str

    def __str__(self) -> str:
        mapped = "" if self.mapped == self.name else f" -> {self.mapped}"
        return f"{self.name}{mapped} ({self.branch}: {self.why})"


@dataclass(frozen=True, slots=True)
class Missing:
    """A parameter that was not loaded, or not all of it, and what is missing."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


@dataclass(frozen=True, slots=True)
class Initialised:
    """A parameter that the checkpoint has not and that was filled: `ones` or `zeros`."""

    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.name} ({self.value})"


@dataclass(frozen=True)
class LoadReport:
    """What a load did. Names of parameters are those of the model without its wrappers.

    loaded: parameters and buffers. skipped: stored tensors left out by a rule that knows them.
    missing: parameters that nothing was stored for. unexpected: stored tensors that nothing asks
    for. initialised: missing ones that were filled. num_bytes: moved on this rank. seconds: of
    reading and checking, on the wall.
    """

    loaded: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    missing: tuple[Missing, ...] = ()
    unexpected: tuple[str, ...] = ()
    initialised: tuple[Initialised, ...] = ()
    num_bytes: int = 0
    seconds: float = 0.0

    def faults(self, strict: Strict) -> list[str]:
        """What raises at this level, in words; empty where nothing does."""
        found = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "skipped": self.skipped,
            "initialised": self.initialised,
        }
        return [f"{what}: {some(found[what])}" for what in RAISES[strict] if found[what]]

    def __str__(self) -> str:
        lines = [
            f"loaded {len(self.loaded):,} tensors, {self.num_bytes:,} bytes in {self.seconds:.2f} s"
        ]
        branches = Counter(skipped.branch for skipped in self.skipped)
        for branch, count in sorted(branches.items()):
            these = tuple(skipped for skipped in self.skipped if skipped.branch == branch)
            lines.append(f"skipped {count:,} by {branch}: {some(these)}")
        for what in ("missing", "unexpected", "initialised"):
            names: tuple[object, ...] = vars(self)[what]
            if names:
                lines.append(f"{what} {len(names):,}: {some(names)}")
        return "\n".join(lines)


def some(names: tuple[object, ...] | list[str], most: int = MOST_NAMES) -> str:
    """The first names, and how many more there are: a million names make no message."""
    shown = ", ".join(printable(str(name)) for name in names[:most])
    rest = len(names) - most
    return f"{shown} and {rest:,} more" if rest > 0 else shown


def printable(text: str) -> str:
    """The text with escapes in place of characters that a terminal would obey."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


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


@dataclass(frozen=True)
class UpdateReport:
    """The result of an update."""

    load: LoadReport
    version: int
    """The version that the update made."""
    mode: Mode
    closed: float
    """Seconds for which calls were held back."""
    covered: Named[str, tuple[int, int]]
    """Bytes written and all bytes of each parameter that was not written whole."""
    derived: tuple[str, ...] = ()
    """The declared tensors that were refreshed."""
    stale: tuple[str, ...] = ()
    """Other tensors that follow from written weights: they have their old values."""

    def __str__(self) -> str:
        parts = [f"{name}: {a:,} of {b:,} bytes" for name, (a, b) in self.covered.items()]
        for what, names in (("refreshed", self.derived), ("may be stale", self.stale)):
            parts += [f"{what} {len(names):,}: {some(names)}"] if names else []
        return "\n".join(
            [
                str(self.load),
                f"version {self.version}, {self.mode}, calls held back for {self.closed:.3f} s",
                *parts,
            ]
        )


def mode_named(mode: str) -> Mode:
    """The mode of a name; a former name warns. The caller of the caller is blamed."""
    if mode in _FORMER:
        text = f"mode={mode!r} is now called {_FORMER[mode]!r}"
        warnings.warn(text, DeprecationWarning, stacklevel=3)
        mode = _FORMER[mode]
    return mode  # type: ignore[return-value]
