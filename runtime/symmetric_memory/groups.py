"""The groups of this process: their roles, and what came of the rendezvous of each.

A group meets once: at compile time where a pass asks, else at its first call. A process group
that was destroyed and made again under the same name is another one and meets again.
"""

import weakref
from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName

from fixpass.runtime.symmetric_memory.engines import engine_group, role_in_engine
from fixpass.runtime.symmetric_memory.policy import GroupFacts, Role
from fixpass.runtime.symmetric_memory.rendezvous import Outcome, exchange_hosts, meeting_of
from fixpass.runtime.symmetric_memory.settings import Settings


@dataclass(frozen=True)
class _Known:
    group: "weakref.ref[ProcessGroup]"
    outcome: Outcome


# State of the process. A name may be met many times: its turns make the keys in the store unique.
_known: dict[str, _Known] = {}
_roles: dict[str, Role] = {}
_turns: Counter[str] = Counter()
_settings = Settings()


def configure(**changes: object) -> None:
    """Change the settings of groups that are not met yet; the same on every rank."""
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


def peek(name: str, device_type: str = "cpu") -> GroupFacts:
    """What is known of a group without asking its other ranks: what has not been met may be."""
    group = find(name)
    if group is None:
        return GroupFacts(name, 0, role_of(name), obstacle="this process has no group of that name")
    outcome = _outcome(group) or Outcome()
    role = role_of(name)
    obstacle, note = outcome.obstacle, outcome.note
    return GroupFacts(name, group.size(), role, outcome.num_hosts, obstacle, note)


def settle(name: str, device_type: str = "cpu") -> GroupFacts:
    """What a group is, after its ranks have met; collective at the first time for a group."""
    outcome_of(name, device_type)
    return peek(name)


def outcome_of(name: str, device_type: str = "cpu") -> Outcome:
    """What came of a group's rendezvous, which is held now where it was not.

    Nothing comes of a group that this process does not know, of one rank and of a fake one.
    """
    group = find(name)
    if group is None or group.size() == 1 or is_fake(group):
        return Outcome()
    return meet(group, device_type)


def is_ready(name: str) -> bool:
    """Whether a call can use the group."""
    return outcome_of(name).opened


def meet(group: ProcessGroup, device_type: str) -> Outcome:
    """Hold the rendezvous of a group, once."""
    outcome = _outcome(group)
    if outcome is not None:
        return outcome
    name = group.group_name
    _close(name, _known.get(name))
    _turns[name] += 1
    outcome = exchange_hosts(meeting_of(group, name, _turns[name], _settings), device_type)
    known = _known[name] = _Known(weakref.ref(group), outcome)
    # When the process group goes, or the process ends, the others hear that this rank left.
    weakref.finalize(group, _close, name, known)
    return outcome


def close(group: ProcessGroup) -> None:
    """Give up a group's memory; the other ranks hear of it at their next call."""
    _close(group.group_name, _known.get(group.group_name))


def _close(name: str, known: _Known | None) -> None:
    # Another group may have the name by now.
    if known is None or _known.get(name) is not known:
        return
    del _known[name]
    if not known.outcome.opened:
        return
    if known.outcome.plain is not None:
        known.outcome.plain.leave()
    else:
        torch.ops.fixpass_symmetric_memory.close_group(name)


def is_fake(group: ProcessGroup) -> bool:
    """A stand-in that traces collectives and sends nothing."""
    return dist.get_backend(group) == "fake"


def _outcome(group: ProcessGroup) -> Outcome | None:
    known = _known.get(group.group_name)
    return known.outcome if known is not None and known.group() is group else None
