"""Hook modules with layouts: state dicts keep checkpoint order; deepcopy and pickle raise.

The state dict of a protected module has logical values, and `load_state_dict` takes them. deepcopy
and pickle, which would lose the layout and keep its bytes, raise. Forward is left alone: its
kernels want the layout.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.checkpoint_view import shows_checkpoint
from fixpass.runtime.weights.layouts import WeightLayout
from fixpass.runtime.weights.parameter_layout import (
    check_memory,
    logical,
    memory_of,
    record_of,
    reset_layout,
    set_layout,
)
from fixpass.runtime.weights.region import Region, write
from fixpass.runtime.weights.targets import targets

_REDUCE = "__reduce_ex__"


def set_layouts(model: nn.Module, layouts: Mapping[str, str | WeightLayout]) -> None:
    """Set the layouts of parameters, all or none, and protect the modules that hold them.

    Args:
        model: its calls are not held back: see `write_lock`.
        layouts: by parameter name.

    Raises:
        LayoutError: a name is not there, or a layout does not fit.

    Example:
        >>> set_layouts(model, {"layers.0.mlp.up_proj.weight": "aiter_16x16"})

    """
    found = targets(model)
    unknown = [name for name in layouts if name not in found]
    if unknown:
        raise LayoutError(f"no parameter {unknown[0]!r}; there are {', '.join(found)}")
    done: list[Tensor] = []
    try:
        for name, layout in layouts.items():
            if set_layout(found[name].tensor, layout, repr(name)):
                done.append(found[name].tensor)
    except LayoutError:
        for param in done:
            reset_layout(param)
        raise
    protect(model)


def reset_layouts(model: nn.Module) -> None:
    """Give all parameters of a model the checkpoint's layout again."""
    for name, target in targets(model).items():
        reset_layout(target.tensor, repr(name))


def protect(model: nn.Module) -> None:
    """Protect the modules of `model` that hold a parameter with a layout; calls may be repeated."""
    for module in model.modules():
        if _REDUCE not in vars(module) and any(_rearranged(module)):
            module.register_state_dict_post_hook(_show_logical)
            module.register_load_state_dict_pre_hook(_take_logical)
            vars(module)[_REDUCE] = _Reduce(module)


def _rearranged(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters whose shape or strides hide the logical values."""
    return {
        name: param
        for name, param in module._parameters.items()
        if param is not None and (found := record_of(param)) is not None
        if (found.plan.shown, found.plan.strides)
        != (found.plan.logical, found.plan.logical_strides)
    }


def _show_logical(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, param in _rearranged(module).items():
        if prefix + name in state:
            state[prefix + name] = (
                param.detach().clone()
                if shows_checkpoint(param)
                else logical(param, repr(prefix + name))
            )


def _take_logical(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, param in _rearranged(module).items():
        value, found = state.get(prefix + name), record_of(param)
        if found is None or shows_checkpoint(param) or not isinstance(value, Tensor):
            continue
        if value is param:
            continue
        if tuple(value.shape) == found.plan.logical:
            check_memory(param, found, repr(prefix + name))
            with torch.no_grad():
                write(memory_of(param, found.plan), found.plan, Region.of(found.plan), value)
            torch.autograd.graph.increment_version(param)
            # torch then copies the parameter onto itself.
            state[prefix + name] = param


class _Reduce:
    """The `__reduce_ex__` of a protected module, which copy and pickle call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, protocol: int) -> Any:
        rearranged = _rearranged(self.module)
        if rearranged:
            raise LayoutError(
                f"{type(self.module).__name__} has weights with a layout ({', '.join(rearranged)}) "
                "and a copy of it would take their bytes for logical values: copy its "
                "state_dict(), or call fixpass.weights.reset_layouts first"
            )
        del vars(self.module)[_REDUCE]
        return self.module.__reduce_ex__(protocol)
