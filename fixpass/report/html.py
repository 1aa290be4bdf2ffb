"""The report as one HTML file that needs no network: sites, kernels, layouts, passes, graphs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import chain

from jinja2 import Environment, StrictUndefined

from fixpass.passes.base import Remark
from fixpass.passes.remarks import Report
from fixpass.report.expected import sites_of
from fixpass.report.page_template import TEMPLATE
from fixpass.report.recording import Recorder, Step
from fixpass.report.sites import SiteFacts

_CONTEXT = 2


@dataclass(frozen=True)
class SiteView:
    """A module with its remarks and its norms."""

    where: str
    remarks: tuple[Remark, ...]
    norms: tuple[tuple[SiteFacts, str], ...]
    """Each norm with the kernel that `select-norm-kernel` chose."""

    @property
    def kernel(self) -> str:
        """The kernel that the last pass chose, such as one for two norms; empty where none did."""
        return next((r.choice.kernel for r in reversed(self.remarks) if r.choice), "")

    @property
    def is_missed(self) -> bool:
        return any(remark.kind != "applied" for remark in self.remarks)


@dataclass(frozen=True)
class Row:
    """A line of a graph before and after a pass; one side is empty where a line came or went."""

    kind: str
    left: str
    right: str


def to_html(report: Report, recorder: Recorder) -> str:
    """The page of an explained model.

    Args:
        report: the report of the model.
        recorder: the graphs that were recorded while it was explained.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals["rows_of"] = rows_of
    return environment.from_string(TEMPLATE).render(
        report=report, sites=list(_views(report, recorder.sites)), graphs=recorder.graphs
    )


def _views(report: Report, sites: Iterable[SiteFacts]) -> Iterator[SiteView]:
    """The sites in the order of the remarks."""
    facts = {(site.node, site.where): site for site in sites}
    groups: dict[str, list[Remark]] = {}
    for remark in report.remarks:
        for where in sites_of(remark):
            groups.setdefault(where, []).append(remark)
    for where, remarks in groups.items():
        chosen = ((facts.get((r.node, r.where)), r.choice) for r in remarks if r.choice)
        norms = tuple((site, choice.kernel) for site, choice in chosen if site)
        yield SiteView(where, tuple(remarks), norms)


def rows_of(step: Step) -> list[Row]:
    """The lines that a pass changed, side by side, with two lines around each change."""
    left, right = step.lines
    groups = SequenceMatcher(None, left, right, autojunk=False).get_grouped_opcodes(_CONTEXT)
    rows: list[Row] = []
    for group in groups:
        rows += [Row("gap", "…", "…")] if rows else []
        rows += chain.from_iterable(_rows(code, left, right) for code in group)
    return rows


def _rows(code: tuple[str, int, int, int, int], left: list[str], right: list[str]) -> Iterator[Row]:
    kind, i, i_end, j, j_end = code
    for step in range(max(i_end - i, j_end - j)):
        before = left[i + step] if i + step < i_end else ""
        after = right[j + step] if j + step < j_end else ""
        yield Row(kind, before, after)
