"""Parameters as views of one packed tensor: q, k and v of a projection, gate and up of an MLP.

`pack` moves the memory of the parameters once. Each stays the same Parameter object, so that a load
of any of them writes the pack, which is never stale. Nothing is concatenated again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.layouts import Alias, WeightLayout, named
from fixpass.runtime.weights.relayout import PackedPart, forget, packed, record, record_of


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
