"""Attributes of parameters, such as weight_loader, that a wrapper throws away.

FSDP2 replaces every parameter, and with it its class and whatever was set on it. `remember` notes
both before, `recall` sets the attributes on the new parameters, `remembered` finds them by module
and name. Nothing is kept alive: a module's notes go with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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
    """Note class and attributes of all parameters of `model`."""
    for module in model.modules():
        notes = {
            name: note(param) for name, param in module._parameters.items() if param is not None
        }
        if notes:
            _NOTES[module] = notes


def recall(model: nn.Module) -> None:
    """Set the attributes that were noted on the parameters that are there now."""
    for module in model.modules():
        for name, noted in _NOTES.get(module, {}).items():
            param = module._parameters.get(name)
            if param is not None:
                param.__dict__.update(noted.attributes)


def remembered(module: nn.Module, name: str) -> Remembered | None:
    """What was noted of the parameter `name` of `module`; None where nothing was."""
    return _NOTES.get(module, {}).get(name)
