"""`trace` and `text`: the graph that the passes see, and that graph as text."""

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fixpass.aot_eager import compile_graphs, copy_graph
from fixpass.config import Config
from fixpass.dynamo_stage import run_entry_passes, specialize_eps
from fixpass.passes.prepack_linears import PrepackLinears
from fixpass.passes.printer import format_graph


def trace(
    fn_or_module: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    training: bool = False,
    **kwargs: Any,
) -> fx.GraphModule:
    """The functional ATen graph of `fn_or_module(*args, **kwargs)`, before any pass on it.

    Args:
        fn_or_module: a function or a module that Dynamo traces as one graph.
        args: its arguments.
        dynamic: as for torch.compile.
        training: trace the forward graph of a training step, with gradients.
        kwargs: its keyword arguments.

    Returns:
        The graph. Its inputs have the names of parameters and arguments.
    """
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        specialize_eps(gm.graph)
        # Packing depends on the CPU, and the graph should be the same on every machine.
        entry = run_entry_passes(gm, example_inputs, Config(disable=(PrepackLinears.name,)))
        names = [_short(node.name) for node in entry.gm.graph.find_nodes(op="placeholder")]

        def keep(graph: fx.Graph, stage: str) -> None:
            if stage != "backward":
                _rename_inputs(graph, names)
                found.append(fx.GraphModule(graph.owning_module or {}, copy_graph(graph)))

        return entry.bind_inputs(compile_graphs(entry.gm, entry.inputs, keep))

    torch._dynamo.reset()
    with contextlib.nullcontext() if training else torch.no_grad():
        torch.compile(fn_or_module, backend=backend, dynamic=dynamic, fullgraph=True)(
            *args, **kwargs
        )
    return found[0]


def text(graph: fx.Graph) -> str:
    """The graph as text: strides where a tensor is not dense, symbols numbered from s0."""
    return format_graph(graph)


def _rename_inputs(graph: fx.Graph, names: Sequence[str]) -> None:
    """Give the inputs their names in the model if there are as many names as inputs."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != len(names):
        return
    for node, name in zip(inputs, names, strict=True):
        node._rename(name)


def _short(name: str) -> str:
    """`l_self_modules_q_norm_parameters_weight_` is q_norm_weight, `l_x_` is x."""
    name = re.sub(r"^[lL]_(self_|fn_|args_|kwargs_)?", "", name)
    name = re.sub(r"(^|_)(modules|parameters|buffers)_", r"\1", name).strip("_")
    return f"arg_{name}" if name[:1].isdigit() or not name else name
