"""SGLang's plugin for its serving side: `FIXPASS=1` switches fixpass on where it is installed.

The serving side has no graph for passes. Its calls of aiter's norm kernels are checked against
their contracts. Parameters that it repacks after a load keep their identity, so that they can be
loaded again. The diffusion side is in `diffusion`.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from fixpass.config import Config, is_switched_on
from fixpass.eager_kernels import wrap
from fixpass.integrations.sglang import attention_norms
from fixpass.integrations.sglang.engine_parameters import keeping, restore
from fixpass.integrations.sglang.hooks import Hook, check_version, install, say_once
from fixpass.runtime.errors import EngineError

LAYERNORM = "sglang.srt.layers.layernorm"
LOADER = "sglang.srt.model_loader.loader"
# The names that SGLang gives aiter's kernels, and what they are.
KERNELS = {
    "rms_norm": "aiter::rmsnorm2d_fwd",
    "fused_add_rms_norm": "aiter::rmsnorm2d_fwd_with_add",
    "layer_norm": "aiter::layernorm2d_fwd",
}


def plugin() -> None:
    """The entry point: SGLang calls it in each process of the serving side."""
    if not is_switched_on():
        return
    try:
        check_version()
        hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
        install(hooks.HookRegistry, hooks.HookType, serving_hooks())
    except ImportError as error:
        say_once(f"SGLang's plugins are not here ({error}): nothing to switch fixpass on in")
    except EngineError as error:
        say_once(f"{error}: SGLang runs without fixpass")


def serving_hooks() -> tuple[Hook, ...]:
    """The hooks of the serving side; FIXPASS_EAGER_KERNELS=off leaves out norm hooks."""
    norms: tuple[Hook, ...] = ()
    if Config.resolve().eager_kernels:
        norms = norm_hooks(LAYERNORM, "_use_aiter")
        norms = (
            *norms,
            Hook(attention_norms.TARGET, "AROUND", attention_norms.read_in_place, norms[0].applies),
        )
    return (
        *norms,
        Hook(f"{LOADER}.device_loading_context", "AROUND", _keep_parameters),
        Hook(f"{LOADER}.DefaultModelLoader.restore_weights_before_loading", "AROUND", _restore),
    )


def norm_hooks(module: str, flag: str) -> tuple[Hook, ...]:
    """Guards of aiter's kernels in a module of norms; `flag` says whether they are used there."""

    def applies() -> bool:
        return bool(getattr(importlib.import_module(module), flag))

    guards = (
        Hook(f"{module}.{name}", "AROUND", guarding(op), applies) for name, op in KERNELS.items()
    )
    return (*guards, Hook(f"{module}.RMSNorm.forward_aiter", "AFTER", shaped_as_given, applies))


def guarding(op: str) -> Callable[..., Any]:
    """An AROUND hook, of one kernel, that calls it through its wrapper."""
    wrapped: Callable[..., Any] | None = None

    def hook(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal wrapped
        if wrapped is None:
            wrapped = wrap(kernel, op)
        return wrapped(*args, **kwargs)

    return hook


def shaped_as_given(
    result: Any, norm: nn.Module, x: Tensor, residual: Tensor | None = None, *_: Any, **__: Any
) -> Any:
    """The norm in the shape of x, the sum in that of the residual, padded or not."""
    if residual is None:
        return _rows_of(result, x)
    out, total = result
    return _rows_of(out, x), _rows_of(total, residual)


def _rows_of(result: Tensor, given: Tensor) -> Tensor:
    shape = (*given.shape[:-1], result.shape[-1])
    return result if result.shape == shape else result.reshape(shape)


_undoing: ContextVar[bool] = ContextVar("_undoing", default=False)


@contextmanager
def _keep_parameters(
    context: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """Around the step in which SGLang repacks the weights of one module on the device."""
    if _undoing.get():
        with context(module, *args, **kwargs) as entered:
            yield entered
        return
    with keeping(module), context(module, *args, **kwargs) as entered:
        yield entered


def _restore(engines: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Before a load: SGLang restores its weights first, then fixpass restores other parameters."""
    token = _undoing.set(True)
    try:
        result = engines(model, *args, **kwargs)
    finally:
        _undoing.reset(token)
    restore(model)
    return result
