"""The reports of loads and updates: tensors loaded, skipped, missing and unexpected."""

from collections import Counter
from collections.abc import Mapping as Named
from dataclasses import dataclass

from fixpass.runtime.weights.mapping import Branch
from fixpass.runtime.weights.options import Mode

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
