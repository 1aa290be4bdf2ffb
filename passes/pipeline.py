"""Run passes in order, check the graph after each, and name them all in a cache key.

A pass that is not ours is run on a graph that can be restored, and is always checked: when it
raises or breaks the graph, the graph goes on without it and the report says so. With `strict`
that is an error. The pipeline holds no state between runs.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fixpass.lowering.contract_table import rows_of
from fixpass.passes.base import Pass, PassResult, Remark
from fixpass.passes.bisect import Snapshot, find_application, is_disabled
from fixpass.passes.cache_key import UnnamedError, key_of, pass_key
from fixpass.passes.remarks import Report
from fixpass.passes.values import GraphValues
from fixpass.passes.verify import Interface, faulty_nodes, verify
from fixpass.runtime.errors import PassError
from fixpass.runtime.providers import asked_once

log = logging.getLogger("fixpass")
Verify = bool | Literal["values"]
SLOW = 3.0
"""Seconds after which a pass that still runs is named in the log, and again at twice the time."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    verify: check the graph after every pass, not only after third parties' (fake tensors again).
    "values" also runs the graph on random inputs and compares numbers.
    strict: raise PassError where a pass fails, instead of going on without it.
    fuel: stop changing the graph after this many changes; None means no limit.
    """

    passes: tuple[Pass, ...]
    verify: Verify = False
    strict: bool = False
    fuel: int | None = None

    @asked_once()
    def run(self, graph: fx.Graph, title: str = "") -> Report:
        """Rewrite `graph` in place and return what was done."""
        take_fuel = _tank(self.fuel)
        checked = [step for step in self.passes if self.verify or not is_ours(step)]
        excused = faulty_nodes(graph) if checked else frozenset()
        remarks: list[Remark] = []
        values = self._values_of(graph, remarks)
        with _named_while_running() as running:
            for step in self.passes:
                if is_disabled("passes", step.name):
                    continue
                running(step.name)
                result = PassResult(step.name, fuel=partial(take_fuel, step.name))
                if step in checked:
                    self._run_guarded(step, graph, result, excused, values)
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
            keys += [key_of(c) for c in constraints if not is_ours(c)]
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

    def _values_of(self, graph: fx.Graph, remarks: list[Remark]) -> GraphValues | None:
        """What the graph computes, under verify="values"."""
        if self.verify != "values":
            return None
        try:
            return GraphValues.of(graph)
        except PassError as error:
            remarks.append(Remark("verify", "missed", "graph", f"values not compared: {error}"))
            return None

    def _run_guarded(
        self,
        step: Pass,
        graph: fx.Graph,
        result: PassResult,
        excused: frozenset[str],
        values: GraphValues | None,
    ) -> None:
        snapshot, before = Snapshot.of(graph), Interface.of(graph)

        def check(graph: fx.Graph, result: PassResult) -> None:
            _check_remarks(result)
            verify(graph, step.name, excused, before)
            if values is not None:
                values.check(graph, step.name)

        try:
            step.run(graph, result)
            check(graph, result)
        # Any error is the pass's: this is the boundary where third parties' code is called. A
        # pass that calls `sys.exit` may not end the process either.
        except (Exception, SystemExit) as error:
            why = str(error) if isinstance(error, PassError) else f"{type(error).__name__}: {error}"
            if application := find_application(step, snapshot, check):
                why = f"{why}; the first wrong change is {application}"
            if self.strict:
                raise PassError(f"pass {step.name}: {why}") from error
            snapshot.restore(graph)
            result.changed = False
            result.remarks = [Remark(step.name, "failed", "graph", f"left out: {why}")]


def _check_remarks(result: PassResult) -> None:
    """Raise PassError where a pass replaced the list of its remarks by something else."""
    remarks: Any = result.remarks
    if not isinstance(remarks, list) or not all(isinstance(r, Remark) for r in remarks):
        raise PassError(f"{result.pass_name} left result.remarks that is no list of Remark")


@contextmanager
def _named_while_running() -> Iterator[Callable[[str], None]]:
    """Log the name of a pass that runs for long, while it runs."""
    done, started = Event(), ("", monotonic())

    def watch() -> None:
        name, limit = "", SLOW
        while not done.wait(min(limit, SLOW)):
            current, since = started
            if name != current:
                name, limit = current, SLOW
            if (seconds := monotonic() - since) >= limit:
                log.warning("%s has been running for %.0f s", name, seconds)
                limit = 2 * seconds

    def running(name: str) -> None:
        nonlocal started
        started = name, monotonic()

    thread = Thread(target=watch, name="fixpass-slow-passes", daemon=True)
    thread.start()
    try:
        yield running
    finally:
        done.set()
        thread.join()


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


def is_ours(value: object) -> bool:
    """Whether a pass, or a constraint, is of a class of fixpass."""
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


def _tank(fuel: int | None) -> Callable[[str], bool]:
    """Whether a pass may make one more change; torch's bisector may decide it too."""
    left = count() if fuel is None else iter(range(fuel))

    def take(pass_name: str) -> bool:
        return not is_disabled("changes", pass_name) and next(left, None) is not None

    return take
