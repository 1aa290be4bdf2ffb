"""What a model consists of and how each of its tensors lies in memory, looked at in one pass.

It is what an update may not change, and what a plan that was made before depends on. Columns, not
an object a tensor: a mixture of experts has thousands, and each reload looks at all of them twice.
Values are not looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fixpass.runtime.checkpoint.local import local_part

_PLAIN = (nn.Parameter, Tensor)


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """Tensors and, of each, all that is not its values; of a DTensor, of its part on this rank."""

    tensors: Sequence[Tensor]
    kinds: list[type]
    dtypes: list[torch.dtype]
    devices: list[torch.device]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    gradients: list[bool]
    pointers: list[int]
    attributes: list[dict[str, Any]]

    @staticmethod
    def at(tensors: Sequence[Tensor]) -> "Look":
        kinds = [type(tensor) for tensor in tensors]
        plain = all(kind in _PLAIN for kind in set(kinds))
        parts = tensors if plain else [local_part(tensor) for tensor in tensors]
        layouts = [part.layout for part in parts]
        strided = layouts.count(torch.strided) == len(layouts)
        return Look(
            tensors,
            kinds,
            [part.dtype for part in parts],
            [part.device for part in parts],
            [part.shape for part in parts],
            [part.stride() for part in parts] if strided else [_stride(part) for part in parts],
            [tensor.requires_grad for tensor in tensors],
            [part.data_ptr() for part in parts] if strided else [_pointer(part) for part in parts],
            [dict(tensor.__dict__) for tensor in tensors],
        )

    @property
    def layout(self) -> tuple[list[Any], ...]:
        """Two looks at tensors that lie alike, at whatever addresses, have equal ones.

        It holds no tensor.
        """
        return self.kinds, self.dtypes, self.devices, self.shapes, self.strides, self.gradients

    def is_like(self, other: "Look", *, moved: bool = False) -> bool:
        """Whether nothing is different, not even the objects; with `moved` addresses may be."""
        return (
            len(self.tensors) == len(other.tensors)
            and all(map(is_, self.tensors, other.tensors))
            and self.layout == other.layout
            and (moved or self.pointers == other.pointers)
            and all(map(_same, self.attributes, other.attributes))
        )


def walk(model: nn.Module) -> tuple[list[object], list[Tensor]]:
    """Parameters and persistent buffers of a model in an order of its own, and all of its names.

    Equal names are the same tree. A tensor with several names comes with each of them.
    """
    names: list[object] = []
    held: list[Tensor | None] = []
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        names.append(None)
        if module is None:
            continue
        own = module.__dict__
        if modules := own["_modules"]:
            names.extend(modules)
            stack.extend(modules.values())
        names.append(None)
        if parameters := own["_parameters"]:
            names.extend(parameters)
            held.extend(parameters.values())
        if buffers := own["_buffers"]:
            transient = own["_non_persistent_buffers_set"]
            saved = [name for name in buffers if name not in transient]
            names += (None, *saved)
            held.extend([buffers[name] for name in saved])
    tensors = [tensor for tensor in held if tensor is not None]
    names.append([index for index, tensor in enumerate(held) if tensor is None])
    return names, tensors


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if not one and not other:
        return True
    return one.keys() == other.keys() and all(one[key] is other[key] for key in one)


def _stride(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout == torch.strided else ()


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else 0
