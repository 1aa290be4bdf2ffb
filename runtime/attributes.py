"""Attributes of parameters, such as `weight_loader`, that survive sharding.

FSDP2 and tensor parallelism replace every parameter by a DTensor without its class and attributes.
`remember` notes both before, `recall` sets the attributes on the new parameters, `remembered`
finds the notes by module and name. Once this module is imported, it also notes what tensor
parallelism replaces. Notes do not keep a module alive.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook


@dataclass(frozen=True)
class Remembered:
    """The class and the attributes that a parameter had."""

    cls: type[Tensor]
    attributes: Mapping[str, Any]

    def like(self, tensor: Tensor) -> Tensor:
        """`tensor` as a parameter of that class with these attributes."""
        made = torch.Tensor._make_subclass(self.cls, tensor.detach(), False)
        made.__dict__.update(self.attributes)
        return made


_DTENSOR_PARTS = ("_local_tensor", "_spec")

_NOTES: WeakKeyDictionary[nn.Module, dict[str, Remembered]] = WeakKeyDictionary()


def note(param: Tensor) -> Remembered:
    """The class and attributes of a parameter; of a DTensor, those that are not its own parts."""
    if isinstance(param, DTensor):
        kept = {name: value for name, value in vars(param).items() if name not in _DTENSOR_PARTS}
        return Remembered(nn.Parameter, kept)
    return Remembered(type(param), dict(vars(param)))


def remember(model: nn.Module) -> None:
    """Note class and attributes of all parameters of `model`.

    A DTensor keeps the class that its parameter had before it became a DTensor.
    """
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                _note_in(module, name, param)


def recall(model: nn.Module) -> None:
    """Set the attributes that were noted on the parameters that are there now."""
    for module in model.modules():
        for name, noted in _NOTES.get(module, {}).items():
            param = module._parameters.get(name)
            if param is not None:
                param.__dict__.update(noted.attributes)


def remembered(module: nn.Module, name: str) -> Remembered | None:
    """The notes on the parameter `name` of `module`; None where there are none."""
    return _NOTES.get(module, {}).get(name)


def keep_through_apply(model: nn.Module) -> None:
    """Keep attributes when `model.to()`, `model.half()` and the like replace its DTensors.

    Torch changes plain parameters in place, and replaces DTensors. Every FSDP2 module in `model`
    gets an `_apply` of its own, which notes the attributes before and sets them again after.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.__dict__["_apply"] = functools.partial(_apply_and_recall, module)


def _apply_and_recall(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    remember(module)
    result: nn.Module = type(module)._apply(module, *args, **kwargs)
    recall(module)
    return result


def _note_in(module: nn.Module, name: str, param: Tensor) -> None:
    noted, former = note(param), remembered(module, name)
    if isinstance(param, DTensor) and former is not None:
        noted = Remembered(former.cls, noted.attributes)
    _NOTES.setdefault(module, {})[name] = noted


def _carry_over(module: nn.Module, name: str, param: Tensor | None) -> None:
    """Note a parameter that a DTensor replaces, and give the DTensor its attributes."""
    old = module._parameters.get(name)
    if not isinstance(param, DTensor) or old is None:
        return
    if type(old) is nn.Parameter and not vars(old):
        return
    _note_in(module, name, old)
    noted = _NOTES[module][name]
    for key, value in noted.attributes.items():
        param.__dict__.setdefault(key, value)


register_module_parameter_registration_hook(_carry_over)
