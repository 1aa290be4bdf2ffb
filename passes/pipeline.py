"""Run passes in order, check the graph after each, and name them all in a cache key.

A pass that is not ours is run on a graph that can be restored, and is always checked: when it
raises or breaks the graph, the graph goes on without it and the report says so. With `strict`
that is an error. The pipeline holds no state between runs.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _Namespace
from torch.utils import _pytree as pytree

from fixpass.lowering.contract_table import rows_of
from fixpass.passes.base import Pass, PassResult, Remark
from fixpass.passes.cache_key import UnnamedError, key_of, pass_key
from fixpass.passes.report import Report
from fixpass.passes.verify import faulty_nodes, results_of, verify
from fixpass.runtime.errors import PassError
from fixpass.runtime.providers import asked_once


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    verify: check the graph after every pass, not only after third parties' (fake tensors again).
    strict: raise PassError where a pass fails, instead of going on without it.
    fuel: stop changing the graph after this many changes; None means no limit.
    """

    passes: tuple[Pass, ...]
    verify: bool = False
    strict: bool = False
    fuel: int | None = None

    @asked_once()
    def run(self, graph: fx.Graph, title: str = "") -> Report:
        """Rewrite `graph` in place and return what was done."""
        take_fuel = _tank(self.fuel)
        checked = [step for step in self.passes if self.verify or not is_ours(step)]
        excused = faulty_nodes(graph) if checked else frozenset()
        remarks: list[Remark] = []
        for step in self.passes:
            result = PassResult(step.name, fuel=take_fuel)
            if step in checked:
                self._run_guarded(step, graph, result, excused)
                _report_unnamed(step, result)
            else:
                self._run_trusted(step, graph, result)
            remarks += result.remarks
        record_inputs(graph)
        return Report(tuple(remarks), title)

    def uuid(self) -> str | None:
        """A key that changes with the passes, their options, their source and what they call.

        None where a pass cannot be named completely: no graph that it rewrote may be cached. The
        report then names the pass.
        """
        with asked_once():
            rows = [row for row in rows_of() if row.is_installed]
        constraints = (c for row in rows for c in row.contract.constraints)
        try:
            keys = [repr(step) if is_ours(step) else pass_key(step) for step in self.passes]
            keys += [key_of(c) for c in constraints if not _is_of_fixpass(c)]
        except UnnamedError:
            return None
        facts = (keys, rows, self.fuel, self.strict, torch.__version__)
        return hashlib.sha256(f"{source_hash()}{facts!r}".encode()).hexdigest()

    def _run_trusted(self, step: Pass, graph: fx.Graph, result: PassResult) -> None:
        """Run a pass of ours, which leaves the graph whole where it raises: what it did stays."""
        try:
            step.run(graph, result)
        # A model must compile whatever our passes have not foreseen in it.
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            if self.strict:
                raise PassError(f"pass {step.name}: {why}") from error
            result.remarks.append(Remark(step.name, "failed", "graph", f"stopped: {why}"))

    def _run_guarded(
        self, step: Pass, graph: fx.Graph, result: PassResult, excused: frozenset[str]
    ) -> None:
        snapshot, results = Snapshot.of(graph), results_of(graph)
        try:
            step.run(graph, result)
            verify(graph, step.name, excused, results)
        # Any error is the pass's: this is the boundary where third parties' code is called.
        except Exception as error:
            why = str(error) if isinstance(error, PassError) else f"{type(error).__name__}: {error}"
            if self.strict:
                raise PassError(f"pass {step.name}: {why}") from error
            snapshot.restore(graph)
            result.changed = False
            result.remarks[:] = [Remark(step.name, "failed", "graph", f"left out: {why}")]


def record_inputs(graph: fx.Graph) -> None:
    """Let Inductor hand exactly the recorded strides to every op that is tagged to need them.

    Inductor keeps exact strides for a node whose metadata holds the values of its inputs. Nodes
    that a pass makes have none, and those of nodes whose inputs a pass replaced are out of date.
    """
    for node in graph.nodes:
        op = node.target
        if isinstance(op, torch._ops.OpOverload) and _needs_exact_strides(op):
            inputs = node.all_input_nodes
            if all("val" in source.meta for source in inputs):
                node.meta["eager_input_vals"] = pytree.tree_map_only(
                    fx.Node, lambda source: source.meta["val"], (node.args, node.kwargs)
                )


@cache
def _needs_exact_strides(op: torch._ops.OpOverload) -> bool:
    return torch.Tag.needs_exact_strides in op.tags


def is_ours(step: Pass) -> bool:
    return _is_of_fixpass(step)


def _is_of_fixpass(value: object) -> bool:
    return type(value).__module__.startswith("fixpass.")


def _report_unnamed(step: Pass, result: PassResult) -> None:
    """Say that no graph which a third party's pass rewrites is cached, and the way out."""
    try:
        if not is_ours(step):
            pass_key(step)
    except UnnamedError as error:
        why = f"not cached, because no key can hold {error}: give the pass a `cache_key` method"
        result.remarks.append(Remark(step.name, "missed", "graph", why))


def source_files() -> Iterator[Path]:
    """Every source file of the layers that compiled graphs depend on."""
    import fixpass.lowering
    import fixpass.passes
    import fixpass.runtime

    for package in (fixpass.passes, fixpass.lowering, fixpass.runtime):
        yield from sorted(Path(package.__path__[0]).rglob("*.py"))


@cache
def source_hash() -> str:
    """The hash of our sources, computed once a process."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _tank(fuel: int | None) -> Callable[[], bool]:
    if fuel is None:
        return lambda: True
    left = iter(range(fuel))
    return lambda: next(left, None) is not None


@dataclass(frozen=True)
class Snapshot:
    """A copy of a graph's nodes, their metadata and its result."""

    copy: fx.Graph
    result: Any
    output_meta: dict[str, Any]

    @staticmethod
    def of(graph: fx.Graph) -> "Snapshot":
        copy = fx.Graph()
        result = copy.graph_copy(graph, {})
        return Snapshot(copy, result, dict(graph.output_node().meta))

    def restore(self, graph: fx.Graph) -> None:
        """Make `graph` what it was, with new node objects under the old names."""
        for node in reversed(graph.nodes):
            node.replace_all_uses_with(None) if node.users else None
            graph.erase_node(node)
        graph._graph_namespace = _Namespace()
        values: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.copy, values)
        output = graph.output(fx.node.map_arg(self.result, lambda n: values[n]))
        output.meta.update(self.output_meta)
