"""The graphs that passes make, recorded while a model is explained.

`Recorder.watch` puts an observer in front of each pass and behind the last one. Observers change
nothing; a compile has none.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import ClassVar

from torch import fx

from fixpass.passes.base import Pass, PassResult
from fixpass.passes.pipeline import Pipeline
from fixpass.passes.printer import format_graph
from fixpass.passes.select_norm_kernel import SelectNormKernel
from fixpass.report.graph_diff import GraphMatcher
from fixpass.report.sites import RecordSites, SiteFacts

_COLUMNS = re.compile(r"(?<=\S) {2,}")


@dataclass(frozen=True)
class Moment:
    """A graph between two passes."""

    text: str
    started: float
    ended: float
    """The observer's own time is no part of a pass's time. Both in seconds."""


@dataclass(frozen=True)
class Step:
    """One pass over one graph."""

    pass_name: str
    before: str
    after: str
    milliseconds: float

    @property
    def lines(self) -> tuple[list[str], list[str]]:
        """The lines before and after, without the columns, which move with the longest line."""
        left, right = (_COLUMNS.sub("  ", text).splitlines() for text in (self.before, self.after))
        return left, right

    @property
    def diff(self) -> str:
        """The lines that the pass changed, as a diff; empty where it changed none."""
        return "\n".join(GraphMatcher(*self.lines).text(context=1))


@dataclass
class GraphRecord:
    """One ATen graph on its way through the passes."""

    stage: str
    passes: tuple[str, ...]
    moments: list[Moment] = field(default_factory=list)

    @property
    def steps(self) -> Iterator[Step]:
        pairs = zip(self.moments, self.moments[1:], strict=False)
        for name, (left, right) in zip(self.passes, pairs, strict=False):
            yield Step(name, left.text, right.text, 1e3 * (right.started - left.ended))


@dataclass
class Recorder:
    """The graphs of one explained model, in the order in which they were traced."""

    graphs: list[GraphRecord] = field(default_factory=list)
    sites: list[SiteFacts] = field(default_factory=list)

    def watch(self, pipeline: Pipeline, stage: str) -> Pipeline:
        """The pipeline with an observer around each pass, which writes into a new record."""
        record = GraphRecord(stage, tuple(step.name for step in pipeline.passes))
        self.graphs.append(record)
        watched: list[Pass] = []
        for step in pipeline.passes:
            if isinstance(step, SelectNormKernel):
                watched.append(RecordSites(step.target, self.sites))
            watched += [Observe(record), step]
        return replace(pipeline, passes=(*watched, Observe(record)))

    def diffs(self, pass_names: tuple[str, ...] = ()) -> str:
        """What each pass changed, as text.

        Args:
            pass_names: the passes to show; empty shows all.
        """
        blocks = [
            f"{step.pass_name} ({graph.stage} graph, {step.milliseconds:.1f} ms)\n{step.diff}\n"
            for graph in self.graphs
            for step in graph.steps
            if step.diff and (not pass_names or step.pass_name in pass_names)
        ]
        return "\n".join(blocks) or "no pass changed a graph\n"


@dataclass(frozen=True)
class Observe(Pass):
    """Writes down the graph; changes nothing."""

    name: ClassVar[str] = "observe"

    record: GraphRecord

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        started = perf_counter()
        text = format_graph(graph)
        self.record.moments.append(Moment(text, started, perf_counter()))
