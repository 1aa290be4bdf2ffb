"""The ranks that update their models together, and what they know of one another in a Store."""

import json
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_process_group_store

from fixpass.runtime.weights.processes import this_process


class Decision(NamedTuple):
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
    ) -> None:
        """Ranks that share a store. They need no process group.

        Args:
            store: a TCPStore or FileStore of all ranks. It must outlive each rank.
            rank: of this process, from 0.
            size: the number of ranks.
            timeout: seconds that a rank waits for the votes of the others.
            name: tells apart the models that are updated over one store.

        Example:
            >>> store = torch.distributed.TCPStore(host, port)
            >>> group = UpdateGroup(store, rank=engine_index, size=num_engines)
            >>> reload(model, "checkpoint/", group=group)

        """
        self.store = PrefixStore(f"fixpass/{name}", store)
        self.rank, self.size, self.timeout = rank, size, timeout
        self.process = this_process()
        self.attempt = 0
        """The last one that this process took part in."""
        self.note("join")

    @staticmethod
    def of(group: "dist.ProcessGroup | UpdateGroup") -> "UpdateGroup":
        """The ranks of a process group, with the group's own store."""
        if isinstance(group, UpdateGroup):
            return group
        if group not in _OF_GROUPS:
            store = _get_process_group_store(group)
            _OF_GROUPS[group] = UpdateGroup(store, group.rank(), group.size())
        return _OF_GROUPS[group]

    def decision(self, attempt: int) -> Decision | None:
        """The decision of an attempt; None before there is one."""
        key = f"{attempt}/decision"
        return Decision(*json.loads(self.store.get(key))) if self.store.check([key]) else None

    def decide(self, wanted: Decision) -> Decision:
        """Propose the decision of the present attempt; the one that came first."""
        key = f"{self.attempt}/decision"
        return Decision(*json.loads(self.store.compare_set(key, "", json.dumps(wanted))))

    def catch_up(self) -> None:
        """Go on behind the last attempt that is decided."""
        if not self.attempt and self.store.check(["last"]):
            self.attempt = int(self.store.get("last"))
        while self.store.check([f"{self.attempt + 1}/decision"]):
            self.attempt += 1

    def notes(self, kind: str, *, of: int = 0) -> dict[int, Any]:
        """The last notes of a kind, by rank; only those `of` one attempt, where it is given."""
        keys = [f"{kind}/{rank}" for rank in range(self.size)]
        if not self.store.check(keys):
            keys = [key for key in keys if self.store.check([key])]
        found = [json.loads(text) for text in (self.store.multi_get(keys) if keys else ())]
        return {note["rank"]: note for note in found if of in (0, note["attempt"])}

    def note(self, kind: str, **facts: Any) -> None:
        """Write facts of this rank for the present attempt."""
        facts |= {"rank": self.rank, "attempt": self.attempt, "process": self.process}
        self.store.set(f"{kind}/{self.rank}", json.dumps(facts))


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
