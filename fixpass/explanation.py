"""`fixpass.explain(model, *args, target=None)`: the report of a model, without compiling it.

The model is traced and run once, and the passes run on its graphs; no code is generated. For a
device that is not here, each ATen graph is recorded again on fake tensors that claim that device,
and every kernel of the target counts as installed. Choices that PyTorch made while it traced, such
as the attention kernel, stay those of the device that is here. Other compiles of the model keep
their guards and caches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
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
from fixpass.passes.prepack_linears import PrepackLinears
from fixpass.passes.remarks import Report
from fixpass.passes.rewrite import copy_of, guards_suppressed
from fixpass.pipelines import (
    graph_pipeline,
    known_targets,
    linears,
    preferred,
    present_target,
)
from fixpass.report.expected import assert_fired
from fixpass.report.recording import Recorder
from fixpass.report.summary import summary
from fixpass.runtime.versions import check_torch


def explain(
    model: Callable[..., Any],
    *args: Any,
    target: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    expect: Mapping[str, str] | None = None,
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
        dynamic: trace with symbolic shapes, as `torch.compile` takes it.
        expect: the kernel or the pass that sites have to get, as `fixpass.testing.assert_fired`
            takes them, such as {"q_norm": "strided_qk_norm"}.
        kwargs: its keyword arguments.

    Returns:
        One report for all graphs of the model.

    Raises:
        ConfigError: an option or the target is unknown. The error lists the known ones.
        ExpectationError: a site got another kernel than expected. The error says why.

    Example:
        >>> print(fixpass.explain(model, tokens, target="rocm:gfx942"))
    """
    report = explain_with(model, args, kwargs, target=target, options=options, dynamic=dynamic)
    assert_fired(report, expect or {})
    return report


def explain_with(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    target: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    backward: bool = False,
    recorder: Recorder | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """`explain` for programs that show more than the remarks.

    `backward` runs the backward pass too, which traces its graph and adds gradients. `recorder`
    gets each graph before and after each pass. `say` is called with one line for each graph.
    """
    check_torch()
    config = Config.resolve(options)
    absent = preferred(target_named(target, known_targets(config)), config) if target else None
    if absent and absent.device_type != "cpu":
        # A weight that is packed for the CPU is no tensor that another device could claim.
        config = replace(config, disable=(*config.disable, PrepackLinears.name))
    explainer = _Explainer(config, absent, recorder, say)
    without_gradients = _is_inference(model, (args, kwargs))
    with (
        torch._dynamo.config.patch(recompile_limit=64),
        torch.no_grad() if without_gradients else nullcontext(),
    ):
        run = torch.compile(model, backend=explainer.backend, dynamic=dynamic)
        result = run(*args, **kwargs)
        if backward:
            torch.autograd.backward(list(_losses(result)))
    return explainer.report


@dataclass
class _Explainer:
    """A backend that runs the passes and generates no code."""

    config: Config
    absent: Target | None
    """The target that is explained where it is not the device of the inputs."""
    recorder: Recorder | None
    say: Callable[[str], object]
    reports: list[Report] = field(default_factory=list)

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        specialize_eps(gm.graph)
        target = self.absent or present_target(example_inputs, self.config)
        entry = run_entry_passes(gm, example_inputs, self.config, f"target {target}")
        self.reports.append(entry.report)
        layers = linears(self.config, target, example_inputs, dict(self.config.inductor))
        pipeline = graph_pipeline(self.config, target, layers, may_communicate=False)

        def run_passes(graph: fx.Graph, stage: str) -> None:
            self.say(f"passes over the {stage} graph of {len(graph.nodes):,} nodes")
            watched = self.recorder.watch(pipeline, stage) if self.recorder else pipeline
            self.reports.append(watched.run(graph))

        return entry.bind_inputs(_compile(entry.gm, entry.inputs, target, run_passes, self.reports))

    @property
    def report(self) -> Report:
        """One report for all graphs."""
        if not self.reports:
            return Report(title="no graph was compiled")
        total = sum(self.reports[1:], self.reports[0])
        name = total.title.removeprefix("target ")
        return replace(total, summary=summary(total.remarks, name))


def _losses(result: Any) -> Iterator[torch.Tensor]:
    """The sum of each result that has a gradient."""
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            yield leaf.sum()


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
    target: Target,
    run_passes: Callable[[fx.Graph, str], None],
    reports: list[Report],
) -> Callable[..., Any]:
    """Run the passes as `target` would get the graph; the result runs where the inputs are."""
    devices = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)}
    is_absent = bool(devices) and target.device_type not in devices

    def on_graph(graph: fx.Graph, stage: str) -> None:
        if not is_absent:
            run_passes(graph, stage)
            return
        copied = copy_graph(graph)
        guessed = _claim_device(copied, target.device_type)
        for name in dict.fromkeys(str(node.target) for node in guessed):
            why = f"{name} has no fake implementation for {target.name}: it keeps its strides"
            reports.append(Report((Remark("explain", "missed", "graph", why),)))
        run_passes(copied, stage)

    return compile_graphs(gm, example_inputs, on_graph)


def _claim_device(graph: fx.Graph, device_type: str) -> list[fx.Node]:
    """Record every value of `graph` as if it were on `device_type`; the graph cannot be run then.

    Inputs become fake tensors that claim the device, with the sizes and strides that they had.
    Each operation runs again on them. Returned are the nodes whose operation has no fake
    implementation for the device: their values keep the strides that they had.
    """
    guessed = []
    device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, 0)

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            node.meta["val"] = pytree.tree_map(lambda v: _on(v, device), node.meta.get("val"))
        elif node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, moved)
            node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
            try:
                _record(node)
            except (RuntimeError, NotImplementedError):
                guessed.append(node)
                node.meta["val"] = pytree.tree_map(lambda v: _on(v, device), node.meta.get("val"))
    return guessed


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
