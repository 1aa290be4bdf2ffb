"""The change that made a graph wrong: inside one pass, and for torch's `CompilerBisector`.

`find_application` runs a pass again on copies of the graph, each time with fewer changes. torch's
bisector runs a whole program and switches the passes and changes of the backend "fixpass" off.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._inductor.compiler_bisector import BACKENDS, BisectSubsystem, CompilerBisector
from torch.fx.graph import _Namespace

from fixpass.passes.base import Choice, Pass, PassResult

BACKEND = "fixpass"
Check = Callable[[fx.Graph, PassResult], None]
"""Raises where a graph is wrong after a pass."""


def register() -> None:
    """Tell torch's bisector about our backend: it switches single changes off, then passes."""
    BACKENDS.setdefault(BACKEND, [BisectSubsystem("changes"), BisectSubsystem("passes")])


def is_elsewhere() -> bool:
    """Whether torch's bisector compiles with another backend now, which knows no option of ours."""
    return CompilerBisector.bisection_enabled and CompilerBisector.get_backend() != BACKEND


def is_disabled(subsystem: str, pass_name: str) -> bool:
    """Whether torch's bisector has switched this change or pass off; the bisector counts calls."""
    disabled: bool = CompilerBisector.disable_subsystem(BACKEND, subsystem, lambda: pass_name)
    return disabled


def find_application(step: Pass, snapshot: "Snapshot", check: Check) -> str:
    """The first change of `step` that breaks the graph; empty where the pass names no change.

    A pass that asks for fuel is run again with less. Another is stopped at one of its remarks,
    which it writes before or after it makes the change.
    """

    def fails(limit: int | None, stops: str = "") -> tuple[bool, _Limited]:
        result = _Limited(step.name, limit=limit, stops=stops)
        return _fails(step, snapshot.graph(), result, check), result

    whole = fails(None)[1]
    total, stops = whole.asked or whole.made, ""
    if not whole.asked:
        stops = "at" if _changes_first(step, snapshot) or fails(0, "behind")[0] else "behind"
    if not total or fails(0, stops)[0]:
        return ""
    good, bad = 0, total
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if fails(middle, stops)[0] else (middle, bad)
    found = fails(bad, stops)[1].remarks[len(fails(good, stops)[1].remarks) :]
    changes = [remark for remark in found if remark.kind == "applied"]
    shown = f" ({changes[-1].node}: {changes[-1].text})" if changes else ""
    return f"{bad} of {total}{shown}"


class _Enough(Exception):
    """Stops a pass at a change."""


@dataclass
class _Limited(PassResult):
    """A result that allows a number of changes, and counts them."""

    limit: int | None = None
    stops: str = ""
    """"at" the last allowed remark, "behind" it at the next, or never: the pass asks for fuel."""
    asked: int = 0
    made: int = 0

    def take_fuel(self) -> bool:
        self.asked += 1
        return self.limit is None or self.asked <= self.limit

    def applied(
        self, node: fx.Node, text: str, *, bytes_saved: int = 0, choice: Choice | None = None
    ) -> None:
        self.made += 1
        if self.stops == "behind" and self.limit is not None and self.made > self.limit:
            raise _Enough
        super().applied(node, text, bytes_saved=bytes_saved, choice=choice)
        if self.stops == "at" and self.made == self.limit:
            raise _Enough


def _changes_first(step: Pass, snapshot: "Snapshot") -> bool:
    """Whether the pass changes the graph before it reports the change."""
    graph = snapshot.graph()
    before = str(graph)
    _fails(step, graph, _Limited(step.name, limit=0, stops="behind"), lambda *_: None)
    return str(graph) != before


def _fails(step: Pass, graph: fx.Graph, result: _Limited, check: Check) -> bool:
    if result.stops == "at" and result.limit == 0:
        return False
    try:
        with suppress(_Enough):
            step.run(graph, result)
        check(graph, result)
    # A fault of the pass, of any kind.
    except (Exception, SystemExit):
        return True
    return False


@dataclass(frozen=True)
class Snapshot:
    """A copy of a graph's nodes, their metadata and its result."""

    copy: fx.Graph
    result: Any
    output_meta: dict[str, Any]

    @staticmethod
    def of(graph: fx.Graph) -> "Snapshot":
        copy = fx.Graph(graph.owning_module)
        result = copy.graph_copy(graph, {})
        return Snapshot(copy, result, dict(graph.output_node().meta))

    def graph(self) -> fx.Graph:
        """A new graph like the one that was copied."""
        graph = fx.Graph(self.copy.owning_module)
        self._fill(graph)
        return graph

    def restore(self, graph: fx.Graph) -> None:
        """Make `graph` what it was, with new node objects under the old names."""
        for node in reversed(graph.nodes):
            node.replace_all_uses_with(None) if node.users else None
            graph.erase_node(node)
        graph._graph_namespace = _Namespace()
        self._fill(graph)

    def _fill(self, graph: fx.Graph) -> None:
        values: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.copy, values)
        output = graph.output(fx.node.map_arg(self.result, lambda n: values[n]))
        output.meta.update(self.output_meta)
