"""The report as one HTML file that needs no network: sites, kernels, layouts, passes, graphs.

Sites that differ only in their path, such as the norms of equal layers, share one body in the page.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from fixpass.passes.remarks import Report
from fixpass.report.compiled_kernels import code_rows
from fixpass.report.graph_diff import GraphMatcher
from fixpass.report.module_tree import SiteBody, leaves_of, module_tree, outcomes_of, views_of
from fixpass.report.recording import Recorder, Step

_CONTEXT = 2
_MOST_ROWS = 3_000
"""Rows of a pass: a browser lays out that many in half a second."""


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
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    views = list(views_of(report, recorder.sites))
    numbers: dict[SiteBody, int] = {}
    for view in views:
        numbers.setdefault(SiteBody.of(view), len(numbers))
    bodies, leaves = list(numbers), list(leaves_of(views, numbers))
    outcomes = outcomes_of(leaves, bodies)
    marks = {leaf.body: i + 1 for i, outcome in enumerate(outcomes) for leaf in outcome.leaves}
    target = report.title.removeprefix("target ")
    return environment.from_string(source).render(
        report=report,
        num_sites=len(views),
        tree=module_tree(leaves),
        bodies=bodies,
        outcomes=outcomes,
        marks=marks,
        code_rows=list(code_rows(views, target)),
        target=target,
        graphs=recorder.graphs,
    )


def rows_of(step: Step) -> tuple[list[Row], int]:
    """The lines that a pass changed, side by side, with two lines around each change.

    Returns:
        The first rows, and the number of rows that are left out.
    """
    left, right = step.lines
    groups = GraphMatcher(left, right).get_grouped_opcodes(_CONTEXT)
    rows: list[Row] = []
    for group in groups:
        rows += [Row("gap", "…", "…")] if rows else []
        rows += chain.from_iterable(_rows(code, left, right) for code in group)
    return rows[:_MOST_ROWS], len(rows[_MOST_ROWS:])


def _rows(code: tuple[str, int, int, int, int], left: list[str], right: list[str]) -> Iterator[Row]:
    kind, i, i_end, j, j_end = code
    for step in range(max(i_end - i, j_end - j)):
        before = left[i + step] if i + step < i_end else ""
        after = right[j + step] if j + step < j_end else ""
        yield Row(kind, before, after)
