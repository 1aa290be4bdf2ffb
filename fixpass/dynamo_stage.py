"""What happens to one of Dynamo's graphs before it is compiled, and around each of its calls.

The entry passes may add inputs that stand for values kept beside the graph: `Entry` has the graph
with them, the example inputs with them, and `bind`, which passes their values at each call. Dynamo
goes on reading its own graph after the compile, so that one is left as it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._guards import CompileId

from fixpass.config import Config
from fixpass.passes.fold_weights import FoldWeights
from fixpass.passes.fold_weights.apply import folds_of, stored_anew
from fixpass.passes.fold_weights.constant_values import candidates_in
from fixpass.passes.fold_weights.graph_weights import weights_of
from fixpass.passes.report import Report
from fixpass.pipelines import entry_pipeline
from fixpass.runtime.weights.lock import COMPILED
from fixpass.runtime.weights.weight_cache import Derived

SOURCE = "_dynamo_source"


@dataclass(frozen=True)
class Entry:
    """A graph as the compiler gets it.

    folds: what gives the last of its inputs. own: the graph is a copy that Dynamo does not know.
    reads_weights: no update of weights may commit during a call.
    """

    gm: fx.GraphModule
    inputs: list[Any]
    report: Report
    folds: tuple[Derived, ...] = ()
    own: bool = False
    reads_weights: bool = False

    def restart(self) -> None:
        """Have Dynamo trace once more where weights have other strides now than it saw."""
        if names := stored_anew(self.gm.graph):
            raise TensorifyScalarRestartAnalysis(
                restart_reason=f"fixpass stored weights in another order: {', '.join(names)}"
            )

    def bind(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What Dynamo calls with the inputs that it knows of."""
        if self.own:
            # As Dynamo does with its graph: compiled code keeps the module, and what is recorded
            # here keeps weak references to parameters, with which `swap_tensors` refuses them.
            for node in self.gm.graph.nodes:
                node.meta.clear()
        if not self.reads_weights:
            return compiled
        values, gate = [fold.value for fold in self.folds], COMPILED.read_lock()

        def call(*args: Any) -> Any:
            with gate:
                return compiled(*args, *[value(args) for value in values])

        return call


def enter(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    title: str = "",
    *,
    touch: bool = False,
) -> Entry:
    """Run the entry passes on one of Dynamo's graphs.

    touch: weights may be changed, under fold="inplace"; `Entry.restart` is to be called then.
    """
    pipeline = entry_pipeline(config, may_restride=touch and _is_first(gm))
    folding = any(isinstance(step, FoldWeights) and step.mode != "off" for step in pipeline.passes)
    # A graph that may get new inputs has to be a copy.
    weights = weights_of(gm.graph)
    own = folding and candidates_in(gm.graph, weights)
    if own:
        gm = _copy(gm)
    report = pipeline.run(gm.graph, title)
    if report.of_kind("applied"):
        gm.recompile()
    found = folds_of(gm.graph)
    folds, values = tuple(fold for fold, _ in found), [value for _, value in found]
    _introduce(gm.graph.find_nodes(op="placeholder")[len(example_inputs) :], values)
    return Entry(gm, [*example_inputs, *values], report, folds, own, bool(weights))


def _is_first(gm: fx.GraphModule) -> bool:
    """Whether this code is compiled for the first time.

    Later, weights may be changed no more: they may be those of other modules with the same code,
    or have been replaced, and each would compile again and again for strides of its own.
    """
    found = gm.meta.get("dynamo_compile_id")
    return isinstance(found, CompileId) and found.frame_compile_id == 0


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """The module with a graph of its own, and all that Dynamo told of it."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copied)
    output = graph.output(result)
    output.meta = dict(gm.graph.output_node().meta)
    for old in gm.graph.find_nodes(op="placeholder"):
        setattr(copied[old], SOURCE, vars(old).get(SOURCE))
    own = fx.GraphModule(gm, graph, type(gm).__name__)
    for name, item in vars(gm).items():
        vars(own).setdefault(name, item)
    own.meta.update(gm.meta)
    return own


def _introduce(nodes: Sequence[fx.Node], values: Sequence[torch.Tensor]) -> None:
    """Make the new inputs known to AOTAutograd as Dynamo's own are."""
    context = torch._guards.TracingContext.try_get()
    for node, value in zip(nodes, values, strict=True):
        # Where the input comes from: nowhere that Dynamo has a name for.
        setattr(node, SOURCE, None)
        if context is not None and context.fake_mode is not None:
            # Without symbols: it is of one shape, as its weights are. Found again as long as this
            # fake tensor lives, which is as long as the node.
            node.meta["example_value"] = context.fake_mode.from_tensor(value, static_shapes=True)
