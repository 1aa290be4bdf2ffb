"""Find the tensors that an update leaves stale, and the views that must follow moved weights.

A model is searched for tensors that follow from its weights before its first update, and again when
its signature changes (names, shapes, strides, dtypes, classes) or a tensor is declared. Until then
the result is kept, and an update of a model without such tensors asks one dict.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights.census import followers
from fixpass.runtime.weights.derived import SEARCHED
from fixpass.runtime.weights.options import OnStale
from fixpass.runtime.weights.reachable import place_of, reachable
from fixpass.runtime.weights.reports import some


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


def keep_search(model: nn.Module, signature: object) -> None:
    """Keep the last search of a model for an update of this signature; drop that of another one."""
    if _SIGNATURES.get(model) != signature:
        SEARCHED.pop(model, None)


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
    own = [t for t in weights if t.layout is torch.strided and not isinstance(t, DTensor)]
    lone = torch.empty(1, device="cpu")
    # All are held while they are counted, as the address of one that is not may be used again.
    storages = list(map(Tensor.untyped_storage, (lone, *own)))
    once, *users = map(torch._C._storage_Use_Count, map(_address, storages))
    known: dict[int, set[int]] = {}
    more: dict[int, int] = {}  # users beside the first
    for tensor, storage, count in zip(own, storages[1:], users, strict=True):
        if count != once:
            known.setdefault(storage.data_ptr(), set()).add(id(tensor))
            more[storage.data_ptr()] = count - once
    shared = {
        pointer for pointer, count in more.items() if pointer and count >= len(known[pointer])
    }
    if not shared:
        return []
    ids = set(map(id, own))
    found = {
        id(value): value
        for _, value, _ in reachable(model)
        if isinstance(value, Tensor) and id(value) not in ids and place_of(value) in shared
    }
    return list(found.values())


_address = attrgetter("_cdata")
