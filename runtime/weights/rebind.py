"""`copy_or_rebind`: put a new value of any shape and strides into the same Parameter object.

The memory stays where the new bytes fit into it. The strides become those of the new value, because
a kernel asked for them. The report says whether the address changed: a captured CUDA graph goes on
reading the old one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.relayout import owned_bytes, packed, record_of
from fixpass.runtime.weights.tile_copy import wide_copy


@dataclass(frozen=True)
class Rebound:
    """A report of `copy_or_rebind`."""

    moved: bool
    """The address changed."""
    reshaped: bool
    """Shape or strides changed."""
    staged: bool
    """The new value shared memory with the parameter, and was cloned first."""
    merged: tuple[str, ...]
    """Names of the attributes that were taken over from the new value."""


def copy_or_rebind(param: Tensor, new: Tensor, name: str = "the parameter") -> Rebound:
    """Give `param` the values, shape, strides, dtype and attributes of `new`.

    The object, its class, requires_grad and its own attributes stay. So does its memory, if `new`
    is on the same device, has no gaps and has no more bytes than the memory. `new` may share that
    memory, as a transpose of `param` does.

    Raises:
        WeightError: one of the two has a layout, no memory or a class of its own, or `param` has a
            gradient that would not fit.

    """
    _check(param, new, name)
    value = new.detach()
    extra = dict(vars(new)) if new is not param else {}
    fits = (
        value.device == param.device and value.nbytes <= owned_bytes(param) and _has_no_gaps(value)
    )
    if fits and not param.storage_offset() * param.element_size() % value.element_size():
        staged = _shares(param, value)
        reshaped = (value.shape, value.stride()) != (param.shape, param.stride())
        if staged and (reshaped or value.data_ptr() != param.data_ptr()):
            value = value.clone(memory_format=torch.preserve_format)
        _write(param, value)
        moved = False
    else:
        staged, reshaped, moved = False, True, True
        param.data = value.clone(memory_format=torch.preserve_format)
    torch.autograd.graph.increment_version(param)
    # After the data: an attribute that describes the data must not be true too early.
    merged = tuple(sorted(extra))
    for key, item in extra.items():
        param.__dict__[key] = item
    return Rebound(moved, reshaped, staged, merged)


def _write(param: Tensor, value: Tensor) -> None:
    """Give `param` the shape and strides of `value` over its own memory, and copy the value."""
    start = param.storage_offset() * param.element_size()
    memory = param.detach().untyped_storage()
    data = torch.empty(0, dtype=value.dtype, device=value.device)
    data.set_(memory, start // value.element_size(), value.shape, value.stride())
    with torch.no_grad():
        if data.data_ptr() != value.data_ptr():
            strides = value.stride()
            order = sorted(range(value.dim()), key=lambda dim: -strides[dim])
            wide_copy(data.permute(order), value.permute(order))
        if (data.shape, data.stride(), data.dtype) != (param.shape, param.stride(), param.dtype):
            param.data = data


def _check(param: Tensor, new: Tensor, name: str) -> None:
    what = f"{name}, {param.dtype} {tuple(param.shape)}: "
    if record_of(param) is not None or packed(param) is not None:
        raise WeightError(
            what
            + "it has a layout or is part of a pack: call fixpass.weights.reset_layout, or unpack"
        )
    for tensor in (param, new):
        if type(tensor.detach()) not in (Tensor, nn.Parameter):
            raise WeightError(
                what + f"{type(tensor.detach()).__name__} is no plain tensor. Copy its local part"
            )
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            raise WeightError(what + f"{tensor.device}, {tensor.layout} has no memory to write")
    if param.grad is not None and (param.shape, param.dtype) != (new.shape, new.dtype):
        raise WeightError(what + "it has a gradient of its shape and dtype: set grad to None")
    if param.requires_grad and not new.dtype.is_floating_point and not new.dtype.is_complex:
        raise WeightError(what + f"it requires gradients, which {new.dtype} cannot have")


def _has_no_gaps(value: Tensor) -> bool:
    span = 1 + sum((s - 1) * t for s, t in zip(value.shape, value.stride(), strict=True))
    return value.numel() == 0 or span == value.numel()


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0
