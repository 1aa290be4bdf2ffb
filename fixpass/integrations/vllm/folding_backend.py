"""`fold-weights` in vLLM: wraps the backend that its configuration gives to torch.compile.

Our other passes are options of Inductor, which sees no live weights and cannot add work to a call.
In the mode that traces once, vLLM gives the name "inductor" to torch.compile; this backend runs our
entry passes and then Inductor. vLLM drops guards, so each call looks for changed weights. vLLM's
own compile mode and its ahead-of-time compile save code without the folded values: both are left
as they are.
"""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from types import ModuleType
from typing import Any

from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fixpass.backend import HOOK, last_reports, record
from fixpass.config import Config
from fixpass.dynamo_stage import run_entry_passes
from fixpass.integrations.engine import check_written_in, is_hook_of, once
from fixpass.integrations.vllm.live_reload import hook_reload
from fixpass.kept_reports import KeptReports
from fixpass.passes.functionalize_norms import FunctionalizeNorms
from fixpass.passes.remarks import log_line

log = logging.getLogger("vllm.fixpass")
say_once = once(log, in_workers=True)
TARGET = "CompilationConfig.init_backend"


@dataclass(frozen=True)
class FoldingBackend:
    """The backend for torch.compile: `fold-weights`, then Inductor with vLLM's options."""

    config: Config
    options: Mapping[str, Any]

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        # Norms become functional among Inductor's options, behind vLLM's own ops.
        config = replace(self.config, disable=(*self.config.disable, FunctionalizeNorms.name))
        entry = run_entry_passes(gm, inputs, config, may_restride=True)
        record(entry.report)
        entry.retrace_if_restrided()
        stage = self.options.get(HOOK)
        uuid = stage.uuid() if isinstance(stage, CustomGraphPass) else None
        kept, before = KeptReports.of(entry.gm, uuid, self.options), last_reports()
        compiled: Any = compile_fx(entry.gm, entry.inputs, config_patches=dict(self.options))
        for report in last_reports():
            if not any(report is other for other in before):
                kept.add(report)
        for report in kept.recall():
            record(report)
            log.info("fixpass: %s; from the cache", log_line(report))
        return entry.bind_inputs(compiled)


def hook_backend(
    configuration: type, engine: ModuleType, config_of: Callable[[Any], Config | None]
) -> None:
    """Wrap `configuration.init_backend` of the package `engine`, once.

    config_of: our options for a configuration that has our passes, or None. Raises EngineError
    where the method is not the engine's own.
    """
    original: Any = configuration.__dict__.get("init_backend")
    if is_hook_of(__name__, original):
        return
    check_written_in(original, engine, TARGET)

    @wraps(original)
    def init_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        found, ours = original(self, *args, **kwargs), config_of(self)
        if ours is not None:
            hook_reload()
        if found != "inductor" or ours is None or ours.fold_weights == "off":
            return found
        if importlib.import_module(f"{engine.__name__}.envs").VLLM_USE_AOT_COMPILE:
            say_once("VLLM_USE_AOT_COMPILE is on: vLLM runs without fold-weights")
            return found
        return FoldingBackend(ours, self.inductor_compile_config)

    init_backend.__module__ = __name__
    configuration.init_backend = init_backend  # type: ignore[attr-defined]
