"""Two results of one benchmark, row by row: better, worse, within the spread, missing or new.

Rows agree where the cells before their first measured one do. A figure changed where the quartiles
of the two runs do not overlap. The runs may be of different days: compare on an idle machine.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.results import Spread
from fixpass.report.tables import TextTable

Verdict = Literal["better", "worse", "within the spread", "missing", "new"]
Row = Mapping[str, Any]
_OURS = ("/ fixpass", "/ this", "/ skinny_linear")
"""How a ratio ends that is divided by our own time: there, more is better."""


@dataclass(frozen=True)
class RowVerdict:
    """What became of one row; `changes` has the columns that changed."""

    row: str
    verdict: Verdict
    changes: tuple[str, ...] = ()


def load_result(path: Path) -> dict[str, Any]:
    """The facts of a result's JSON.

    Raises:
        ValueError: the file is no result of a benchmark.
    """
    facts = json.loads(path.read_text())
    if not isinstance(facts, dict) or not {"name", "rows", "environment"} <= facts.keys():
        raise ValueError(f"{path} is no result of `python -m benchmarks`")
    return facts


def verdicts(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[RowVerdict]:
    """One verdict for each row of the old result, then for each row that only the new one has."""
    rows = {_key(row): row for row in new["rows"]}
    known = [(_key(row), row) for row in old["rows"]]
    found = [_verdict(key, row, rows.get(key)) for key, row in known]
    added = rows.keys() - {key for key, _ in known}
    return found + [RowVerdict(key, "new") for key in rows if key in added]


def comparison(old: Mapping[str, Any], new: Mapping[str, Any]) -> TextTable:
    """The verdicts as a table; its title says where the two runs differ."""
    records = [
        {"row": found.row, "verdict": found.verdict, "changed": found.changes}
        for found in verdicts(old, new)
    ]
    changed = [
        f"{name} {old['environment'].get(name)} -> {value}"
        for name, value in new["environment"].items()
        if old["environment"].get(name) != value
    ]
    if old.get("quick") != new.get("quick"):
        changed.append("one of them is a quick run, whose numbers prove nothing")
    return TextTable.of(records, "; ".join([f"{old['name']}, old -> new", *changed]))


def _key(row: Row) -> str:
    cells = []
    for name, value in row.items():
        if isinstance(value, (dict, float)):
            break
        cells.append(f"{name} {value}" if isinstance(value, int) else str(value))
    return ", ".join(cells)


def _verdict(key: str, old: Row, new: Row | None) -> RowVerdict:
    if new is None:
        return RowVerdict(key, "missing")
    changes: dict[str, list[str]] = {"missing": [], "worse": [], "better": []}
    for column, before, after in _spreads(old, new):
        if after is None:
            changes["missing"].append(column)
        elif after.low > before.high or after.high < before.low:
            is_better = (after.low > before.high) == column.endswith(_OURS)
            changes["better" if is_better else "worse"].append(f"{column}: {before} -> {after}")
    texts = tuple(text for found in changes.values() for text in found)
    if changes["missing"]:
        return RowVerdict(key, "missing", texts)
    if changes["worse"]:
        return RowVerdict(key, "worse", texts)
    return RowVerdict(key, "better" if texts else "within the spread", texts)


def _spreads(old: Row, new: Row) -> Iterator[tuple[str, Spread, Spread | None]]:
    """The measured cells of two rows, side by side."""
    for column, value in old.items():
        if isinstance(value, dict):
            other = new.get(column)
            yield column, Spread(**value), Spread(**other) if isinstance(other, dict) else None
