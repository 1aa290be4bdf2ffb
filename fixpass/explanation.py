"""`fixpass.explain(model, *args, target=None)`: the report of a model, without compiling it.

The model is traced and run once, and the passes run on its graphs; no code is generated. For a
device that is not here, each ATen graph is recorded again on fake tensors that claim that device,
and every kernel of the target counts as installed. Choices that PyTorch made while it traced, such
as the attention kernel, stay those of the device that is here. Other compiles of the model keep
their guards and caches.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree

from fixpass.aot_eager import compile_graphs, copy_graph
from fixpass.config import Config
from fixpass.dynamo_stage import run_entry_passes, specialize_eps
from fixpass.lowering.target import Target, target_named
from fixpass.passes.base import Remark
from fixpass.passes.pipeline import Pipeline
from fixpass.passes.prepack_linears import PrepackLinears
from fixpass.passes.report import Report
from fixpass.passes.rewrite import copy_of, guards_suppressed
from fixpass.pipelines import (
    graph_pipeline,
    known_targets,
    linears,
    preferred,
    present_target,
)
from fixpass.runtime.versions import check_torch


def explain(
    model: Callable[..., Any],
    *args: Any,
    target: str | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Run `model(*args, **kwargs)` once and report each norm: its layout, kernel and remarks.

    A module in eval mode is traced without gradients, as under `torch.no_grad()`, unless an input
    requires a gradient. A module in training mode, or a function, is traced in the current mode.

    Args:
        model: a module or a function.
        args: its arguments.
        target: a device that need not be here, such as "rocm:gfx942" or "cuda:sm_90". None is the
            device of the inputs.
        options: the options of `fixpass.Config`.
        kwargs: its keyword arguments.

    Returns:
        One report for all graphs of the model.

    Raises:
        ConfigError: an option or the target is unknown. The error lists the known ones.

    Example:
        >>> print(fixpass.explain(model, tokens, target="rocm:gfx942"))
    """
    check_torch()
    config = Config.resolve(options)
    absent = None
    if target:
        absent = preferred(target_named(target, known_targets(config)), config)
    if absent and absent.device_type != "cpu":
        # A weight that is packed for the CPU is no tensor that another device could claim.
        config = replace(config, disable=(*config.disable, PrepackLinears.name))
    reports: list[Report] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        specialize_eps(gm.graph)
        chosen = absent or present_target(example_inputs, config)
        entry = run_entry_passes(gm, example_inputs, config, f"target {chosen}")
        reports.append(entry.report)
        layers = linears(config, chosen, example_inputs, dict(config.inductor))
        pipeline = graph_pipeline(config, chosen, layers, may_communicate=False)
        return entry.bind_inputs(_compile(entry.gm, entry.inputs, pipeline, chosen, reports))

    without_gradients = _is_inference(model, (args, kwargs))
    with (
        torch._dynamo.config.patch(recompile_limit=64),
        torch.no_grad() if without_gradients else nullcontext(),
    ):
        torch.compile(model, backend=backend)(*args, **kwargs)
    return sum(reports[1:], reports[0]) if reports else Report(title="no graph was compiled")


def _is_inference(model: Callable[..., Any], inputs: Any) -> bool:
    """Whether `model` is a module in eval mode or its method, and no input needs a gradient."""
    module = getattr(model, "__self__", model)
    if not isinstance(module, nn.Module) or module.training:
        return False
    leaves = pytree.tree_leaves(inputs)
    return not any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)


def _compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    pipeline: Pipeline,
    target: Target,
    reports: list[Report],
) -> Callable[..., Any]:
    """Report on the graph as `target` would get it; the result runs where the inputs are."""
    devices = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)}
    is_absent = bool(devices) and target.device_type not in devices

    def on_graph(graph: fx.Graph, stage: str) -> None:
        if not is_absent:
            reports.append(pipeline.run(graph))
            return
        copied = copy_graph(graph)
        try:
            _claim_device(copied, target.device_type)
        # An op that has no fake implementation for the device ends the tracing of this graph.
        except (RuntimeError, NotImplementedError) as error:
            why = f"not traced for {target.name}: {type(error).__name__}: {error}"
            reports.append(Report((Remark("explain", "failed", "graph", why),)))
        else:
            reports.append(pipeline.run(copied))

    return compile_graphs(gm, example_inputs, on_graph)


def _claim_device(graph: fx.Graph, device_type: str) -> None:
    """Record every value of `graph` as if it were on `device_type`; the graph cannot be run then.

    Inputs become fake tensors that claim the device, with the sizes and strides that they had.
    Each operation runs again on them.
    """
    device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, 0)

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            node.meta["val"] = pytree.tree_map(lambda v: _on(v, device), node.meta.get("val"))
        elif node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, moved)
            node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
            _record(node)


def _record(node: fx.Node) -> None:
    args, kwargs = pytree.tree_map_only(
        fx.Node, lambda source: source.meta.get("val"), (node.args, node.kwargs)
    )
    if any(isinstance(v, FakeTensor) for v in pytree.tree_leaves(node.meta.get("val"))):
        with guards_suppressed((args, node.meta["val"])):
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _on(value: Any, device: torch.device) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    with unset_fake_temporarily():
        return copy_of(value, device)
