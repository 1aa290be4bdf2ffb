"""Agreement of a group's ranks over its store: each tells the others its facts, or all fail alike.

It moves small JSON values only, and does not interpret them.
"""

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError

COMPLETE = "every rank has answered"


@dataclass(frozen=True)
class Agreement:
    """The answer of each rank, by rank; or why not all answered. It is the same on every rank."""

    answers: tuple[dict[str, Any], ...] = ()
    failure: str = ""


def agree(
    store: Store, key: str, rank: int, size: int, mine: dict[str, Any], seconds: float
) -> Agreement:
    """Tell the other ranks `mine` and read theirs; collective.

    The first verdict in the store binds every rank. Where one rank stops waiting, all others see
    the same failure, and no rank goes on alone. A silent rank is a failure, not an exception.

    Args:
        store: The store of the group.
        key: A prefix that no other agreement of this store uses.
        rank: The rank of this process in the group.
        size: The number of ranks.
        mine: The answer of this rank.
        seconds: How long to wait for each other rank.

    """
    store.set(f"{key}/{rank}", json.dumps(mine))
    verdict = COMPLETE
    answers: list[dict[str, Any]] = []
    for peer in range(size):
        try:
            store.wait([f"{key}/{peer}"], timedelta(seconds=seconds))
        except DistStoreError:
            verdict = f"rank {peer} did not come to the rendezvous within {seconds:g} s"
            break
        answers.append(json.loads(store.get(f"{key}/{peer}")))
    binding = store.compare_set(f"{key}/verdict", "", verdict).decode()
    if binding != COMPLETE:
        return Agreement(failure=binding)
    return Agreement(tuple(answers))
