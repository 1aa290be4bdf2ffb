"""What an update may not change of a parameter, written down before and compared after.

Object, class, attributes by identity, requires_grad, dtype, device, shape, strides and address. A
difference is an UpdateError that lists all of them. Values are not looked at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime.errors import UpdateError


@dataclass(frozen=True)
class Identity:
    """One parameter as it was; it is held, so that no id can be used again."""

    param: Tensor
    kind: type
    attributes: Mapping[str, Any]
    requires_grad: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    pointer: int

    @staticmethod
    def of(param: Tensor) -> "Identity":
        local = _local(param)
        return Identity(
            param,
            type(param),
            dict(vars(param)),
            param.requires_grad,
            local.dtype,
            tuple(local.shape),
            tuple(local.stride()),
            local.data_ptr(),
        )

    def violations(self, param: Tensor | None, *, moved: bool = False) -> list[str]:
        """What is different now; with `moved` the address may be another."""
        if param is not self.param:
            return ["another object is in its place"]
        local, found = _local(param), []
        if type(param) is not self.kind:
            found.append(f"its class was {self.kind.__name__} and is {type(param).__name__}")
        for key in sorted({*self.attributes, *vars(param)}):
            if key not in vars(param):
                found.append(f"attribute {key!r} is gone")
            elif key not in self.attributes:
                found.append(f"attribute {key!r} is new")
            elif vars(param)[key] is not self.attributes[key]:
                found.append(f"attribute {key!r} is another object")
        pairs = (
            ("requires_grad", self.requires_grad, param.requires_grad),
            ("dtype", self.dtype, local.dtype),
            ("shape", self.shape, tuple(local.shape)),
            ("stride", self.stride, tuple(local.stride())),
            ("address", self.pointer if not moved else 0, local.data_ptr() if not moved else 0),
        )
        found += [f"{what} was {was} and is {now}" for what, was, now in pairs if was != now]
        return found


@dataclass(frozen=True)
class Manifest:
    """The identities of a model's parameters by name."""

    identities: Mapping[str, Identity]

    @staticmethod
    def of(params: Mapping[str, Tensor]) -> "Manifest":
        return Manifest({name: Identity.of(param) for name, param in params.items()})

    def check(self, params: Mapping[str, Tensor], *, moved: bool = False) -> None:
        """Raise UpdateError where anything is different."""
        faults = [
            f"{name}: {fault}"
            for name, identity in self.identities.items()
            for fault in identity.violations(params.get(name), moved=moved)
        ]
        if faults:
            raise UpdateError("the update changed more than values: " + "; ".join(faults[:10]))


def _local(param: Tensor) -> Tensor:
    """The memory of this rank: of a DTensor, its local part."""
    from torch.distributed.tensor import DTensor

    return param._local_tensor if isinstance(param, DTensor) else param
