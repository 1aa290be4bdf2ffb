"""`copy_or_rebind`: put a new value, of any layout, into a Parameter that stays what it is.

The memory stays wherever the new bytes have room in it; the strides become those of the new value,
because a kernel asked for them. Attributes of the new value are merged in. Whether the pointer
moved is said: a captured graph would go on with the old one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.relayout import packed, record_of
from fixpass.runtime.weights.tile_copy import wide_copy


@dataclass(frozen=True)
class Rebound:
    """What became of a parameter. staged: the new value lay over the old one and was copied."""

    moved: bool
    reshaped: bool
    staged: bool
    merged: tuple[str, ...]


def copy_or_rebind(param: Tensor, new: Tensor, name: str = "the parameter") -> Rebound:
    """Give `param` the values, shape, strides, dtype and attributes of `new`.

    Object, class, requires_grad and its own attributes stay; so does its memory, if `new` is on
    the same device, leaves no gaps and has no more bytes than the memory holds. `new` may lie
    over it, as a transpose does.
    """
    _check(param, new, name)
    value = new.detach()
    room = param.untyped_storage().nbytes() - param.storage_offset() * param.element_size()
    extra = dict(vars(new)) if new is not param else {}
    fits = value.device == param.device and value.nbytes <= room and _has_no_gaps(value)
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
    # Behind the data: a tag that says what the data is must never be true too early.
    merged = tuple(sorted(extra))
    for key, item in extra.items():
        param.__dict__[key] = item
    return Rebound(moved, reshaped, staged, merged)


def _write(param: Tensor, value: Tensor) -> None:
    """Show the memory of `param` as `value` lies, and copy it there."""
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
        raise WeightError(what + "it is folded; fixpass.weights.unfold it first")
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
