"""The memory of a parameter as a checkpoint sees it, in any layout.

A plain parameter is written where it lies. Of a DTensor this rank writes the local part. Of a
parameter with a layout the view has the checkpoint's shape; where strides can't express the layout,
`LogicalView.put` brings values to where their elements lie. Nothing is written here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.layout_plan import LayoutPlan
from fixpass.runtime.weights.region import Region, write
from fixpass.runtime.weights.relayout import check_memory, memory_of, record_of
from fixpass.runtime.weights.stored import Box, Shape
from fixpass.runtime.weights.targets import is_freed, local_box


class LogicalView(NamedTuple):
    """A parameter with a layout that strides can't express."""

    memory: Tensor
    """Its elements as they lie, 1-D."""
    plan: LayoutPlan

    def put(self, values: Tensor, part: Tensor) -> None:
        """Write values where the elements of `part` lie, a view of the destination's tensor."""
        start = int(part.storage_offset()) - int(self.memory.storage_offset())
        region = Region(tuple(part.shape), tuple(part.stride()), start)
        with torch.no_grad():
            write(self.memory, self.plan, region, values)


class Destination(NamedTuple):
    """Memory of a parameter in the checkpoint's layout."""

    tensor: Tensor
    """A view of the checkpoint's shape. With a `view` its strides only name the elements."""
    box: Box
    """The box of the whole parameter that lies on this rank."""
    whole: Shape
    """The shape of the whole parameter in the checkpoint."""
    view: LogicalView | None = None

    @property
    def memory(self) -> Tensor:
        """The memory that is written, as a tensor that names all of it."""
        return self.tensor if self.view is None else self.view.memory


def destination(param: Tensor, name: str = "the parameter") -> Destination:
    """The memory of `param` on this rank.

    Args:
        param: the parameter or buffer, in any layout.
        name: stands in messages.

    Raises:
        CheckpointError: there is no memory of its own to write to.
        LayoutError: a parameter with a layout was given other memory.

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
    found = record_of(param)
    if found is None:
        return Destination(local, box, tuple(param.shape))
    check_memory(param, found, name)
    plan = found.plan
    memory = memory_of(local, plan)
    strides = plan.logical_strides or plan.index_strides
    shown = memory.as_strided(plan.logical, strides, memory.storage_offset())
    view = LogicalView(memory, plan) if plan.logical_strides is None else None
    return Destination(shown, Box.whole(plan.logical), plan.logical, view)
