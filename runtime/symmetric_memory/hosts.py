"""Which host a process is on, and agreement of the ranks of a group over its store.

Two processes can share memory where they run under one kernel and see the same /dev/shm.
"""

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError

SHM = Path("/dev/shm")


def this_host() -> str:
    """Equal for processes that can share memory: the kernel's boot, and the file system."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{SHM.stat().st_dev}"
    except OSError:
        return f"{os.uname().nodename}:no shared memory"


@dataclass(frozen=True)
class Agreement:
    """What each rank said, by rank; or why they did not all speak: the same on every rank."""

    said: tuple[dict[str, Any], ...] = ()
    failure: str = ""


def agree(
    store: Store, key: str, rank: int, size: int, mine: dict[str, Any], seconds: float
) -> Agreement:
    """Tell the other ranks `mine` and hear theirs; collective.

    The first verdict that reaches the store binds every rank: where one gave up waiting, all hear
    of it and none goes on alone. store: the group's. Never raises for a rank that is silent.
    """
    store.set(f"{key}/{rank}", json.dumps(mine))
    verdict = "all have spoken"
    said: list[dict[str, Any]] = []
    for peer in range(size):
        try:
            store.wait([f"{key}/{peer}"], timedelta(seconds=seconds))
        except DistStoreError:
            verdict = f"rank {peer} did not come to the rendezvous within {seconds:g} s"
            break
        said.append(json.loads(store.get(f"{key}/{peer}")))
    binding = store.compare_set(f"{key}/verdict", "", verdict).decode()
    if binding != "all have spoken":
        return Agreement(failure=binding)
    return Agreement(tuple(said))
