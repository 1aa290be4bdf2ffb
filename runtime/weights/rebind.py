"""Give parameters other memory: `pack` several into one tensor, or `copy_or_rebind` a value.

`pack` moves the memory of parameters into one tensor once. Each stays the same Parameter object, so
that a load of any of them writes the pack. `copy_or_rebind` keeps the memory where the new bytes
fit, and reports whether the address changed: a captured CUDA graph goes on reading the old one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fixpass.runtime.errors import LayoutError, WeightError
from fixpass.runtime.weights.layouts import Alias, WeightLayout, named
from fixpass.runtime.weights.lock import closed, over
from fixpass.runtime.weights.parameter_layout import (
    PackedPart,
    forget,
    owned_bytes,
    packed,
    record,
    record_of,
)
from fixpass.runtime.weights.targets import tensors_of
from fixpass.runtime.weights.tile_copy import wide_copy


def pack(params: Sequence[Tensor], layout: str | WeightLayout = "qkv_pack") -> Tensor:
    """Move parameters into one tensor, of which each becomes a view.

    Packing the same parameters in the same order again gives the same tensor.

    Raises:
        LayoutError: a parameter has a layout, is part of another pack, or does not fit the others.

    Example:
        >>> qkv = pack([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight])

    """
    layout = named(layout)
    alias = layout.steps[0] if layout.steps else None
    if not isinstance(alias, Alias):
        raise LayoutError(f"layout {layout} is of one parameter: give it one, not {len(params)}")
    held = _same_pack(params, layout)
    if held is not None:
        return held
    _check(params, layout, alias.dim)
    with torch.no_grad():
        whole = torch.cat([param.detach() for param in params], alias.dim)
        start = 0
        for param in params:
            size = param.shape[alias.dim]
            part = PackedPart(layout, whole, alias.dim, start, size)
            param.data = part.view
            record(param, part)
            start += size
    return whole


def unpack(param: Tensor) -> bool:
    """Give `param` memory of its own; returns whether it was packed. The others stay packed."""
    if packed(param) is None:
        return False
    param.data = param.detach().clone(memory_format=torch.contiguous_format)
    forget(param)
    return True


def has_left_pack(param: Tensor) -> bool:
    """Whether a packed parameter was given other memory: the pack has old values then."""
    found = packed(param)
    return found is not None and param.data_ptr() != found.view.data_ptr()


def return_to_pack(param: Tensor) -> None:
    """Copy a parameter that was given other memory into its pack, whose view it becomes again."""
    found = packed(param)
    if found is None or not has_left_pack(param):
        return
    if (param.shape, param.dtype) != (found.view.shape, found.pack.dtype):
        raise LayoutError(
            f"a parameter of {found.layout} was replaced by {param.dtype} {tuple(param.shape)}, "
            f"and its part of the pack is {found.pack.dtype} {tuple(found.view.shape)}"
        )
    with torch.no_grad():
        found.view.copy_(param.detach())
        param.data = found.view


def bring_back_packed(model: nn.Module, timeout: float | None) -> None:
    """Parameters of a pack that were given other memory go back to it: kernels read the pack."""
    away = [tensor for tensor in tensors_of(model) if has_left_pack(tensor)]
    if away:
        with closed(over(away), timeout):
            for tensor in away:
                return_to_pack(tensor)


def _same_pack(params: Sequence[Tensor], layout: WeightLayout) -> Tensor | None:
    found = [packed(param) for param in params]
    first = found[0]
    if first is None or any(p is None or p.pack is not first.pack for p in found):
        return None
    starts = [p.start for p in found if p is not None]
    whole = sum(p.size for p in found if p is not None) == first.pack.shape[first.dim]
    return first.pack if starts == sorted(starts) and whole and first.layout == layout else None


def _check(params: Sequence[Tensor], layout: WeightLayout, dim: int) -> None:
    first = params[0]
    if len({id(param) for param in params}) != len(params):
        raise LayoutError(f"layout {layout}: a parameter is given twice")
    for index, param in enumerate(params):
        what = f"layout {layout}: parameter {index}, {param.dtype} {tuple(param.shape)}, "
        if packed(param) is not None or record_of(param) is not None:
            raise LayoutError(
                what + "has a layout or pack already: reset_layout or unpack it first"
            )
        if type(param.detach()) is not torch.Tensor or param.layout != torch.strided:
            raise LayoutError(what + f"is a {type(param.detach()).__name__}, not a plain tensor")
        if (param.dtype, param.device) != (first.dtype, first.device):
            raise LayoutError(what + f"does not go with {first.dtype} on {first.device}")
        others = [size for axis, size in enumerate(param.shape) if axis != dim]
        if others != [size for axis, size in enumerate(first.shape) if axis != dim]:
            raise LayoutError(what + f"does not fit {tuple(first.shape)} along dimension {dim}")


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
    _check_value(param, new, name)
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


def _check_value(param: Tensor, new: Tensor, name: str) -> None:
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
