"""The cost of the passes a node, on graphs of 1k to 100k nodes, beside `register_replacement`.

Every sample rewrites as many nodes, in one large graph or in many small ones, so that the garbage
collector's pauses fall on all sizes alike; its share is in the table. CPU seconds. The graphs are
synthetic: see `benchmarks.graphs`.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import fx

from benchmarks.graphs import NODES_A_NORM, build_graph
from benchmarks.register_replacement import make_pass, owned
from benchmarks.results import Check, Result, ratios, spread
from fixpass.aot_eager import copy_graph
from fixpass.lowering.target import CPU
from fixpass.passes import default_passes
from fixpass.passes.base import PassResult

ABOUT = (
    "CPU microseconds a node that the default passes take on synthetic graphs, one norm in each "
    f"{NODES_A_NORM} nodes, and how much longer `register_replacement` takes for the same norms."
)
FIRST = "canonicalize-norms"


@dataclass
class Cost:
    """CPU seconds a node: of each pass, of all, and of the garbage collector within them."""

    passes: dict[str, float] = field(default_factory=dict)
    collector: float = 0.0

    @property
    def all(self) -> float:
        return sum(self.passes.values())


def run(quick: bool) -> Result:
    sizes = (1_000, 2_000, 8_000) if quick else (1_000, 10_000, 50_000, 100_000)
    compared = sizes[0] if quick else 10_000
    repeats = 3 if quick else 7
    costs, result = _scaling(sizes, repeats), Result("matching", ABOUT, quick=quick)
    for size in sizes:
        row = {name: spread([cost.passes[name] for cost in costs[size]]) for name in _names()}
        row["all passes"] = spread([cost.all for cost in costs[size]])
        row["of it, garbage collection"] = spread([cost.collector for cost in costs[size]])
        result.rows.append(
            {"graph": f"{size:,} nodes", **{k: v.scaled(1e6) for k, v in row.items()}}
        )
    # What is traced once a graph weighs most in the smallest, so the next size is a base too.
    for base in sizes[:2]:
        small, large = ([cost.all for cost in costs[size]] for size in (base, sizes[-1]))
        claim = f"cost a node at {sizes[-1]:,} nodes over that at {base:,}"
        result.checks.append(Check(claim, ratios(large, small).median, 1.5))
    for dynamic in (False, True):
        _compare(result, compared, 2 if quick else 3, dynamic)
    return result


def _scaling(sizes: Sequence[int], repeats: int) -> dict[int, list[Cost]]:
    """For each size one cost a repeat; every repeat goes through all sizes."""
    graphs = {size: build_graph(size) for size in sizes}
    costs: dict[int, list[Cost]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            copies = [copy_graph(graphs[size]) for _ in range(sizes[-1] // size)]
            costs[size].append(_time_passes(copies))
    return costs


def _time_passes(graphs: Sequence[fx.Graph]) -> Cost:
    """The cost of the default passes on these graphs, which they rewrite."""
    nodes = sum(len(graph.nodes) for graph in graphs)
    seconds = dict.fromkeys(_names(), 0.0)
    gc.collect()
    with _collector_time() as pauses:
        for graph in graphs:
            for step in default_passes(CPU):
                start = time.process_time()
                step.run(graph, PassResult(step.name))
                seconds[step.name] += time.process_time() - start
    return Cost({name: spent / nodes for name, spent in seconds.items()}, sum(pauses) / nodes)


def _compare(result: Result, size: int, repeats: int, dynamic: bool) -> None:
    """Add the ratios of `register_replacement` over ours, on graphs of one size."""
    graph, patterns = build_graph(size, dynamic=dynamic), make_pass()
    theirs: list[float] = []
    ours: list[Cost] = []
    for _ in range(repeats):
        target = owned(copy_graph(graph))
        gc.collect()
        start = time.process_time()
        matches = patterns.apply(target)
        theirs.append((time.process_time() - start) / len(graph.nodes))
        assert matches == size // NODES_A_NORM, f"{matches} matches"
        _assert_same_norms(target, graph)
        ours.append(_time_passes([copy_graph(graph)]))
    rows = "symbolic" if dynamic else "static"
    each = spread(theirs).scaled(NODES_A_NORM * 1e3)
    where = f"{size:,} nodes, {rows} rows, register_replacement taking {each} ms a norm"
    for name, bound, spent in (
        (FIRST, 100, [cost.passes[FIRST] for cost in ours]),
        ("all default passes", 30, [cost.all for cost in ours]),
    ):
        claim = f"{name}, how many times faster than register_replacement ({where})"
        result.checks.append(Check(claim, ratios(theirs, spent).median, bound, at_least=True))


def _assert_same_norms(rewritten: fx.Graph, original: fx.Graph) -> None:
    """Both ways make the same norm ops, or the comparison would not be one."""
    graph = copy_graph(original)
    default_passes(CPU)[0].run(graph, PassResult(FIRST))
    for op in (torch.ops.fixpass.rms_norm.default, torch.ops.fixpass.add_rms_norm.default):
        counts = [len(g.find_nodes(op="call_function", target=op)) for g in (rewritten, graph)]
        assert counts[0] == counts[1], f"{op}: {counts}"


def _names() -> list[str]:
    return [step.name for step in default_passes(CPU)]


@contextmanager
def _collector_time() -> Iterator[list[float]]:
    """CPU seconds of each collection in the block."""
    pauses: list[float] = []
    started = 0.0

    def note(phase: str, _: dict[str, int]) -> None:
        nonlocal started
        if phase == "start":
            started = time.process_time()
        else:
            pauses.append(time.process_time() - started)

    gc.callbacks.append(note)
    try:
        yield pauses
    finally:
        gc.callbacks.remove(note)
