"""SGLang's plugin for its diffusion side: `FIXPASS=1` switches fixpass on where it is installed.

Models are compiled with our passes. They are sharded by `fully_shard_model`, which keeps the
attributes of parameters. The keywords of a step are read from its source. Calls of aiter's norm
kernels are checked against their contracts.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from fixpass.config import Config, is_switched_on
from fixpass.integrations.sglang.hooks import Hook, check_version, install, say_once
from fixpass.integrations.sglang.serving import norm_hooks
from fixpass.modules import AcceptedKwargs, accepted_kwargs
from fixpass.runtime.errors import EngineError
from fixpass.sharding import fully_shard_model

RUNTIME = "sglang.multimodal_gen.runtime"


def plugin() -> None:
    """The entry point: SGLang calls it in each process of the diffusion side."""
    if not is_switched_on():
        return
    try:
        check_version()
        plugins = importlib.import_module(f"{RUNTIME}.platforms.plugins")
        install(plugins.HookRegistry, plugins.HookType, diffusion_hooks())
    except ImportError as error:
        say_once(f"SGLang's plugins are not here ({error}): nothing to switch fixpass on in")
    except EngineError as error:
        say_once(f"{error}: SGLang runs without fixpass")


def diffusion_hooks() -> tuple[Hook, ...]:
    """The hooks of the diffusion side; FIXPASS_EAGER_KERNELS=off leaves those of norms out."""
    stages = f"{RUNTIME}.pipelines_core.stages.denoising"
    norms = norm_hooks(f"{RUNTIME}.layers.layernorm", "USE_AITER")
    # This side has no layer norm of aiter's.
    norms = tuple(hook for hook in norms if not hook.target.endswith(".layer_norm"))
    return (
        *(norms if Config.resolve().eager_kernels else ()),
        Hook(f"{RUNTIME}.loader.fsdp_load.shard_model", "AROUND", shard_model),
        Hook(f"{stages}.DenoisingStage._get_extra_func_kwarg_names", "AROUND", keyword_names),
        Hook(
            f"{RUNTIME}.utils.torch_compile.resolve_torch_compile_kwargs", "AFTER", compile_with_us
        ),
    )


def shard_model(
    _: Callable[..., Any],
    model: nn.Module,
    *,
    cpu_offload: bool,
    reshard_after_forward: bool = True,
    mp_policy: MixedPrecisionPolicy | None = None,
    mesh: Any = None,
    fsdp_shard_conditions: Any = None,
    pin_cpu_memory: bool = True,
) -> None:
    """SGLang's `shard_model`, done by `fully_shard_model`."""
    fully_shard_model(
        model,
        mesh,
        conditions=fsdp_shard_conditions,
        mp_policy=mp_policy,
        reshard_after_forward=reshard_after_forward,
        offload_policy=CPUOffloadPolicy(pin_memory=pin_cpu_memory) if cpu_offload else None,
    )


def keyword_names(
    _: Callable[..., Any], stage: Any, func: Callable[..., Any]
) -> tuple[bool, frozenset[str]]:
    """Whether `func` takes any keyword, and the names that it takes for sure."""
    if isinstance(func, functools.partial) and func.args:
        # cache-dit calls the forward of a module through a partial, and keeps the plain one there.
        func = getattr(func.args[0], "_original_forward", func)
    found: AcceptedKwargs | None = accepted_kwargs(func)
    # Where the code does not show what becomes of `**kwargs`, SGLang's own rule stays.
    takes_any = found is not None and found.var_keyword and found.strict is not True
    names: frozenset[str] = frozenset()
    while found is not None:
        names |= found.names
        found = found.inner
    return takes_any, names


def compile_with_us(result: Any, *_: Any, **__: Any) -> Any:
    """The options of torch.compile with our backend in place of Inductor's."""
    given, mode = result
    if given.get("backend", "inductor") != "inductor":
        return result
    changed = {**given, "backend": "fixpass"}
    if given.get("options"):
        changed["options"] = {"inductor": given["options"]}
    return changed, mode
