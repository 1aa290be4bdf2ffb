"""Lay a weight out in memory in another order of its dimensions; its values and shape stay.

What reads it sees other strides and the same numbers: eager code, `state_dict` and loaders go on
as before. So nothing is recorded: it is no fold that anybody has to undo. The object, its
attributes and its address stay.
"""

import torch
from torch import Tensor

from fixpass.runtime.weights.layouts import Layout, Stride
from fixpass.runtime.weights.lock import closed, over
from fixpass.runtime.weights.relayout import set_layout
from fixpass.runtime.weights.table import forget, record_of

_PATIENCE = 30.0
"""Seconds that calls under way are waited for."""


def restride(param: Tensor, order: tuple[int, ...], name: str) -> None:
    """Store `param` with its dimensions in `order`, outermost first.

    It has to be dense and row-major now. Raises LayoutError where it has no memory of its own to
    lay out, and UpdateError from inside a call that reads it.
    """
    layout = Layout(f"stored {order}", (Stride(tuple(range(len(order))), order),))
    with closed(over((param,)), timeout=_PATIENCE):
        set_layout(param, layout, name)
        forget(param)


def obstacle(param: Tensor) -> str:
    """Why the memory of `param` is not to be touched, or "": others may look at it."""
    if record_of(param) is not None:
        return "it is folded already"
    if not param.is_contiguous():
        return "it is not row-major"
    storage = param.untyped_storage()
    if storage.nbytes() != param.nbytes:
        return "it is a part of a larger storage"
    if param.device.type == "cpu" and storage.is_shared():
        return "other processes share its memory"
    if _users(param) > _users(torch.empty(1, device=param.device)):
        return "another tensor shares its memory"
    return ""


def _users(tensor: Tensor) -> int:
    """How many hold the storage of a tensor; what looking costs is counted too."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))
