"""The ranks that update their models together, and what they tell one another in a Store.

Each rank has one key, which says how far it is. Each attempt to update has two keys more: the
number of steps that its ranks made, and its decision. A rank that waits reads one of these two, in
one round trip.
"""

import json
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_process_group_store

from fixpass.runtime.weights.processes import Process, this_process

Step = Literal["joined", "staged", "voted", "done"]
_STEPS: tuple[Step, ...] = ("joined", "staged", "voted", "done")
COUNTED = _STEPS[1:]
"""The steps that ranks wait for."""
_NONE = "-"
"""No key has this value."""


class Progress(NamedTuple):
    """How far a rank is."""

    rank: int
    attempt: int
    """The number of the update, from 1; 0 for a rank that has not taken part yet."""
    step: Step
    base: int
    """The version before the update, and `to` the one after it; both of a rank that votes."""
    to: int
    process: Process

    def reached(self, attempt: int, step: Step) -> bool:
        """Whether the rank has come to this step of an attempt, or is behind it."""
        here, there = (self.attempt, _STEPS.index(self.step)), (attempt, _STEPS.index(step))
        return here >= there


class GroupDecision(NamedTuple):
    """The outcome of one attempt, which all ranks read."""

    commit: bool
    version: int
    """After a commit."""
    why: str
    """Of an abort."""


class UpdateGroup:
    """Ranks that update their models together; keep one object for all updates of a model."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        timeout: float = 60.0,
        name: str = "weights",
        attempt: int | None = None,
    ) -> None:
        """Ranks that share a store. They need no process group.

        Args:
            store: a TCPStore or FileStore of all ranks. It must outlive each rank.
            rank: of this process, from 0.
            size: the number of ranks.
            timeout: seconds that a rank waits for the others.
            name: tells apart the models that are updated over one store.
            attempt: the last update that this rank has seen; by default the last decided one.

        Example:
            >>> store = torch.distributed.TCPStore(host, port, is_master=False)
            >>> group = UpdateGroup(store, rank=engine_index, size=num_engines)
            >>> reload(model, "checkpoint/", group=group)

        """
        self.rank, self.size, self.timeout = rank, size, timeout
        self.attempt = attempt or 0
        """The last one that this rank has seen. Updates of equal numbers belong together."""
        self._store = PrefixStore(f"fixpass/{name}", store)
        self._process = this_process()
        self._keys = [f"rank/{each}" for each in range(size)]
        self._met = False
        if attempt is None:
            self.catch_up()
        self.tell("joined")

    @staticmethod
    def of(group: "dist.ProcessGroup | UpdateGroup") -> "UpdateGroup":
        """The ranks of a process group, with the group's own store."""
        if isinstance(group, UpdateGroup):
            return group
        if group not in _OF_GROUPS:
            store, size = PrefixStore("fixpass", _get_process_group_store(group)), group.size()
            # A group that was destroyed and made again may have the store of the former.
            name = f"group {(store.add('ranks', 1) - 1) // size}"
            # Its ranks count from their first update, also where another has failed meanwhile.
            _OF_GROUPS[group] = UpdateGroup(store, group.rank(), size, name=name, attempt=0)
        return _OF_GROUPS[group]

    def tell(self, step: Step, base: int = 0, to: int = 0) -> None:
        """Say how far this rank is."""
        progress = Progress(self.rank, self.attempt, step, base, to, self._process)
        self._store.set(self._keys[self.rank], json.dumps(progress))

    def progress(self) -> list[Progress]:
        """How far each rank is, but for ranks that were never there."""
        keys = self._keys
        self._met = self._met or bool(self._store.check(keys))
        if not self._met:
            keys = [key for key in keys if self._store.check([key])]
        return [Progress(*json.loads(text)) for text in self._store.multi_get(keys)]

    def arrive(self, step: Step, base: int = 0, to: int = 0) -> int:
        """Say that this rank has come to a counted step; the steps of all ranks in this attempt."""
        self.tell(step, base, to)
        return self._store.add(self._count, 1)

    def steps(self) -> int:
        """The steps of all ranks in this attempt; after an abort, at least all that there are."""
        return int(self._read(self._count) or 0)

    def decision(self, attempt: int) -> GroupDecision | None:
        """The decision of an attempt; None before there is one."""
        found = self._read(f"decision/{attempt}")
        return GroupDecision(*json.loads(found)) if found else None

    def decide(self, wanted: GroupDecision) -> GroupDecision:
        """Propose the decision of the present attempt; the one that came first."""
        key = f"decision/{self.attempt}"
        found = GroupDecision(*json.loads(self._store.compare_set(key, "", json.dumps(wanted))))
        if not found.commit:
            self._store.add(self._count, len(COUNTED) * self.size)
        return found

    @property
    def _count(self) -> str:
        return f"steps/{self.attempt}"

    def _read(self, key: str) -> bytes:
        """The value of a key, in one round trip; empty where there is no such key."""
        found: bytes = self._store.compare_set(key, _NONE, _NONE)
        return b"" if found == _NONE.encode() else found

    def catch_up(self) -> None:
        """Take the last attempt that is decided for seen."""
        step = 1
        while step:
            is_decided = self._store.check([f"decision/{self.attempt + step}"])
            self.attempt += step * is_decided
            step = 2 * step if is_decided else step // 2


_OF_GROUPS: "WeakKeyDictionary[dist.ProcessGroup, UpdateGroup]" = WeakKeyDictionary()


def group_version(group: "dist.ProcessGroup | UpdateGroup") -> int:
    """The version of the weights that the ranks of a group committed last; 0 before any commit.

    A rank that comes back loads the weights of this version by itself, with
    `reload(..., version=group_version(group))`, and then takes part in updates again.
    """
    ranks = UpdateGroup.of(group)
    ranks.catch_up()
    for attempt in range(ranks.attempt, 0, -1):
        found = ranks.decision(attempt)
        if found is not None and found.commit:
            return found.version
    return 0
