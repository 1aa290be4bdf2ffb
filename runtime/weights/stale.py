"""What an update of weights leaves stale, and the views that have to follow weights elsewhere.

A model is searched for tensors that follow from its weights before its first update, and again when
its signature changes (names, shapes, strides, dtypes, classes) or a tensor is declared. Until then
the result is kept, and an update of a model without such tensors asks one dict.
"""

from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights.census import followers
from fixpass.runtime.weights.derived import SEARCHED
from fixpass.runtime.weights.options import OnStale, some
from fixpass.runtime.weights.reachable import reachable
from fixpass.runtime.weights.targets import PLAIN


class StaleWarning(UserWarning):
    """An update wrote weights, and tensors that follow from them were not refreshed."""


_SIGNATURES: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()
"""The signatures of models when they were searched."""


def stale_after(
    model: nn.Module, signature: object, written: Iterable[str], on_stale: OnStale
) -> tuple[str, ...]:
    """Tensors that an update leaves stale, in words. Call it before the weights are written.

    Args:
        model: the model, whose last search is used if its signature is the same.
        signature: of the model now.
        written: the names of the weights that the update writes.
        on_stale: with "raise" an error says which tensors would be stale.

    Raises:
        UpdateError: a tensor would be stale, and `on_stale` says so.

    """
    if model not in SEARCHED or _SIGNATURES.get(model) != signature:
        SEARCHED[model] = followers(model)
        _SIGNATURES[model] = signature
    names = frozenset(written)
    stale = tuple(
        f"{entry.names[0]} ({entry.relation})"
        for entry in SEARCHED[model]
        if entry.relation is not None
        and not names.isdisjoint(entry.relation.of)
        and names.isdisjoint(entry.names)
    )
    if stale and on_stale == "raise":
        raise UpdateError(f"the update would leave tensors stale: {_way_out(stale)}")
    return stale


def _way_out(stale: Sequence[str]) -> str:
    return (
        f"{some(tuple(stale), 5)}. Declare them with fixpass.weights.derive, or say "
        "on_stale='ignore' if you refresh them yourself"
    )


def warning_of(stale: Sequence[str]) -> StaleWarning:
    """The warning of an update that left tensors stale."""
    return StaleWarning(f"tensors may be stale after the update: {_way_out(stale)}")


def views_of(model: nn.Module, weights: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that a model reaches and that lie in the memory of its weights, beside `weights`.

    The model is searched only if more tensors use the memory than the given ones: torch counts
    them. Call it before anything else holds views of the weights.
    """
    own = [tensor for tensor in weights if type(tensor) in PLAIN and tensor.layout is torch.strided]
    storages = list(map(Tensor.untyped_storage, own))
    pointers = [storage.data_ptr() for storage in storages]
    users = map(torch._C._storage_Use_Count, [storage._cdata for storage in storages])
    lone = torch.empty(1, device="cpu").untyped_storage()
    once = torch._C._storage_Use_Count(lone._cdata) + 1
    known: dict[int, set[int]] = {}
    for tensor, pointer in zip(own, pointers, strict=True):
        known.setdefault(pointer, set()).add(id(tensor))
    counts = dict(zip(pointers, users, strict=True))
    shared = {p for p, count in counts.items() if p and count - once > len(known[p]) - 1}
    if not shared:
        return []
    found = {
        id(held.value): held.value
        for held in reachable(model)
        if isinstance(held.value, Tensor)
        and held.value.layout is torch.strided
        and held.value.untyped_storage().data_ptr() in shared
    }
    for pointer in shared:
        for key in known[pointer]:
            found.pop(key, None)
    return list(found.values())
