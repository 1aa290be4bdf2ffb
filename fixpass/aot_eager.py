"""A Dynamo graph as functional ATen graphs, run op by op without Inductor's code generation.

The graphs are those that Inductor's passes see. The option `lower="eager"`, `fixpass.explain` and
`fixpass.testing.trace` use this module.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V

Stage = Literal["forward", "backward", "inference"]
OnGraph = Callable[[fx.Graph, Stage], object]


def compile_graphs(
    gm: fx.GraphModule, example_inputs: Sequence[Any], on_graph: OnGraph
) -> Callable[..., Any]:
    """Trace `gm` to ATen graphs, hand each to a callback, and run the graphs op by op.

    Args:
        gm: Dynamo's graph.
        example_inputs: the inputs that Dynamo traced with.
        on_graph: called with each graph and its stage; it may rewrite the graph in place.

    Returns:
        A function with the inputs of `gm` that runs the graphs as the callback left them.
    """

    def compiler(stage: Stage) -> Callable[..., Any]:
        def compile_graph(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            if stage == "inference":
                # Inductor replaces random ops under the fake mode that traced them.
                with V.set_fake_mode(detect_fake_mode(inputs)):
                    graph_module = joint_graph_passes(graph_module)
            graph_module.graph.eliminate_dead_code()
            on_graph(graph_module.graph, stage)
            graph_module.recompile()
            return make_boxed_func(graph_module.forward)

        return compile_graph

    def partition(joint: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        return min_cut_rematerialization_partition(joint_graph_passes(joint), inputs, **kwargs)

    compile_all = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=compiler("inference"),
        partition_fn=partition,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    compiled: Callable[..., Any] = compile_all(gm, example_inputs)
    return compiled


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` with its own nodes and the same recorded values."""
    copied = fx.Graph()
    result = copied.graph_copy(graph, {})
    copied.output(result)
    return copied
