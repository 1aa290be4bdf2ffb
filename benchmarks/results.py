"""A benchmark's result: rows of numbers, the bounds they were held to, and both as JSON and text.

`spread` makes a median with its quartiles of many samples, `ratios` those of pairs that were
measured side by side. A bound that is missed is written down as missed; nothing is left out.
"""

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from fixpass.report.tables import TextTable, show_records


@dataclass(frozen=True)
class Spread:
    """The median of `repeats` samples, their quartiles, the least and the most."""

    median: float
    low: float
    high: float
    least: float
    most: float
    repeats: int

    def scaled(self, factor: float) -> "Spread":
        """The same in another unit."""
        parts = (self.median, self.low, self.high, self.least, self.most)
        return Spread(*(part * factor for part in parts), self.repeats)

    def __str__(self) -> str:
        if self.repeats == 1:
            return f"{_number(self.median)} (one sample)"
        return f"{_number(self.median)} ({_number(self.low)} to {_number(self.high)})"


def spread(samples: Sequence[float]) -> Spread:
    """The spread of samples; of fewer than four, the quartiles are the least and the most."""
    least, most = min(samples), max(samples)
    low, _, high = quantiles(samples, n=4) if len(samples) >= 4 else (least, 0.0, most)
    return Spread(median(samples), low, high, least, most, len(samples))


def ratios(upper: Sequence[float], lower: Sequence[float]) -> Spread:
    """The spread of the ratios of samples that were taken in pairs."""
    return spread([a / b for a, b in zip(upper, lower, strict=True)])


@dataclass(frozen=True)
class Check:
    """A bound on a measured number; `at_least` where more is better."""

    claim: str
    measured: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    @property
    def record(self) -> dict[str, str]:
        """A row of the table of bounds."""
        side = "at least" if self.at_least else "at most"
        return {
            "bound": "holds" if self.holds else "MISSED",
            "what": self.claim,
            "measured": _number(self.measured),
            "allowed": f"{side} {_number(self.bound)}",
        }

    def __str__(self) -> str:
        return "{bound}: {what}: {measured}, {allowed}".format(**self.record)


@dataclass
class Result:
    """What one benchmark measured. The rows have the same keys; a cell is text or a Spread."""

    name: str
    about: str
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    quick: bool = False
    figure: Callable[[Path], None] | None = None
    """Draws the result into a folder."""

    def table(self) -> TextTable:
        """The rows as a table."""
        records = [{key: _cell(value) for key, value in row.items()} for row in self.rows]
        return TextTable.of(records)

    def notes(self) -> list[str]:
        """What a reader needs to judge the numbers by."""
        where = environment()
        plural = "s" if where["threads"] != 1 else ""
        notes = [
            f"torch {where['torch']}, Python {where['python']}, {where['cpus']} CPUs, "
            f"{where['threads']} thread{plural}. "
            "Numbers are medians, with the quartiles in brackets."
        ]
        if self.quick:
            notes.append("A quick run on small sizes: its numbers prove nothing.")
        return notes

    def markdown(self) -> str:
        """The result as Markdown."""
        lines = [f"# {self.name}", "", self.about, "", self.table().markdown(), ""]
        lines += [*(f"- {check}" for check in self.checks), "", *self.notes()]
        return "\n".join(lines) + "\n"

    def show(self) -> None:
        """Print the result."""
        print(f"{self.name}: {self.about}\n")
        self.table().show()
        if self.checks:
            print()
            show_records([check.record for check in self.checks])
        print("\n".join(["", *self.notes(), ""]), flush=True)

    def facts(self) -> dict[str, Any]:
        """The result as JSON has it."""
        return {
            "name": self.name,
            "about": self.about,
            "quick": self.quick,
            "environment": environment(),
            "rows": [{key: _plain(value) for key, value in row.items()} for row in self.rows],
            "checks": [{**asdict(check), "holds": check.holds} for check in self.checks],
        }

    def write(self, folder: Path) -> None:
        """Write `name.json`, `name.md`, and the figure where there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(json.dumps(self.facts(), indent=2) + "\n")
        (folder / f"{self.name}.md").write_text(self.markdown())
        if self.figure is not None:
            self.figure(folder)


def environment() -> dict[str, Any]:
    """What a reader needs to judge the numbers by."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cell(value: Any) -> str:
    return _number(value) if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Spread) else value


def _number(value: float) -> str:
    """Three digits that matter."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
