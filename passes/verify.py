"""Checks a graph after a pass: it is well-formed, and each recorded value is the true one.

Each node is run again on fake tensors and must give the dtype, shape, device and strides that
`meta["val"]` records; the stride of a size-1 dimension does not count. Nothing is computed and no
guard is added. The `Interface` that the caller of the graph sees must not change. `values.py`
compares numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fixpass.lowering.layout import Layout, all_known, known
from fixpass.passes.printer import format_value
from fixpass.runtime.errors import PassError


@dataclass(frozen=True)
class Interface:
    """What the caller of a graph sees of it. No pass may change it."""

    inputs: tuple[str, ...]
    results: list[Any]
    """What the graph records for its results, in order."""
    written: frozenset[str]
    """The inputs that the graph writes into."""
    read_late: frozenset[str]
    """The inputs that a node reads behind a write into them."""
    shared: tuple[str, ...]
    """For each result the input whose memory it shares, or ""."""

    @staticmethod
    def of(graph: fx.Graph) -> "Interface":
        inputs = tuple(str(node.target) for node in graph.find_nodes(op="placeholder"))
        leaves = pytree.tree_leaves(graph.output_node().args[0])
        values = [leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        mode = _fake_mode(graph)
        if mode is None:
            return Interface(inputs, values, frozenset(), frozenset(), ("",) * len(leaves))
        with mode, _frozen(mode.shape_env):
            written, read_late = _writes(graph)
            shared = tuple(_input_of(leaf) for leaf in leaves)
        return Interface(inputs, values, written, read_late, shared)

    def fault_of(self, other: "Interface") -> str:
        """The difference between this interface and `other`, or ""."""
        if self.inputs != other.inputs:
            return (
                f"changed the inputs from ({', '.join(self.inputs)}) to ({', '.join(other.inputs)})"
            )
        if not _same(other.results, self.results):
            before, after = format_value(self.results), format_value(other.results)
            return f"changed the results from {before} to {after}"
        for name in sorted(self.written ^ other.written):
            verb = "dropped the write" if name in self.written else "added a write"
            return f"{verb} into input {name}"
        for name in sorted(other.read_late - self.read_late):
            return f"moved a write into input {name} in front of a node that reads the input"
        for i, (before, after) in enumerate(zip(self.shared, other.shared, strict=True)):
            if after and after != before:
                return f"let result {i} share the memory of input {after}; it needs a clone"
        return ""


def find_faults(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """The nodes whose recorded value is not the result of their operation, each with the fault."""
    mode = _fake_mode(graph)
    if mode is None:
        return
    with mode, _frozen(mode.shape_env):
        for node in graph.nodes:
            if not _can_run(node):
                continue
            try:
                got = _run(node)
            except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
                yield node, f"raises {type(error).__name__}: {error}"
                continue
            if not _same(got, node.meta["val"]):
                recorded = format_value(node.meta["val"])
                yield node, f"records {recorded} but gives {format_value(got)}"


def verify(
    graph: fx.Graph,
    pass_name: str,
    excused: frozenset[str] = frozenset(),
    before: Interface | None = None,
) -> None:
    """Raise PassError naming the pass and the node unless the graph holds.

    excused: names of nodes that need not hold. before: the graph's interface before the pass.
    """
    try:
        graph.lint()
    except (AssertionError, RuntimeError, NameError) as error:
        raise PassError(f"{pass_name} left a malformed graph: {error}") from error
    for node in graph.nodes:
        if _lacks_value(node) and node.name not in excused:
            raise PassError(
                f"{pass_name} left {node.name} ({node.target}) without a recorded value"
            )
    for node, fault in find_faults(graph):
        if node.name not in excused:
            raise PassError(f"{pass_name} left {node.name} ({node.target}), which {fault}")
    if before is not None and (fault := before.fault_of(Interface.of(graph))):
        raise PassError(f"{pass_name} {fault}")


def faulty_nodes(graph: fx.Graph) -> frozenset[str]:
    """Names of nodes that did not hold before any pass ran: they are not our passes' fault."""
    lacking = {node.name for node in graph.nodes if _lacks_value(node)}
    return frozenset(lacking | {node.name for node, _ in find_faults(graph)})


