"""What an update may not change of a parameter, written down before and compared after.

Object, class, attributes by identity, requires_grad, dtype, device, shape, strides and address. A
difference is an UpdateError that lists all of them. Values are not looked at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fixpass.runtime.checkpoint.local import local_part
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
        local = local_part(param)
        strided = local.layout == torch.strided
        return Identity(
            param,
            type(param),
            dict(vars(param)),
            param.requires_grad,
            local.dtype,
            tuple(local.shape),
            local.stride() if strided else (),
            local.data_ptr() if strided else 0,
        )

    def violations(self, param: Tensor | None, *, moved: bool = False) -> list[str]:
        """What is different now; with `moved` the address may be another."""
        if param is not self.param:
            return ["another object is in its place"]
        now, found = Identity.of(param), []
        if type(param) is not self.kind:
            found.append(f"its class was {self.kind.__name__} and is {type(param).__name__}")
        for key in sorted({*self.attributes, *now.attributes}):
            if key not in now.attributes:
                found.append(f"attribute {key!r} is gone")
            elif key not in self.attributes:
                found.append(f"attribute {key!r} is new")
            elif now.attributes[key] is not self.attributes[key]:
                found.append(f"attribute {key!r} is another object")
        pairs = [
            ("requires_grad", self.requires_grad, now.requires_grad),
            ("dtype", self.dtype, now.dtype),
            ("shape", self.shape, now.shape),
            ("stride", self.stride, now.stride),
        ]
        if not moved:
            pairs.append(("address", self.pointer, now.pointer))
        found += [f"{what} was {was} and is {then}" for what, was, then in pairs if was != then]
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
