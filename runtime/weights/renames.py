"""Suggest renames that bring stored tensors to parameters that nothing is stored for.

Names that differ in numbers only are one pattern, so a hundred thousand names are a few hundred
patterns. Nothing is read but names and shapes.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Mapping as Named
from dataclasses import dataclass
from typing import Literal

from fixpass.runtime.weights.mapping_rules import Rename
from fixpass.runtime.weights.reports import printable
from fixpass.runtime.weights.stored import Shape

_MOST_PATTERNS = 1000
_MOST_PARTS = 3
"""Parts of a name, between its dots, that a rename may exchange."""

Grouped = dict[tuple[str, Shape], list[str]]


@dataclass(frozen=True)
class Suggestion:
    """A rename that gives stored tensors the names of missing parameters of the same shapes."""

    rename: Rename
    stored: str
    """The first tensor that it renames."""
    wanted: str
    """The parameter that this tensor then fills."""
    count: int
    """The number of tensors that it brings to a parameter."""

    def __str__(self) -> str:
        old, new, where = self.rename.old, self.rename.new, self.rename.where
        rest = "" if where == "prefix" else f", {where!r}"
        more = f" ({self.count:,} tensors)" if self.count > 1 else ""
        return printable(
            f"{self.stored!r} looks like {self.wanted!r}, which has the same shape: "
            f"Rename({old!r}, {new!r}{rest})?{more}"
        )


def pattern(name: str) -> str:
    """The name with a star for each part that is a number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def suggest(
    missing: Named[str, Shape], spare: Named[str, Shape], taken: Iterable[str] = ()
) -> list[Suggestion]:
    """The renames that fill most parameters, the best first; a parameter is filled by one of them.

    Args:
        missing: parameters that nothing is stored for, and their shapes.
        spare: stored tensors that no parameter takes, and their shapes.
        taken: stored tensors that a parameter takes. A rename leaves their names alone.

    """
    if not (missing and spare):
        return []
    wanted, offered = _grouped(missing), _grouped(spare)
    kept = {pattern(name) for name in taken}
    by_shape: dict[Shape, list[str]] = {}
    for name, shape in wanted:
        by_shape.setdefault(shape, []).append(name)
    pairs = ((old, new) for old, shape in offered for new in by_shape.get(shape, ()))
    found = dict.fromkeys(
        rename for old, new in pairs if (rename := _rename(old, new, kept)) is not None
    )
    suggestions: list[Suggestion] = []
    while found:
        gains = {rename: _gain(rename, wanted, offered) for rename in found}
        best = max(gains, key=lambda rename: sum(n for _, _, n in gains[rename]))
        if not gains[best]:
            break
        (old, new, _), *_ = gains[best]
        count = sum(n for _, _, n in gains[best])
        suggestions.append(Suggestion(best, offered[old][0], wanted[new][0], count))
        for used, filled, _ in gains[best]:
            del offered[used], wanted[filled]
        del found[best]
    return suggestions


def _grouped(names: Named[str, Shape]) -> Grouped:
    found: Grouped = {}
    for name, shape in names.items():
        found.setdefault((pattern(name), shape), []).append(name)
    return dict(list(found.items())[:_MOST_PATTERNS])


def _gain(
    rename: Rename, wanted: Grouped, offered: Grouped
) -> list[tuple[tuple[str, Shape], tuple[str, Shape], int]]:
    """Patterns that the rename brings together, and how many tensors that is for each."""
    pairs = (((name, shape), (rename.apply(name) or "", shape)) for name, shape in offered)
    return [(a, b, min(len(offered[a]), len(wanted[b]))) for a, b in pairs if b in wanted]


def _rename(name: str, wanted: str, kept: set[str]) -> Rename | None:
    """The shortest rename from one pattern to another that leaves the `kept` ones alone."""
    for rename in _renames(name.split("."), wanted.split(".")):
        if rename.apply(name) == wanted and all(rename.apply(other) == other for other in kept):
            return rename
    return None


def _renames(old: list[str], new: list[str]) -> Iterator[Rename]:
    """Renames of the part that differs, with more and more of the name around it."""
    least = min(len(old), len(new))
    behind = next((n for n in range(least) if old[-1 - n] != new[-1 - n]), least)
    least -= behind
    before = next((n for n in range(least) if old[n] != new[n]), least)
    if not before + behind or max(len(old), len(new)) - before - behind > _MOST_PARTS:
        return
    for more in range(behind + 1):
        stop = behind - more
        given, wanted = old[before : len(old) - stop], new[before : len(new) - stop]
        if "*" in given or not given:
            continue
        first, last = "." * bool(before), "." * bool(stop)
        into = f"{first}{'.'.join(wanted)}{last}" if wanted else first and last
        where: Literal["prefix", "inside", "suffix"] = "inside" if stop else "suffix"
        yield Rename(f"{first}{'.'.join(given)}{last}", into, where if before else "prefix")
    if "*" not in old:
        yield Rename(".".join(old), ".".join(new))
