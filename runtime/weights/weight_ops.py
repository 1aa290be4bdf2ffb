"""The ops `fixpass::prepacked_linear` and `fixpass::shuffle_weight`, which have no gradient.

oneDNN packs a plain weight of 16 bits per element again in each call of a linear layer. A packed
weight is an opaque tensor, which no graph takes as an input: so the graph takes a number, under
which the packed weight is kept as long as its handle lives. CPU only: for a plain float32 weight
torch calls MKL, which is slower on many processors.

`shuffle_weight` copies a weight into a kernel's layout of the same shape; a weight that has the
layout already, by `set_layout`, is copied as it is. So a model may call the op before and after.
In a compiled graph the pass fold-weights removes the op from every call.
"""

import itertools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from weakref import finalize

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fixpass.runtime import ops
from fixpass.runtime.errors import LayoutError, WeightError
from fixpass.runtime.weights.layout_plan import LayoutPlan, resolve
from fixpass.runtime.weights.layouts import named
from fixpass.runtime.weights.parameter_layout import layout_of
from fixpass.runtime.weights.region import Region, write
from fixpass.runtime.weights.stored import dense_strides

_NUMBERS = itertools.count(1)
_PACKED: dict[int, Tensor] = {}


def packable_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes of weights that oneDNN packs on this CPU. Empty but on x86, where we measured."""
    mkldnn = torch.backends.mkldnn
    is_known = platform.machine().lower() in ("x86_64", "amd64")
    if not (is_known and mkldnn.is_available() and torch._C._get_mkldnn_enabled()):
        return ()
    supported = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return tuple(dtype for dtype, yes in supported.items() if yes)


@dataclass(frozen=True)
class Prepacked:
    """A `Packer`: packs a cached value for oneDNN and gives its handle."""

    weight_of: Callable[[Tensor], Tensor]
    """Makes the weight (out_features, in_features) of a linear layer from the value."""

    def __call__(self, value: Tensor) -> Tensor:
        """Pack a value; returns a new handle, an int64 tensor of one element."""
        packed = torch.ops.mkldnn._reorder_linear_weight(self.weight_of(value).contiguous())
        number = next(_NUMBERS)
        handle = torch.tensor([number], device="cpu")
        _PACKED[number] = packed
        finalize(handle, _PACKED.pop, number, None)
        return handle

    def nbytes(self, handle: Tensor) -> int:
        """Bytes of the packed weight."""
        return _PACKED[int(handle)].nbytes


def _run_linear(x: Tensor, handle: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    packed = _PACKED.get(int(handle))
    if packed is None:
        raise WeightError(
            f"no packed weight has the handle {int(handle)} in this process: handles are of one "
            "process and one compiled graph, and are not saved with it"
        )
    if forward_ad._current_level >= 0 and any(map(_has_tangent, (x, bias))):
        raise WeightError(
            "fixpass::prepacked_linear has no forward-mode derivative: compile with "
            'options={"disable": ["prepack-linears"]}'
        )
    if bias is not None:
        # oneDNN reads it as if it were contiguous.
        bias = bias.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return result


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def _fake_linear(x: Tensor, handle: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


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


def _define(library: torch.library.Library) -> None:
    library.define(
        "prepacked_linear(Tensor x, Tensor handle, Tensor? bias, int out_features) -> Tensor",
        tags=torch.Tag.pt2_compliant_tag,
    )
    library.impl("prepacked_linear", _run_linear, "CPU")
    torch.library.register_fake("fixpass::prepacked_linear", _fake_linear, lib=library)
    library.define(
        "shuffle_weight(Tensor weight, str layout) -> Tensor", tags=torch.Tag.pt2_compliant_tag
    )
    library.impl("shuffle_weight", _shuffle, "CompositeExplicitAutograd")
    torch.library.register_fake("fixpass::shuffle_weight", _fake_shuffle, lib=library)


_define(ops.DEFINITIONS)
