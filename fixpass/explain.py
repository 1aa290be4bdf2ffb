"""`fixpass.explain(model, *args, target=None)`: what fixpass would do to a model, and why not.

The model is traced and its passes run; no code is generated. For a target that is not the device
of the inputs, the ATen graph is traced with fake tensors that claim that device, and every kernel
of the target counts as installed. Guards and caches of other compiles are left alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fixpass.aot_eager import compile_graphs, copy_graph
from fixpass.config import Config
from fixpass.dynamo_stage import enter
from fixpass.lowering.target import Target, target_named
from fixpass.passes.base import Remark
from fixpass.passes.pipeline import Pipeline
from fixpass.passes.prepack_linears import PrepackLinears
from fixpass.passes.report import Report
from fixpass.pipelines import check_torch, graph_pipeline, linears, preferred, present_target
from fixpass.retarget import claim_device
from fixpass.specialize import specialize_eps


def explain(
    model: Callable[..., Any],
    *args: Any,
    target: str | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Run `model(*args, **kwargs)` once and report each norm, its layout, kernel and remarks.

    target: a name such as "rocm:gfx942" or "cuda:sm_90"; None is the device of the inputs.
    Raises ConfigError for an unknown target, with the known ones.
    """
    check_torch()
    config = Config.resolve(options)
    asked = preferred(target_named(target), config) if target else None
    if asked and asked.device_type != "cpu":
        # What is packed for the CPU that traces is no tensor that another device could claim.
        config = replace(config, disable=(*config.disable, PrepackLinears.name))
    reports: list[Report] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        specialize_eps(gm.graph)
        chosen = asked or present_target(example_inputs, config)
        entry = enter(gm, example_inputs, config, f"target {chosen.name}")
        reports.append(entry.report)
        layers = linears(config, chosen, example_inputs, dict(config.inductor))
        pipeline = graph_pipeline(config, chosen, layers, may_communicate=False)
        return entry.bind(_compile(entry.gm, entry.inputs, pipeline, chosen, reports))

    with torch._dynamo.config.patch(recompile_limit=64):
        torch.compile(model, backend=backend)(*args, **kwargs)
    return sum(reports[1:], reports[0]) if reports else Report(title="no graph was compiled")


def _compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    pipeline: Pipeline,
    target: Target,
    reports: list[Report],
) -> Callable[..., Any]:
    """Report on the graph as `target` would get it; what is returned runs where the inputs are."""
    devices = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)}
    is_absent = bool(devices) and target.device_type not in devices

    def on_graph(graph: fx.Graph, stage: str) -> None:
        if not is_absent:
            reports.append(pipeline.run(graph))
            return
        copied = copy_graph(graph)
        try:
            claim_device(copied, target.device_type)
        # Tracing for an absent device is best effort: what it cannot do is said on the report.
        except (RuntimeError, NotImplementedError) as error:
            why = f"not traced for {target.name}: {type(error).__name__}: {error}"
            reports.append(Report((Remark("explain", "failed", "graph", why),)))
        else:
            reports.append(pipeline.run(copied))

    return compile_graphs(gm, example_inputs, on_graph)
