"""Parameters as views of one pack: q, k and v of a projection, gate and up of an MLP.

Each stays the Parameter that it was; loading any of them is loading the pack, which is therefore
never stale. Their memory moves once, into the pack. Nothing is concatenated again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.layouts import Alias, Layout, named
from fixpass.runtime.weights.relayout import PackedPart, forget, packed, record, record_of


def pack(params: Sequence[Tensor], layout: str | Layout = "qkv_pack") -> Tensor:
    """The parameters as one tensor, of which each becomes a view.

    Packing the same parameters again gives the same pack. Raises LayoutError where one of them is
    folded, lies in another pack, or does not fit the others.
    """
    layout = named(layout)
    alias = layout.folds[0] if layout.folds else None
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
            place = PackedPart(layout, whole, alias.dim, start, size)
            param.data = place.view
            record(param, place)
            start += size
    return whole


def unpack(param: Tensor) -> bool:
    """Give `param` memory of its own again; whether it was packed. The others stay in the pack."""
    if packed(param) is None:
        return False
    param.data = param.detach().clone(memory_format=torch.contiguous_format)
    forget(param)
    return True


def has_left_pack(param: Tensor) -> bool:
    """Whether a packed parameter was given other memory, so that its pack misses its values."""
    found = packed(param)
    return found is not None and param.data_ptr() != found.view.data_ptr()


def return_to_pack(param: Tensor) -> None:
    """Copy a parameter that was given other memory into its pack, and make it a view again."""
    found = packed(param)
    if found is None or not has_left_pack(param):
        return
    if (param.shape, param.dtype) != (found.view.shape, found.pack.dtype):
        raise LayoutError(
            f"a parameter of {found.layout} was replaced by {param.dtype} {tuple(param.shape)}, "
            f"and its place holds {found.pack.dtype} {tuple(found.view.shape)}"
        )
    with torch.no_grad():
        found.view.copy_(param.detach())
        param.data = found.view


def _same_pack(params: Sequence[Tensor], layout: Layout) -> Tensor | None:
    found = [packed(param) for param in params]
    first = found[0]
    if first is None or any(p is None or p.pack is not first.pack for p in found):
        return None
    starts = [p.start for p in found if p is not None]
    whole = sum(p.size for p in found if p is not None) == first.pack.shape[first.dim]
    return first.pack if starts == sorted(starts) and whole and first.layout == layout else None


def _check(params: Sequence[Tensor], layout: Layout, dim: int) -> None:
    first = params[0]
    if len({id(param) for param in params}) != len(params):
        raise LayoutError(f"layout {layout}: a parameter is given twice")
    for index, param in enumerate(params):
        what = f"layout {layout}: parameter {index}, {param.dtype} {tuple(param.shape)}, "
        if packed(param) is not None or record_of(param) is not None:
            raise LayoutError(what + "is folded already: unfold it first")
        if type(param.detach()) is not torch.Tensor or param.layout != torch.strided:
            raise LayoutError(what + f"is a {type(param.detach()).__name__}, not a plain tensor")
        if (param.dtype, param.device) != (first.dtype, first.device):
            raise LayoutError(what + f"does not go with {first.dtype} on {first.device}")
        others = [size for axis, size in enumerate(param.shape) if axis != dim]
        if others != [size for axis, size in enumerate(first.shape) if axis != dim]:
            raise LayoutError(what + f"does not fit {tuple(first.shape)} along dimension {dim}")
