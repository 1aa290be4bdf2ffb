"""The backend behind `torch.compile(model, backend="fixpass")`.

Two stages. On Dynamo's graph, ops that write into their arguments are made functional; this runs
on every compile. On the functional ATen graph the passes run inside Inductor, as a pass whose
uuid keeps both of Inductor's caches right. What no pass changes compiles as with Inductor.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fixpass.aot_eager import compile_graphs
from fixpass.config import Config
from fixpass.dynamo_stage import enter
from fixpass.passes.pipeline import Pipeline
from fixpass.passes.report import Report
from fixpass.pipelines import (
    check_torch,
    graph_pipeline,
    linears,
    present_target,
    register_lowerings,
)
from fixpass.specialize import specialize_eps

log = logging.getLogger("fixpass")
HOOK = "post_grad_custom_pre_pass"

_reports: deque[Report] = deque(maxlen=64)


def fixpass(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs.

    options: see `fixpass.Config`; `mode` is one of Inductor's; `dynamic` has been acted on by
    torch.compile already. Raises ConfigError for an unknown option, UnsupportedTorchError for a
    torch that is not supported, and PassError where a pass fails under `strict`.
    """
    check_torch()
    config = Config.resolve(options)
    patches = dict(list_mode_options(mode, dynamic)) if mode else {}
    specialize_eps(gm.graph)
    entry = enter(gm, example_inputs, config, touch=True)
    record(entry.report)
    entry.restart()
    patches |= dict(config.inductor)
    target = present_target(example_inputs, config)
    pipeline = graph_pipeline(config, target, linears(config, target, example_inputs, patches))
    if config.lower == "eager":
        run = compile_graphs(entry.gm, entry.inputs, lambda g, stage: run_on(pipeline, g, stage))
        return entry.bind(run)
    patches[HOOK] = GraphPass(pipeline, _user_hooks(config))
    register_lowerings()
    compiled: Any = compile_fx(entry.gm, entry.inputs, config_patches=patches)
    return entry.bind(compiled)


class GraphPass(CustomGraphPass):
    """The pipeline as Inductor calls it, after any hook that the user had set."""

    def __init__(self, pipeline: Pipeline, hooks: tuple[Any, ...] = ()) -> None:
        self.pipeline = pipeline
        self.hooks = hooks

    def __call__(self, graph: fx.Graph) -> None:
        for hook in self.hooks:
            hook(graph)
        run_on(self.pipeline, graph)

    def uuid(self) -> Any:
        keys = joint_keys(self.pipeline, self.hooks)
        return None if keys is None else repr(keys)


def joint_keys(pipeline: Pipeline, hooks: Sequence[Any]) -> list[Any] | None:
    """What names a pipeline and the hooks before it in a cache's key.

    What cannot be named must not be cached: None says so to Inductor.
    """
    theirs = [hook.uuid() if isinstance(hook, CustomGraphPass) else None for hook in hooks]
    keys = [pipeline.uuid(), *theirs]
    return None if None in keys else keys


def hooks_of(given: Any) -> tuple[Any, ...]:
    """The passes in one of Inductor's options: none, one or several."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def run_on(pipeline: Pipeline, graph: fx.Graph, title: str = "") -> Report:
    """Run the pipeline on one ATen graph and keep its report."""
    report = pipeline.run(graph, title)
    record(report)
    return report


def record(report: Report) -> None:
    """Keep a report for `last_reports`, and log it; a failed pass is a warning."""
    if not report.remarks:
        return
    _reports.append(report)
    for remark in report.of_kind("failed"):
        log.warning("%s: %s", remark.pass_name, remark.text)
    log.info("%s", report)


def last_reports() -> tuple[Report, ...]:
    """The reports of the graphs compiled last in this process, oldest first, at most 64.

    A graph that came from Inductor's cache ran no pass and has none: see `fixpass.explain`.
    """
    return tuple(_reports)


def compile(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile(model, backend="fixpass")` with the options of `Config` as keywords."""
    Config.resolve(options)
    return torch.compile(model, backend="fixpass", options=options or None)


def _user_hooks(config: Config) -> tuple[Any, ...]:
    return hooks_of(dict(config.inductor).get(HOOK, getattr(inductor_config, HOOK)))