def _writes(graph: fx.Graph) -> tuple[frozenset[str], frozenset[str]]:
    """The inputs that the graph writes into, and those that a node reads behind such a write."""
    written: set[str] = set()
    read_late: set[str] = set()
    for node in graph.nodes:
        if written and node.op != "output":
            sources = (n for n in node.all_input_nodes if n not in _written_by(node))
            read_late |= written & {_input_of(source) for source in sources}
        written |= {name for n in _written_by(node) if (name := _input_of(n))}
    return frozenset(written), frozenset(read_late)


def _written_by(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes whose memory `node` writes into."""
    found = (a for p, a in _arguments(node) if p.alias_info and p.alias_info.is_write)
    return tuple(n for given in found for n in pytree.tree_leaves(given) if isinstance(n, fx.Node))


def _arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Each parameter of the op that `node` calls, with the argument that the node gives."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for i, parameter in enumerate(node.target._schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(parameter.name)
        yield parameter, given


def _input_of(node: Any) -> str:
    """The input whose memory a value is, or ""."""
    while isinstance(node, fx.Node) and node.op != "placeholder":
        node = _viewed(node)
    return str(node.target) if isinstance(node, fx.Node) else ""


def _viewed(node: fx.Node) -> Any:
    """The node whose memory `node` is a view of, or None."""
    if node.target is getitem:
        return node.args[0]
    for parameter, given in _arguments(node):
        if parameter.alias_info and isinstance(given, fx.Node):
            # `reshape` copies where no view is possible.
            return given if not _can_run(node) or _shares(_run(node), given.meta["val"]) else None
    return None


def _shares(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _run(node: fx.Node) -> Any:
    """The result of `node` for the recorded values of its inputs."""
    target: Any = node.target
    args, kwargs = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    return target(*args, **kwargs)


def _lacks_value(node: fx.Node) -> bool:
    """Whether the node calls an op that has a result, and records none."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or "val" in node.meta:
        return False
    return bool(op._schema.returns)


def _can_run(node: fx.Node) -> bool:
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or "val" not in node.meta:
        return False
    if op._schema.is_mutable:
        return False
    # A fresh unbacked symbol at each run could never be equal to the recorded one.
    if torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags:
        return False
    return all("val" in source.meta for source in node.all_input_nodes)


def _same(got: Any, recorded: Any) -> bool:
    if isinstance(recorded, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(recorded):
            return False
        return all(_same(a, b) for a, b in zip(got, recorded, strict=True))
    if not isinstance(recorded, torch.Tensor):
        return recorded is None or known(got == recorded) is not False
    if not isinstance(got, torch.Tensor):
        return False
    if (got.dtype, got.device, got.dim()) != (recorded.dtype, recorded.device, recorded.dim()):
        return False
    if got.layout != torch.strided or recorded.layout != torch.strided:
        return got.layout == recorded.layout
    sizes = all_known(known(a == b) for a, b in zip(got.shape, recorded.shape, strict=True))
    return sizes is True and Layout.of(recorded).has_stride(got.stride()) is True


def _fake_mode(graph: fx.Graph) -> Any:
    for node in graph.nodes:
        for val in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(val, torch._subclasses.FakeTensor):
                return val.fake_mode
    return None


@contextmanager
def _frozen(shape_env: ShapeEnv | None) -> Iterator[None]:
    """Let no guard and no symbol of the runs below reach the shape environment."""
    if shape_env is None:
        yield
        return
    with shape_env.suppress_guards(), shape_env.ignore_fresh_unbacked_symbols():
        yield
