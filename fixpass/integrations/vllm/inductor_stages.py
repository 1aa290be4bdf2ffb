"""Our passes in the form that vLLM stores: picklable, with a stable uuid, built where they run.

In vLLM's own compile mode they run after vLLM's fusions and before it lowers its IR. In the mode
that traces once they are options of Inductor, and the remaining ops of vLLM's IR are lowered here.
This file imports vLLM, so it is imported when vLLM makes its configuration.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import get_hash_for_files
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform

from fixpass.backend import HOOK, hooks_of, joint_keys, run_on
from fixpass.config import Config, set_default
from fixpass.integrations.vllm import ir, own_linears, shm_all_reduce
from fixpass.integrations.vllm.shm_all_reduce import FunctionalizeShmAllReduce
from fixpass.lowering.target import Target
from fixpass.passes.base import Pass
from fixpass.passes.functionalize_norms import FunctionalizeNorms
from fixpass.passes.pipeline import Pipeline
from fixpass.passes.place_symmetric_memory import PlaceSymmetricMemory
from fixpass.passes.remarks import log_line
from fixpass.passes.select_linear_kernel import SelectLinearKernel
from fixpass.pipelines import (
    collectives,
    graph_pipeline,
    register_lowerings,
    target_here,
)

FILES = (__file__, ir.__file__, own_linears.__file__, shm_all_reduce.__file__)
ENTRY_HOOK = "pre_grad_custom_pass"
VLLM_LINEARS = SelectLinearKernel(reason="vLLM has kernels of its own for them on CPU")
log = logging.getLogger("vllm.fixpass")


def install(config: VllmConfig, ours: Config) -> None:
    """Put our passes into the configuration's options of Inductor, once."""
    compilation = config.compilation_config
    options = compilation.inductor_compile_config
    options.update(dict(ours.inductor))
    ranks = f"{config.parallel_config.world_size} ranks"
    if compilation.mode == CompilationMode.VLLM_COMPILE:
        key = current_platform.pass_key
        options[key] = GraphStage(ours, ranks, _theirs(options.get(key)))
    else:
        # In this mode vLLM 0.32 saves what it compiled in a form that it cannot load: every start
        # would compile again, while Inductor's own caches hold all of it.
        set_default("VLLM_USE_AOT_COMPILE", "0")
        compilation.ir_enable_torch_wrap = True
        options[HOOK] = GraphStage(ours, ranks, _theirs(options.get(HOOK)), lowers_ir=True)
        options[ENTRY_HOOK] = EntryStage(ours, ranks, _theirs(options.get(ENTRY_HOOK)))
    log.info("fixpass is on, in compilation mode %s", compilation.mode.name)


def options_of(compilation: Any) -> Config | None:
    """Our options in a configuration that has our passes; None where it has none."""
    options = compilation.inductor_compile_config
    stages = (options.get(key) for key in (ENTRY_HOOK, HOOK, current_platform.pass_key))
    return next((stage.config for stage in stages if isinstance(stage, _Stage)), None)


def _theirs(given: Any) -> tuple[Any, ...]:
    """The passes of others that an option holds already."""
    return given.hooks if isinstance(given, _Stage) else hooks_of(given)


class _Stage(InductorPass):  # type: ignore[misc]
    """Our options, and passes of others that run first.

    ranks: the size of the job, for the key; the groups themselves are there only where it runs.
    """

    def __init__(
        self, config: Config, ranks: str, hooks: tuple[Any, ...] = (), *, lowers_ir: bool = False
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.hooks = hooks
        self.lowers_ir = lowers_ir

    def uuid(self) -> Any:
        """Equal in every process of a job and from start to start; asks no device."""
        kind = current_platform.device_type
        target = Target(kind, kind, self.config.norm_kernels or ())
        pipeline = graph_pipeline(self.config, target, VLLM_LINEARS, may_communicate=False)
        steps = tuple(
            replace(step, topology=self.ranks) if isinstance(step, PlaceSymmetricMemory) else step
            for step in pipeline.passes
        )
        keys = joint_keys(replace(pipeline, passes=steps), self.hooks)
        files = get_hash_for_files(FILES).hex()
        return None if keys is None else repr((type(self).__name__, self.lowers_ir, files, keys))


class GraphStage(_Stage):
    """Our pipeline on the functional graph, for the device that vLLM runs on."""

    def __call__(self, graph: fx.Graph) -> None:
        for hook in self.hooks:
            hook(graph)
        register_lowerings()
        pipeline = self.pipeline()
        report = run_on(pipeline, graph)
        log.info("fixpass: %s", log_line(report))
        log.debug("%s", report)

    def pipeline(self) -> Pipeline:
        target = target_here(torch.device(current_platform.device_type), self.config)
        pipeline = graph_pipeline(self.config, target, VLLM_LINEARS)
        steps: tuple[Pass, ...] = (*pipeline.passes, own_linears.KeepVllmLinears())
        if self.lowers_ir:
            steps = (*steps, ir.LowerVllmIr())
        return replace(pipeline, passes=steps)


class EntryStage(_Stage):
    """Our passes on Dynamo's graph: ops that may write into their arguments become functional."""

    def __call__(self, graph: fx.Graph) -> None:
        for hook in self.hooks:
            hook(graph)
        run_on(self.pipeline(), graph)

    def pipeline(self) -> Pipeline:
        target = target_here(torch.device(current_platform.device_type), self.config)
        place = collectives(self.config, target, may_communicate=True)
        steps: tuple[Pass, ...] = (ir.FunctionalizeVllmIr(), FunctionalizeNorms())
        # Nobody else would take what it makes: an all-reduce through the process group.
        if place.name not in self.config.disable:
            steps = (*steps, FunctionalizeShmAllReduce(place))
        steps = tuple(step for step in steps if step.name not in self.config.disable)
        return Pipeline(steps, strict=self.config.strict, fuel=self.config.fuel)
