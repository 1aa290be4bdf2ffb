"""Where the bytes of a parameter go.

A plain parameter is written where it is. Of a DTensor this rank writes its local part. Nothing is
written here, and what a checkpoint calls the parameter is not known.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.box import Box, Shape
from fixpass.runtime.weights.local import is_freed, local_box


@dataclass(frozen=True, slots=True)
class Destination:
    """Memory of a parameter in the layout of its checkpoint.

    tensor: a view to write into, of any strides. box: which part of the whole parameter it is.
    whole: the parameter's shape in the checkpoint.
    """

    tensor: Tensor
    box: Box
    whole: Shape


def destination(param: Tensor, name: str = "the parameter") -> Destination:
    """Where the bytes of `param` go on this rank; `name` is for messages.

    Raises CheckpointError where there is no memory to write to.
    """
    if param.device.type == "meta":
        raise CheckpointError(
            f"{name} is on the meta device and has no memory: model.to_empty(device=...) gives it"
        )
    if param.layout != torch.strided:
        raise CheckpointError(f"{name} is {param.layout}: only strided parameters are loaded")
    local, box = local_box(param.detach())
    if is_freed(local):
        raise CheckpointError(f"{name} has no memory any more: it was freed")
    if any(
        stride == 0 and size > 1 for stride, size in zip(local.stride(), local.shape, strict=True)
    ):
        raise CheckpointError(f"{name} is expanded: its elements share their memory. clone() it")
    return Destination(local, box, tuple(param.shape))
