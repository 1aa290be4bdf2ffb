"""The backend behind `torch.compile(model, backend="fixpass")`.

The entry passes run on Dynamo's graph, on every compile. The other passes run on the functional
ATen graph, inside Inductor, as one custom pass whose uuid is part of the keys of Inductor's caches.
A graph that no pass changes compiles as with Inductor.
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
from torch._logging._internal import trace_structured

from fixpass.aot_eager import compile_graphs
from fixpass.config import Config
from fixpass.dynamo_stage import run_entry_passes, specialize_eps
from fixpass.kept_reports import KeptReports
from fixpass.passes import bisect
from fixpass.passes.pipeline import Pipeline
from fixpass.passes.remarks import Report, log_line
from fixpass.pipelines import (
    graph_pipeline,
    linears,
    present_target,
    register_lowerings,
)
from fixpass.runtime.providers import asked_once
from fixpass.runtime.versions import check_torch

log = logging.getLogger("fixpass")
HOOK = "post_grad_custom_pre_pass"

bisect.register()
_reports: deque[Report] = deque(maxlen=64)


def compile(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a model: `torch.compile(model, backend="fixpass", options=options)`.

    Args:
        model: a module or a function.
        options: the options of `fixpass.Config`.

    Returns:
        The compiled module or function. Its first call compiles.

    Raises:
        ConfigError: an option or a `FIXPASS_*` variable is unknown, or its value is wrong.

    Example:
        >>> compiled = fixpass.compile(model, verify=True)
    """
    Config.resolve(options)
    given = None if bisect.is_elsewhere() else options or None
    return torch.compile(model, backend="fixpass", options=given)


def last_reports() -> tuple[Report, ...]:
    """The reports of the graphs compiled last in this process, oldest first, at most 64.

    A graph that comes from Inductor's cache has the report of the compile that made it.
    """
    return tuple(_reports)


@asked_once()
def fixpass(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs: torch.compile calls this function.

    Args:
        gm: Dynamo's graph.
        example_inputs: the inputs that Dynamo traced with.
        options: the options of `fixpass.Config`.
        mode: one of Inductor's modes.
        dynamic: read by Inductor's modes only; Dynamo has already traced with it.

    Returns:
        The compiled code of the graph.

    Raises:
        ConfigError: an option or a `FIXPASS_*` variable is unknown, or its value is wrong.
        UnsupportedTorchError: fixpass does not support the installed torch.
        PassError: a pass failed, under the option `strict`.
    """
    check_torch()
    config = Config.resolve(options)
    patches = dict(list_mode_options(mode, dynamic)) if mode else {}
    specialize_eps(gm.graph)
    entry = run_entry_passes(gm, example_inputs, config, may_restride=True)
    record(entry.report)
    entry.retrace_if_restrided()
    patches |= dict(config.inductor)
    target = present_target(example_inputs, config)
    pipeline = graph_pipeline(config, target, linears(config, target, example_inputs, patches))
    if config.lower == "eager":
        run = compile_graphs(entry.gm, entry.inputs, lambda g, stage: run_on(pipeline, g, stage))
        return entry.bind_inputs(run)
    graph_pass = GraphPass(pipeline, _user_hooks(config))
    graph_pass.kept = KeptReports.of(entry.gm, graph_pass.uuid(), patches)
    patches[HOOK] = graph_pass
    register_lowerings()
    compiled: Any = compile_fx(entry.gm, entry.inputs, config_patches=patches)
    for report in graph_pass.kept.recall():
        record(report)
    return entry.bind_inputs(compiled)


class GraphPass(CustomGraphPass):
    """The pipeline as Inductor calls it, after any hook that the user had set."""

    def __init__(self, pipeline: Pipeline, hooks: tuple[Any, ...] = ()) -> None:
        self.pipeline = pipeline
        self.hooks = hooks
        self.kept = KeptReports(None)

    def __call__(self, graph: fx.Graph) -> None:
        for hook in self.hooks:
            hook(graph)
        self.kept.add(run_on(self.pipeline, graph))

    def uuid(self) -> Any:
        keys = joint_keys(self.pipeline, self.hooks)
        return None if keys is None else repr(keys)


def joint_keys(pipeline: Pipeline, hooks: Sequence[Any]) -> list[Any] | None:
    """The cache keys of a pipeline and of the hooks before it; None means "do not cache".

    The result is None if a hook, or a pass of the pipeline, has no key.
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
    """Keep a report for `last_reports`, log it and trace it; a failed pass is a warning.

    `TORCH_LOGS="+fixpass"` prints the log. `TORCH_TRACE=FOLDER` writes the trace, whose page
    `tlparse` makes.
    """
    if not report.remarks:
        return
    _reports.append(report)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "fixpass_report", "encoding": "string"},
        payload_fn=lambda: report.text(with_lines=True),
        # vLLM runs the pipeline outside of a compile of Dynamo.
        expect_trace_id=False,
    )
    for remark in report.of_kind("failed"):
        log.warning("%s: %s", remark.pass_name, remark.text)
    log.info("%s", log_line(report))
    log.debug("%s", report)


def _user_hooks(config: Config) -> tuple[Any, ...]:
    return hooks_of(dict(config.inductor).get(HOOK, getattr(inductor_config, HOOK)))
