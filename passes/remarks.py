"""The report: what each pass did and declined to do, and why, as text or as data.

Remarks that differ only in a layer's number are printed on one line. A report holds facts; it
does not know how they are shown in a browser or a log.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fixpass.passes.base import Choice, Kind, Remark
from fixpass.passes.printer import renumber_symbols
from fixpass.passes.source_lines import SourceLine


@dataclass(frozen=True)
class Report:
    """Remarks in the order in which the passes made them, for one or several graphs."""

    remarks: tuple[Remark, ...] = ()
    title: str = ""
    summary: str = ""
    """One sentence under the title: what the passes did, in figures."""

    def __add__(self, other: "Report") -> "Report":
        title, summary = self.title or other.title, self.summary or other.summary
        return Report(self.remarks + other.remarks, title, summary)

    def of_kind(self, kind: Kind) -> tuple[Remark, ...]:
        return tuple(remark for remark in self.remarks if remark.kind == kind)

    def of_pass(self, pass_name: str) -> tuple[Remark, ...]:
        return tuple(remark for remark in self.remarks if remark.pass_name == pass_name)

    @property
    def bytes_saved(self) -> int:
        return sum(remark.bytes_saved for remark in self.remarks)

    def to_json(self) -> str:
        """The report as JSON: title, bytes saved, and one object a remark with its source lines."""
        remarks = [asdict(remark) for remark in self.remarks]
        facts = {"title": self.title, "summary": self.summary, "bytes_saved": self.bytes_saved}
        return json.dumps({**facts, "remarks": remarks}, indent=2)

    def __str__(self) -> str:
        return self.text()

    def text(self, *, with_lines: bool = False) -> str:
        """The report as text.

        Args:
            with_lines: name the line of the model at each site, such as `model.py:42`. `str()` has
                no lines, so that a snapshot stays the same when the model's file changes.
        """
        lines = [line for line in (self.title, self.summary) if line]
        for name in dict.fromkeys(remark.pass_name for remark in self.remarks):
            lines.append(name)
            lines += [f"    {line}" for line in merged_lines(self.of_pass(name), with_lines)]
        if self.bytes_saved:
            lines.append(f"bytes saved: {self.bytes_saved:,}")
        return renumber_symbols("\n".join(lines) + "\n")


def log_line(report: Report) -> str:
    """One line for a log: what compiles to the same code, then how often each pass did what."""
    chosen = (r.choice for r in report.remarks if r.choice is not None and not r.same_code)
    joined = {site for choice in chosen for site in choice.sites if site}
    same = sum(r.same_code and r.where not in joined for r in report.remarks)
    parts = []
    if same:
        read = "norm reads its strides" if same == 1 else "norms read their strides"
        parts.append(f"{same} {read} in place; Inductor's code is the same")
    counts = Counter((r.pass_name, r.kind) for r in report.remarks if not _is_counted(r))
    parts += [f"{name}: {number} {kind}" for (name, kind), number in counts.items()]
    return "; ".join(parts) or "nothing to do"


def _is_counted(remark: Remark) -> bool:
    """Whether a norm is counted already: where its kernel is chosen, or as the same code."""
    return remark.same_code or (remark.pass_name, remark.kind) == ("canonicalize-norms", "applied")


def reports_to_json(reports: Sequence[Report]) -> str:
    """The reports as JSON, for `reports_from_json`."""
    return json.dumps([asdict(report) for report in reports])


def reports_from_json(text: str) -> tuple[Report, ...]:
    """The reports of `reports_to_json`.

    Raises:
        ValueError, TypeError, KeyError: the text is not of this version.

    """
    return tuple(
        Report(tuple(map(_remark, item["remarks"])), item["title"], item["summary"])
        for item in json.loads(text)
    )


def _remark(facts: dict[str, Any]) -> Remark:
    choice = facts["choice"] and {key: _tupled(value) for key, value in facts["choice"].items()}
    stack = tuple(SourceLine(**line) for line in facts["stack"])
    return Remark(**{**facts, "stack": stack, "choice": choice and Choice(**choice)})


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def merged_lines(remarks: Iterable[Remark], with_lines: bool = False) -> list[str]:
    """One line for each group of remarks that differ only in numbers of layers and of nodes."""
    groups: dict[tuple[str, str, str], list[Remark]] = {}
    for remark in remarks:
        site = re.sub(r"\d+", "*", remark.where) or without_names(remark.node)
        groups.setdefault((remark.kind, site, without_names(remark.text)), []).append(remark)
    return [_line(group, _place(group) if with_lines else "") for group in groups.values()]


def _place(group: list[Remark]) -> str:
    """` at model.py:42`, with the number of other lines of the model that share the remark."""
    lines = list(dict.fromkeys(str(remark.line) for remark in group if remark.line))
    more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
    return f" at {lines[0]}{more}" if lines else ""


def _line(group: list[Remark], place: str) -> str:
    first = group[0]
    if len(group) == 1:
        site = f"{first.node} ({first.where})" if first.where else first.node
        return f"{first.kind:<7} {site}{place}: {first.text}"
    where = re.sub(r"\d+", "*", first.where)
    site = where or without_names(first.node)
    return f"{first.kind:<7} {len(group)} x {site}{place}: {first.text}"


def without_names(text: str) -> str:
    """The text with node names' numbers left out: `mul_12` and `mul_34` are one reason."""
    return re.sub(r"\b([a-z]\w*?)_\d+\b", r"\1", text)
