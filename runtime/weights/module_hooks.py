"""Modules whose folded weights nobody takes for logical ones.

Of a protected module `state_dict` gives logical values and `load_state_dict` takes them; deepcopy
and pickle, which would lose the fold and keep its bytes, are refused. A forward is not looked at:
the kernels that it calls are what the weights were folded for.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.checkpoint_view import is_open
from fixpass.runtime.weights.layouts import Layout
from fixpass.runtime.weights.region import Region, write
from fixpass.runtime.weights.relayout import (
    check_memory,
    logical,
    memory_of,
    record_of,
    reset_layout,
    set_layout,
)
from fixpass.runtime.weights.targets import targets

_REDUCE = "__reduce_ex__"


def set_layouts(model: nn.Module, layouts: Mapping[str, str | Layout]) -> None:
    """Fold the parameters of these names, all or none, and protect the modules that hold them.

    Raises LayoutError for a name that is not there, and where a layout does not fit.
    """
    found = targets(model)
    unknown = [name for name in layouts if name not in found]
    if unknown:
        raise LayoutError(f"no parameter {unknown[0]!r} to fold; there are {', '.join(found)}")
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
    """Undo the folds of all parameters of a model."""
    for name, target in targets(model).items():
        reset_layout(target.tensor, repr(name))


def protect(model: nn.Module) -> None:
    """Protect all modules of `model` that hold a folded parameter; again is once."""
    for module in model.modules():
        if _REDUCE not in vars(module) and any(_folded(module)):
            module.register_state_dict_post_hook(_show_logical)
            module.register_load_state_dict_pre_hook(_take_logical)
            vars(module)[_REDUCE] = _Reduce(module)


def _folded(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that show anything but their logical values."""
    return {
        name: param
        for name, param in module._parameters.items()
        if param is not None and (found := record_of(param)) is not None
        if (found.plan.shown, found.plan.strides)
        != (found.plan.logical, found.plan.logical_strides)
    }


def _show_logical(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, param in _folded(module).items():
        if prefix + name in state:
            state[prefix + name] = (
                param.detach().clone() if is_open(param) else logical(param, repr(prefix + name))
            )


def _take_logical(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, param in _folded(module).items():
        value, found = state.get(prefix + name), record_of(param)
        if found is None or is_open(param) or not isinstance(value, Tensor):
            continue
        if value is param:
            continue
        if tuple(value.shape) == found.plan.logical:
            check_memory(param, found, repr(prefix + name))
            with torch.no_grad():
                write(memory_of(param, found.plan), found.plan, Region.of(found.plan), value)
            torch.autograd.graph.increment_version(param)
            # What torch then copies is the parameter onto itself.
            state[prefix + name] = param


class _Reduce:
    """A module's `__reduce_ex__`, which copy and pickle call, while it is protected."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, protocol: int) -> Any:
        folded = _folded(self.module)
        if folded:
            raise LayoutError(
                f"{type(self.module).__name__} holds folded weights ({', '.join(folded)}), and a "
                "copy of it would take their bytes for logical values: copy its state_dict(), "
                "or call fixpass.weights.unfold_model first"
            )
        del vars(self.module)[_REDUCE]
        return self.module.__reduce_ex__(protocol)
