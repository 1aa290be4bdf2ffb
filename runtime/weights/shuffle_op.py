"""The op `fixpass::shuffle_weight`: a copy of a weight in a kernel's layout of the same shape.

A weight that has the layout already, by `set_layout`, is copied as it is. So a model may call the
op before and after. In a compiled graph the pass fold-weights removes the op from every call. The
op has no gradient.
"""

import torch
from torch import Tensor

from fixpass.runtime import ops
from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.layout_plan import LayoutPlan, resolve
from fixpass.runtime.weights.layouts import named
from fixpass.runtime.weights.parameter_layout import layout_of
from fixpass.runtime.weights.region import Region, write
from fixpass.runtime.weights.stored import dense_strides


def shuffle_weight(weight: Tensor, layout: str) -> Tensor:
    """A contiguous copy of `weight` in the order of `layout`, of the same shape and dtype.

    Raises:
        LayoutError: the layout is unknown, does not fit or changes the shape, or the weight has
            another layout.

    """
    result: Tensor = torch.ops.fixpass.shuffle_weight(weight, layout)
    return result


def has_layout(weight: Tensor, layout: str) -> bool:
    """Whether `set_layout` gave `weight` this layout."""
    return layout_of(weight) == named(layout)


def _shuffle(weight: Tensor, layout: str) -> Tensor:
    found = layout_of(weight)
    if found is not None and found != named(layout):
        raise LayoutError(
            f"a weight {tuple(weight.shape)} has layout {found} and cannot be shuffled into "
            f"{layout}: call fixpass.weights.reset_layout first"
        )
    if found is not None:
        return weight.clone(memory_format=torch.contiguous_format)
    plan = _plan(weight, layout)
    memory = torch.empty(plan.numel, dtype=weight.dtype, device=weight.device)
    write(memory, plan, Region.of(plan), weight)
    return memory.view(weight.shape)


def _fake_shuffle(weight: Tensor, layout: str) -> Tensor:
    _plan(weight, layout)
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _plan(weight: Tensor, layout: str) -> LayoutPlan:
    shape = tuple(int(size) for size in weight.shape)
    plan = resolve(named(layout), shape, weight.element_size())
    if (plan.shown, plan.strides, plan.padded) != (shape, dense_strides(shape), shape):
        raise LayoutError(
            f"layout {layout} makes {plan.shown} of {shape}, and fixpass::shuffle_weight keeps "
            "shapes: use fixpass.weights.set_layout"
        )
    return plan


ops.DEFINITIONS.define(
    "shuffle_weight(Tensor weight, str layout) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
ops.DEFINITIONS.impl("shuffle_weight", _shuffle, "CompositeExplicitAutograd")
torch.library.register_fake("fixpass::shuffle_weight", _fake_shuffle, lib=ops.DEFINITIONS)
