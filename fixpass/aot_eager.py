"""Take a Dynamo graph to the functional ATen graphs that Inductor's passes see, and stop there.

`compile_graphs` hands each graph to a callback and then runs it op by op. It serves the option
`lower="eager"`, `fixpass.explain` and `fixpass.testing.trace`; no code is generated.
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
    """Run `on_graph` on each ATen graph of `gm`; the callable that runs what it left."""

    def compiler(stage: Stage) -> Callable[..., Any]:
        def compile_graph(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            if stage == "inference":
                # Inductor's own replacement of random ops asks for the mode that traced them.
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
