"""The rendezvous: all ranks of a group make its memory together, or none has any.

Three rounds over the group's store: who is where and can do what; the segments' names; whether
everybody has mapped them. What fails on one rank is heard by all, and becomes the obstacle that
the report shows. Nothing is decided here about which groups should come.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup

from fixpass.runtime import extension
from fixpass.runtime.symmetric_memory import segment
from fixpass.runtime.symmetric_memory.hosts import SHM, agree, this_host
from fixpass.runtime.symmetric_memory.plain import ORDERED_STORES, PlainGroup
from fixpass.runtime.symmetric_memory.settings import Settings, patience


@dataclass(frozen=True)
class Outcome:
    """What came of a rendezvous: on how many hosts the ranks are, and what they made, if anything.

    opened: the C++ group is open, or `plain` stands in for it. obstacle: why neither is.
    note: why `plain` stands in.
    """

    num_hosts: int = 1
    obstacle: str = ""
    opened: bool = False
    note: str = ""
    plain: PlainGroup | None = None


@dataclass(frozen=True)
class Meeting:
    """One group's rendezvous: a talk in rounds, under a key that no other one uses."""

    name: str
    store: Store
    rank: int
    size: int
    key: str
    settings: Settings

    def hear(self, topic: str, mine: dict[str, Any]) -> tuple[tuple[dict[str, Any], ...], str]:
        """What each rank says to a topic; or an obstacle, be it silence or an error of a rank."""
        key = f"{self.key}/{topic}"
        seconds = self.settings.rendezvous_timeout
        heard = agree(self.store, key, self.rank, self.size, mine, seconds)
        errors = [
            f"rank {rank}: {said['error']}"
            for rank, said in enumerate(heard.said)
            if said.get("error")
        ]
        return heard.said, heard.failure or "; ".join(errors)


def exchange_hosts(meeting: Meeting, device_type: str) -> Outcome:
    """On how many hosts the ranks are; on CPU with the memory, where that is one."""
    on_cpu = device_type == "cpu"
    wants = on_cpu and meeting.settings.native
    reason = "its C++ part is not asked for"
    if wants:
        reason = extension.load("symmetric_memory", uses_torch=True).reason
    mine = {"host": this_host(), "sizes": meeting.settings.sizes, "without": reason}
    said, obstacle = meeting.hear("hosts", mine)
    if obstacle:
        return Outcome(obstacle=obstacle)
    num_hosts = len({each["host"] for each in said})
    if num_hosts > 1 or not on_cpu:
        return Outcome(num_hosts)
    if len({tuple(each["sizes"]) for each in said}) > 1:
        return Outcome(obstacle="its ranks have different settings")
    without = [rank for rank, each in enumerate(said) if each["without"]]
    if 0 < len(without) < meeting.size:
        return Outcome(obstacle=f"rank {without[0]}: {said[without[0]]['without']}")
    if without and not ORDERED_STORES:
        return Outcome(obstacle=f"{reason}, and torch alone cannot order stores on this processor")
    return _make_memory(meeting, said[0]["without"])


def _make_memory(meeting: Meeting, without_native: str) -> Outcome:
    """Make this rank's segment, map everybody's, and take the names away."""
    num_bytes = meeting.settings.segment_bytes
    mine: dict[str, Any] = {"pid": os.getpid(), "pids": os.stat("/proc/self/ns/pid").st_ino}
    memory: Tensor | None = None
    try:
        mine["name"], memory = segment.create(num_bytes)
    except OSError as error:
        free = segment.free_bytes() if SHM.exists() else 0
        mine["error"] = (
            f"/dev/shm has no room for {num_bytes} bytes ({error.strerror}, {free} bytes free)"
        )
    try:
        said, obstacle = meeting.hear("segments", mine)
        if obstacle or memory is None:
            return Outcome(obstacle=obstacle)
        segments, error_text = _map_all(meeting, said, memory)
        _, obstacle = meeting.hear("mapped", {"error": error_text})
    finally:
        if "name" in mine:
            segment.unlink(mine["name"])
    if obstacle:
        return Outcome(obstacle=obstacle)
    if without_native:
        group = PlainGroup(meeting.name, segments, meeting.rank, meeting.settings)
        return Outcome(opened=True, note=f"in torch operations: {without_native}", plain=group)
    _open_native(meeting, segments, [_watch(each, mine) for each in said])
    return Outcome(opened=True)


def _map_all(
    meeting: Meeting, said: Sequence[dict[str, Any]], memory: Tensor
) -> tuple[list[Tensor], str]:
    segments: list[Tensor] = []
    for rank, each in enumerate(said):
        try:
            num_bytes = meeting.settings.segment_bytes
            mapped = memory if rank == meeting.rank else segment.attach(each["name"], num_bytes)
        except OSError as error:
            return [], f"cannot map the segment of rank {rank}: {error.strerror}"
        segments.append(mapped)
    return segments, ""


def _open_native(meeting: Meeting, segments: list[Tensor], pidfds: list[int]) -> None:
    settings = meeting.settings
    spins, yields = patience(meeting.size)
    torch.ops.fixpass_symmetric_memory.open_group(
        meeting.name, segments, meeting.rank, *settings.sizes, pidfds, settings.timeout, spins,
        yields,
    )  # fmt: skip


def _watch(peer: dict[str, Any], mine: dict[str, Any]) -> int:
    """A descriptor that tells when the peer's process ends; -1 where it cannot be watched."""
    if peer["pids"] != mine["pids"] or peer["pid"] == mine["pid"]:
        return -1
    try:
        return os.pidfd_open(peer["pid"])
    except OSError:
        return -1


def meeting_of(group: ProcessGroup, name: str, turn: int, settings: Settings) -> Meeting:
    """The `turn`-th rendezvous of a group; every rank counts the same turns."""
    store = dist.distributed_c10d._get_process_group_store(group)
    key = f"fixpass/symmetric_memory/{name}/{turn}"
    return Meeting(name, store, group.rank(), group.size(), key, settings)
