"""The report: what each pass did and declined to do, and why, as text or as data.

Remarks that differ only in a layer's number are printed on one line. A report holds facts; it
does not know how they are shown in a browser or a log.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from fixpass.passes.base import Kind, Remark
from fixpass.passes.printer import renumber_symbols


@dataclass(frozen=True)
class Report:
    """Remarks in the order in which the passes made them, for one or several graphs."""

    remarks: tuple[Remark, ...] = ()
    title: str = ""

    def __add__(self, other: "Report") -> "Report":
        return Report(self.remarks + other.remarks, self.title or other.title)

    def of_kind(self, kind: Kind) -> tuple[Remark, ...]:
        return tuple(remark for remark in self.remarks if remark.kind == kind)

    def of_pass(self, pass_name: str) -> tuple[Remark, ...]:
        return tuple(remark for remark in self.remarks if remark.pass_name == pass_name)

    @property
    def bytes_saved(self) -> int:
        return sum(remark.bytes_saved for remark in self.remarks)

    def to_json(self) -> str:
        """The report as JSON: title, bytes saved, and one object a remark."""
        remarks = [asdict(remark) for remark in self.remarks]
        return json.dumps(
            {"title": self.title, "bytes_saved": self.bytes_saved, "remarks": remarks}, indent=2
        )

    def __str__(self) -> str:
        lines = [self.title] if self.title else []
        for name in dict.fromkeys(remark.pass_name for remark in self.remarks):
            lines.append(name)
            lines += [f"    {line}" for line in merged_lines(self.of_pass(name))]
        if self.bytes_saved:
            lines.append(f"bytes saved: {self.bytes_saved:,}")
        return renumber_symbols("\n".join(lines) + "\n")


def summary(report: Report) -> str:
    """One line for a log: what compiles to the same code, then how often each pass did what."""
    same = sum(remark.same_code for remark in report.remarks)
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
        ValueError, TypeError: the text is not of this version.

    """
    return tuple(
        Report(tuple(Remark(**remark) for remark in item["remarks"]), item["title"])
        for item in json.loads(text)
    )


def merged_lines(remarks: Iterable[Remark]) -> list[str]:
    """One line for each group of remarks that differ only in numbers of layers and of nodes."""
    groups: dict[tuple[str, str, str], list[Remark]] = {}
    for remark in remarks:
        site = re.sub(r"\d+", "*", remark.where) or _without_names(remark.node)
        groups.setdefault((remark.kind, site, _without_names(remark.text)), []).append(remark)
    return [_line(group) for group in groups.values()]


def _line(group: list[Remark]) -> str:
    first = group[0]
    if len(group) == 1:
        site = f"{first.node} ({first.where})" if first.where else first.node
        return f"{first.kind:<7} {site}: {first.text}"
    where = re.sub(r"\d+", "*", first.where)
    site = where or _without_names(first.node)
    return f"{first.kind:<7} {len(group)} x {site}: {first.text}"


def _without_names(text: str) -> str:
    """The text with node names' numbers left out: `mul_12` and `mul_34` are one reason."""
    return re.sub(r"\b([a-z]\w*?)_\d+\b", r"\1", text)
