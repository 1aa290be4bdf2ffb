"""The groups of this process: their roles, and the rendezvous of each.

A group has one rendezvous: at compile time where a pass asks for it, else at its first call. A
process group that was destroyed and made again under the same name has a new one.
"""

import weakref
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName

from fixpass.runtime.symmetric_memory.engines import engine_group, role_in_engine
from fixpass.runtime.symmetric_memory.policy import GroupFacts, Role
from fixpass.runtime.symmetric_memory.rendezvous import Rendezvous, hold
from fixpass.runtime.symmetric_memory.settings import Settings


@dataclass(frozen=True)
class _Known:
    group: "weakref.ref[ProcessGroup]"
    rendezvous: Rendezvous


# State of the process.
_known: dict[str, _Known] = {}
_roles: dict[str, Role] = {}
_settings = Settings()


def configure(**changes: object) -> None:
    """Change the settings of groups whose rendezvous is still to come; the same on every rank."""
    global _settings
    _settings = replace(_settings, **changes)  # type: ignore[arg-type]


def find(name: str) -> ProcessGroup | None:
    """The process group of a c10d name, or of an engine's own name; None where there is none."""
    try:
        group = c10d._resolve_process_group(GroupName(name))
    except (RuntimeError, ValueError):
        group = None
    in_engine = engine_group(name)
    if in_engine is None or in_engine is group:
        return group
    # From now on compiled code finds the engine's group by the engine's name.
    if group is not None:
        c10d._unregister_process_group(GroupName(name))
    c10d._register_process_group(GroupName(name), in_engine)
    return in_engine


def set_role(name: str, role: Role) -> None:
    """Say what a group is for; a TP group is the default."""
    _roles[name] = role


def role_of(name: str) -> Role:
    return _roles.get(name) or role_in_engine(name)


def local_facts(name: str, device_type: str = "cpu") -> GroupFacts:
    """The facts that this rank has of a group. Before the rendezvous no obstacle is known."""
    group, role = find(name), role_of(name)
    if group is None:
        return GroupFacts(name, 0, role, obstacle="this process has no group of that name")
    held = _held(group) or Rendezvous()
    return GroupFacts(name, group.size(), role, held.num_hosts, held.obstacle)


def rendezvous_facts(name: str, device_type: str = "cpu") -> GroupFacts:
    """The facts of a group after its rendezvous; collective at the first call for a group."""
    rendezvous_of(name, device_type)
    return local_facts(name)


def rendezvous_of(name: str, device_type: str = "cpu") -> Rendezvous:
    """The rendezvous of a group, which is held now if it was not held before.

    Groups that this process does not know, groups of one rank and fake groups have none: the
    result is a default one.
    """
    group = find(name)
    if group is None or group.size() == 1 or is_fake(group):
        return Rendezvous()
    return rendezvous(group, device_type)


def is_ready(name: str) -> bool:
    """Whether a call can use the group's memory."""
    return rendezvous_of(name).opened


def rendezvous(group: ProcessGroup, device_type: str) -> Rendezvous:
    """Hold the rendezvous of a group, once."""
    held = _held(group)
    if held is not None:
        return held
    name = group.group_name
    _close(name, _known.get(name))
    held = hold(group, device_type, _settings)
    known = _known[name] = _Known(weakref.ref(group), held)
    # When the process group goes, or the process ends, the other ranks learn that this rank left.
    weakref.finalize(group, _close, name, known)
    return held


def close(group: ProcessGroup) -> None:
    """Give up a group's memory; the other ranks learn it at their next call."""
    _close(group.group_name, _known.get(group.group_name))


def _close(name: str, known: _Known | None) -> None:
    # Another group may have the name by now.
    if known is None or _known.get(name) is not known:
        return
    del _known[name]
    if known.rendezvous.opened:
        torch.ops.fixpass_symmetric_memory.close_group(name)


def is_fake(group: ProcessGroup) -> bool:
    """A stand-in that traces collectives and sends nothing."""
    return dist.get_backend(group) == "fake"


def _held(group: ProcessGroup) -> Rendezvous | None:
    known = _known.get(group.group_name)
    return known.rendezvous if known is not None and known.group() is group else None
