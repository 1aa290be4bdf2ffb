"""The rendezvous: all ranks of a group make its memory together, or none has any.

Three rounds over the group's store: hosts and abilities of the ranks; the segments' names; whether
each rank has mapped all segments. An error on one rank reaches all ranks and becomes the obstacle
that the report shows. Which groups take part is decided elsewhere.
"""

import errno
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
from fixpass.runtime.symmetric_memory.agreement import agree
from fixpass.runtime.symmetric_memory.settings import Settings, patience

KEY = "fixpass/symmetric_memory"


@dataclass(frozen=True)
class Rendezvous:
    """The result of a rendezvous, the same on every rank."""

    num_hosts: int = 1
    """On how many hosts the ranks are."""
    obstacle: str = ""
    """Why the group has no memory; empty where it has, or was not asked to make any."""
    opened: bool = False
    """Whether the C++ group is open."""


@dataclass(frozen=True)
class Talk:
    """The rounds of one rendezvous, under a key that no other rendezvous uses."""

    name: str
    store: Store
    rank: int
    size: int
    key: str
    settings: Settings

    def exchange(self, topic: str, mine: dict[str, Any]) -> tuple[tuple[dict[str, Any], ...], str]:
        """The answers of all ranks on a topic, and an obstacle: a silent rank or a rank's error."""
        key = f"{self.key}/{topic}"
        seconds = self.settings.rendezvous_timeout
        agreed = agree(self.store, key, self.rank, self.size, mine, seconds)
        errors = [
            f"rank {rank}: {answer['error']}"
            for rank, answer in enumerate(agreed.answers)
            if answer.get("error")
        ]
        return agreed.answers, agreed.failure or "; ".join(errors)


def hold(group: ProcessGroup, device_type: str, settings: Settings) -> Rendezvous:
    """Hold a rendezvous of a group; collective. On CPU it makes the memory, if all share a host."""
    talk = _start(group, settings)
    on_cpu = device_type == "cpu"
    mine: dict[str, Any] = {"host": segment.this_host(), "sizes": settings.sizes}
    reason = extension.load("symmetric_memory", uses_torch=True).reason if on_cpu else ""
    if reason:
        mine["error"] = f"its C++ part cannot be built: {reason}"
    answers, obstacle = talk.exchange("hosts", mine)
    if obstacle:
        return Rendezvous(obstacle=obstacle)
    num_hosts = len({each["host"] for each in answers})
    if num_hosts > 1 or not on_cpu:
        return Rendezvous(num_hosts)
    if len({tuple(each["sizes"]) for each in answers}) > 1:
        return Rendezvous(obstacle="its ranks have different settings")
    obstacle = _open_group(talk)
    return Rendezvous(obstacle=obstacle, opened=not obstacle)


def _start(group: ProcessGroup, settings: Settings) -> Talk:
    """The talk of the next rendezvous, which the store numbers.

    A rank that joined the group later than the others, in place of one that was lost, has not seen
    their earlier rendezvous: only the store knows the number.
    """
    store = dist.distributed_c10d._get_process_group_store(group)
    size = group.size()
    number = (store.add(f"{KEY}/arrivals", 1) - 1) // size
    key = f"{KEY}/{number}"
    return Talk(group.group_name, store, group.rank(), size, key, settings)


def _open_group(talk: Talk) -> str:
    """Make this rank's segment, map all segments, remove their names; gives an obstacle or ""."""
    mine: dict[str, Any] = {"pid": os.getpid(), "pids": segment.pid_namespace()}
    memory: Tensor | None = None
    try:
        mine["name"], memory = segment.create(talk.settings.segment_bytes)
    except OSError as error:
        mine["error"] = _why_no_segment(error, talk.settings.segment_bytes)
    try:
        answers, obstacle = talk.exchange("segments", mine)
        if obstacle or memory is None:
            return obstacle
        segments, error_text = _map_all(talk, answers, memory)
        _, obstacle = talk.exchange("mapped", {"error": error_text})
    finally:
        if "name" in mine:
            segment.unlink(mine["name"])
    if not obstacle:
        _open_native(talk, segments, [_watch(each, mine) for each in answers])
    return obstacle


def _why_no_segment(error: OSError, num_bytes: int) -> str:
    if error.errno == errno.ENOSPC:
        return f"/dev/shm has no room for {num_bytes} bytes ({segment.free_bytes()} bytes free)"
    place = error.filename or segment.SHM
    return f"no segment can be made in /dev/shm: {error.strerror} ({place})"


def _map_all(
    talk: Talk, answers: Sequence[dict[str, Any]], memory: Tensor
) -> tuple[list[Tensor], str]:
    segments: list[Tensor] = []
    for rank, each in enumerate(answers):
        try:
            num_bytes = talk.settings.segment_bytes
            mapped = memory if rank == talk.rank else segment.attach(each["name"], num_bytes)
        except OSError as error:
            return [], f"cannot map the segment of rank {rank}: {error.strerror}"
        segments.append(mapped)
    return segments, ""


def _open_native(talk: Talk, segments: list[Tensor], pidfds: list[int]) -> None:
    settings = talk.settings
    spins, yields = patience(talk.size)
    torch.ops.fixpass_symmetric_memory.open_group(
        talk.name, segments, talk.rank, *settings.sizes, pidfds, settings.timeout, spins, yields
    )


def _watch(peer: dict[str, Any], mine: dict[str, Any]) -> int:
    """A descriptor that tells when the peer's process ends; -1 where it cannot be watched."""
    if peer["pids"] != mine["pids"] or peer["pid"] == mine["pid"]:
        return -1
    try:
        return os.pidfd_open(peer["pid"])
    except OSError:
        return -1
