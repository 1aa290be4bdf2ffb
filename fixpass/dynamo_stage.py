"""Dynamo's graph before it is compiled, and the inputs of each call afterwards.

`specialize_eps` makes the eps of a norm a constant. `run_entry_passes` runs the entry passes, which
may add inputs for folded weights: `EntryGraph.bind_inputs` passes their values at each call. Dynamo
reads its own graph after the compile, so a graph that gets new inputs is copied first.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import CompileId
from torch.nn import functional

from fixpass.config import Config
from fixpass.passes.fold_weights import FoldWeights
from fixpass.passes.fold_weights.apply import folds_of, stored_anew
from fixpass.passes.fold_weights.constant_values import candidates_in
from fixpass.passes.fold_weights.graph_weights import weights_of
from fixpass.passes.remarks import Report
from fixpass.pipelines import entry_pipeline
from fixpass.runtime.opaque_norms import OPAQUE_NORMS
from fixpass.runtime.providers import op_exists
from fixpass.runtime.weights.lock import COMPILED
from fixpass.runtime.weights.weight_cache import CachedWeight

_SOURCE = "_dynamo_source"
_NORMS = (functional.rms_norm, functional.layer_norm, torch.rms_norm, torch.layer_norm)
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ROOTS = (torch.rsqrt, torch.sqrt, torch.pow, operator.pow, "rsqrt", "sqrt", "pow")


@dataclass(frozen=True)
class EntryGraph:
    """Dynamo's graph after the entry passes, as the compiler gets it."""

    gm: fx.GraphModule
    inputs: list[Any]
    """Example inputs: Dynamo's, then one for each folded value."""
    report: Report
    folds: tuple[CachedWeight, ...] = ()
    """The folded values, in the order of the last inputs."""
    is_copy: bool = False
    """The graph is a copy that Dynamo does not know."""
    reads_weights: bool = False
    """A call reads weights, so no update of weights may commit during it."""

    def retrace_if_restrided(self) -> None:
        """Have Dynamo trace again if a pass gave weights other strides than Dynamo saw."""
        if names := stored_anew(self.gm.graph):
            raise TensorifyScalarRestartAnalysis(
                restart_reason=f"fixpass stored weights in another order: {', '.join(names)}"
            )

    def bind_inputs(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap compiled code so that Dynamo calls it with the inputs that Dynamo knows."""
        if self.is_copy:
            # Dynamo clears its own graph in the same way. Compiled code keeps the module, and its
            # metadata holds weak references to parameters, which `swap_tensors` refuses.
            for node in self.gm.graph.nodes:
                node.meta.clear()
        if not self.reads_weights:
            return compiled
        values = [fold.value for fold in self.folds]

        def call(*args: Any) -> Any:
            with COMPILED.read_lock():
                return compiled(*args, *[value(args) for value in values])

        return call


def run_entry_passes(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    title: str = "",
    *,
    may_restride: bool = False,
) -> EntryGraph:
    """Run the entry passes on one of Dynamo's graphs.

    Args:
        gm: the graph that Dynamo traced.
        example_inputs: the inputs that Dynamo traced with.
        config: the options.
        title: the title of the report.
        may_restride: fold_weights="restride" may change the strides of weights. The caller must
            call `EntryGraph.retrace_if_restrided` then.
    """
    may_restride = may_restride and _is_first_compile(gm)
    pipeline = entry_pipeline(config, may_restride=may_restride)
    folds_any = any(isinstance(p, FoldWeights) and p.mode != "off" for p in pipeline.passes)
    weights = weights_of(gm.graph)
    is_copy = folds_any and candidates_in(gm.graph, weights)
    if is_copy:
        gm = _copy_module(gm)
    report = pipeline.run(gm.graph, title)
    if report.of_kind("applied"):
        gm.recompile()
    found = folds_of(gm.graph)
    folds, values = tuple(fold for fold, _ in found), [value for _, value in found]
    placeholders = gm.graph.find_nodes(op="placeholder")
    _describe_inputs(placeholders[len(example_inputs) :], values)
    return EntryGraph(gm, [*example_inputs, *values], report, folds, is_copy, bool(weights))


def specialize_eps(graph: fx.Graph) -> None:
    """Have Dynamo trace again with the eps of each norm as a guarded constant; else do nothing.

    With `dynamic=True` a float that a module keeps, such as `self.variance_epsilon`, becomes a
    symbol and then a tensor, so no rewrite and no kernel knows its value. Inductor asks for floats
    that it cannot carry in the same way. Other floats keep what Dynamo decided.

    Raises:
        TensorifyScalarRestartAnalysis: Dynamo's own request to trace again.
    """
    norms = (*_NORMS, *_opaque_norms())
    floats = list(_symbolic_floats(graph))
    wanted = {name for node, name in floats if _is_eps(node, norms)}
    wanted = {name for name in wanted if not TensorifyState.should_specialize(name)}
    if not wanted:
        return
    # Inductor would ask for these floats later, which would cost one more trace.
    wanted |= {name for node, name in floats if _is_fixed_by_inductor(node)}
    for name in sorted(wanted):
        TensorifyState.specialize(name)
    raise TensorifyScalarRestartAnalysis(restart_reason="fixpass needs the value of a norm's eps")


def _is_first_compile(gm: fx.GraphModule) -> bool:
    """Whether Dynamo compiles this code for the first time.

    A later compile may not change weights: they may belong to another module with the same code,
    or have been replaced, and each change of strides would compile again.
    """
    found = gm.meta.get("dynamo_compile_id")
    return isinstance(found, CompileId) and found.frame_compile_id == 0


def _copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """The module with a copy of its graph, and with everything that Dynamo recorded on it."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copied)
    output = graph.output(result)
    output.meta = dict(gm.graph.output_node().meta)
    for old in gm.graph.find_nodes(op="placeholder"):
        setattr(copied[old], _SOURCE, vars(old).get(_SOURCE))
    module = fx.GraphModule(gm, graph, type(gm).__name__)
    for name, item in vars(gm).items():
        vars(module).setdefault(name, item)
    module.meta.update(gm.meta)
    return module


def _describe_inputs(nodes: Sequence[fx.Node], values: Sequence[torch.Tensor]) -> None:
    """Record on new inputs what Dynamo records on its own, for AOTAutograd."""
    context = torch._guards.TracingContext.try_get()
    for node, value in zip(nodes, values, strict=True):
        # Dynamo has no name for the place where this value comes from.
        setattr(node, _SOURCE, None)
        if context is not None and context.fake_mode is not None:
            # A folded value has one shape, as its weights have, so it gets no symbols. The fake
            # mode finds this fake tensor again as long as the node lives.
            node.meta["example_value"] = context.fake_mode.from_tensor(value, static_shapes=True)


def _symbolic_floats(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Each float input of the graph as the node that reads it, and its symbol."""
    for node in graph.find_nodes(op="call_method", target="item"):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymFloat) and value.node._expr.is_Symbol:
            yield node, value.node._expr.name


def _is_eps(value: fx.Node, norms: tuple[object, ...]) -> bool:
    if any(user.target in norms for user in value.users):
        return True
    sums = (user for user in value.users if user.target in _ADDS)
    return any(user.target in _ROOTS for total in sums for user in total.users)


def _is_fixed_by_inductor(value: fx.Node) -> bool:
    """Whether the float is a constant by now, or `norm_type`, which no embedding computes with."""
    if value.meta["example_value"].node.expr.is_number:
        return True
    return all(user.target is functional.embedding for user in value.users)


def _opaque_norms() -> Iterator[object]:
    """The norm ops of other libraries that exist here, as Dynamo's graph calls them."""
    for row in OPAQUE_NORMS:
        if op_exists(row.name):
            yield from (row.overload, row.overload.overloadpacket)
