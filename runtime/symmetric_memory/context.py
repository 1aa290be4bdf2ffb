"""SymmetricContext: symmetric memory of one group for code that is not compiled.

`context(group)` makes it; every rank of the group calls that together. A group without symmetric
memory gets a context that says why, and whose all-reduce goes through the process group.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fixpass.runtime.symmetric_memory import groups
from fixpass.runtime.symmetric_memory.collective_ops import allocating_in
from fixpass.runtime.symmetric_memory.policy import Decision, Policy, Role, decide
from fixpass.runtime.symmetric_memory.process_group import process_group_all_reduce


@dataclass(frozen=True)
class Stats:
    """Counts since the rendezvous: calls of each kind, and bytes that were copied to be shared."""

    one_shot: int
    two_shot: int
    staged_bytes: int
    resident_bytes: int
    heap_bytes_in_use: int


class SymmetricContext:
    """A group's symmetric memory. `with context:` allocates in this memory.

    Within the block, new CPU tensors of this thread lie in the group's memory while it has room,
    so that a matmul writes where the other ranks read. Blocks are not nested: an inner one does
    nothing. `symmetric` tells whether the group has the memory, `reason` why or why not.
    """

    def __init__(self, group: ProcessGroup, decision: Decision) -> None:
        self.group = group
        self.symmetric = decision.symmetric
        self.reason = decision.reason
        self._entered: list[AbstractContextManager[None]] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, in rank order with float32 accumulation: a new dense tensor.

        All ranks call it with one shape and dtype, else each raises ValueError. Raises
        DistBackendError, naming the rank, where one is gone or does not come in time.
        """
        name = self.group.group_name
        if self.symmetric:
            return torch.ops.fixpass.all_reduce(x, "sum", name)  # type: ignore[no-any-return]
        return process_group_all_reduce(x, "sum", name)

    def all_reduce_(self, x: Tensor) -> Tensor:
        """The same in place, as `torch.distributed.all_reduce`: nothing is allocated for a dense x.

        Not for tensors that require gradients.
        """
        if self.symmetric:
            return torch.ops.fixpass.all_reduce_(x, "sum", self.group.group_name)  # type: ignore[no-any-return]
        dist.all_reduce(x, group=self.group)
        return x

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised CPU tensor in the group's memory.

        Raises OutOfMemoryError where the memory has no room, and ValueError where the group has no
        symmetric memory.
        """
        if not self.symmetric:
            raise ValueError(f"no symmetric memory to allocate in: {self.reason}")
        name = self.group.group_name
        return torch.ops.fixpass_symmetric_memory.empty(shape, dtype, name)  # type: ignore[no-any-return]

    def stats(self) -> Stats:
        """The counts so far. Raises ValueError where the group has no symmetric memory."""
        if not self.symmetric:
            raise ValueError(f"no symmetric memory to count in: {self.reason}")
        name = self.group.group_name
        return Stats(*torch.ops.fixpass_symmetric_memory.stats(name))

    def close(self) -> None:
        """Give the memory up. A later call of another rank raises and names this rank."""
        groups.close(self.group)
        self.symmetric, self.reason = False, "the context is closed"

    def __enter__(self) -> Self:
        block = allocating_in(self.group.group_name)
        block.__enter__()
        self._entered.append(block)
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.pop().__exit__(None, None, None)

    def __repr__(self) -> str:
        return f"SymmetricContext({self.group.group_name!r}, {self.reason})"


def context(
    group: ProcessGroup | DeviceMesh | str | None = None,
    *,
    role: Role | None = None,
    policy: Policy | None = None,
) -> SymmetricContext:
    """The symmetric memory of a group, made when it is asked for first; collective.

    group: a process group, a mesh of one dimension, a name, or None for all ranks. role: what the
    group is for, "tp" or "attn_tp"; remembered for compiled code. Raises ValueError for a name
    without a group.
    """
    found = _resolve(group, role)
    facts = groups.rendezvous_facts(found.group_name)
    return SymmetricContext(found, decide(facts, policy or Policy()))


def policy(
    group: ProcessGroup | DeviceMesh | str | None = None,
    *,
    role: Role | None = None,
    policy: Policy | None = None,
) -> Decision:
    """Whether a group would use symmetric memory, and why, as far as this rank knows by itself.

    The arguments are those of `context`. Nothing is set up and no other rank is asked: before the
    rendezvous, a group counts as one whose ranks can share memory.
    """
    found = _resolve(group, role)
    return decide(groups.local_facts(found.group_name), policy or Policy())


def _resolve(group: ProcessGroup | DeviceMesh | str | None, role: Role | None) -> ProcessGroup:
    """The process group that is meant; the role is remembered for it, where there is one."""
    found = _find(group)
    if role is not None:
        groups.set_role(found.group_name, role)
    return found


def _find(group: ProcessGroup | DeviceMesh | str | None) -> ProcessGroup:
    if isinstance(group, DeviceMesh):
        return group.get_group()
    if isinstance(group, str):
        found = groups.find(group)
        if found is None:
            raise ValueError(f"this process has no group named {group!r}")
        return found
    if group is not None:
        return group
    whole = dist.group.WORLD
    if whole is None:
        raise ValueError("torch.distributed is not initialized: call init_process_group first")
    return whole
