"""What must hold after every pass: a well-formed graph whose recorded values are the true ones.

Each node is run again on fake tensors and must give the dtype, shape, device and strides that
`meta["val"]` records; the stride of a size-1 dimension does not count. Nothing is computed and no
guard is added. Numerics are compared by tests, not here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fixpass.lowering.layout import Layout, all_known, known
from fixpass.passes.printer import format_value
from fixpass.runtime.errors import PassError


def find_faults(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Each node whose recorded value is not what its operation gives, and what is wrong."""
    mode = _fake_mode(graph)
    if mode is None:
        return
    with mode, _frozen(mode.shape_env):
        for node in graph.nodes:
            if not _can_run(node):
                continue
            args, kwargs = pytree.tree_map_only(
                fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs)
            )
            got = node.target(*args, **kwargs)
            if not _same(got, node.meta["val"]):
                recorded = format_value(node.meta["val"])
                yield node, f"records {recorded} but gives {format_value(got)}"


def verify(
    graph: fx.Graph,
    pass_name: str,
    excused: frozenset[str] = frozenset(),
    results: Sequence[Any] | None = None,
) -> None:
    """Raise PassError naming the pass and the node unless the graph holds.

    excused: names of nodes that need not hold. results: what the graph recorded for its results
    before the pass; they may not change.
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
    found = results_of(graph)
    if results is not None and not _same(found, results):
        raise PassError(
            f"{pass_name} changed the results from {format_value(results)} to {format_value(found)}"
        )


def faulty_nodes(graph: fx.Graph) -> frozenset[str]:
    """Names of nodes that did not hold before any pass ran: they are not our passes' fault."""
    lacking = {node.name for node in graph.nodes if _lacks_value(node)}
    return frozenset(lacking | {node.name for node, _ in find_faults(graph)})


def results_of(graph: fx.Graph) -> list[Any]:
    """What the graph records for its results, in order."""
    leaves = pytree.tree_leaves(graph.output_node().args[0])
    return [leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in leaves]


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
