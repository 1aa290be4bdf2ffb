"""Which groups use symmetric memory: the rule, and the reason of every no.

In symmetric memory all ranks must bring equally many bytes to a call. The role of the group tells
whether they do; the graph does not. This module measures nothing and sets up nothing.
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["tp", "attn_tp"]
ROLES: tuple[Role, ...] = ("tp", "attn_tp")


@dataclass(frozen=True)
class Policy:
    """What the whole job says about symmetric memory.

    enabled: use it at all. dp_attention: attention runs data-parallel, so ranks of the TP group
    hold different numbers of tokens. dp_max_padding: with it, they are padded to the largest.
    """

    enabled: bool = True
    dp_attention: bool = False
    dp_max_padding: bool = False


@dataclass(frozen=True)
class GroupFacts:
    """A process group as far as it is known: its c10d name, role, number of ranks and hosts.

    obstacle: why its ranks could not make the memory; empty where they could, or need not yet.
    """

    name: str
    size: int
    role: Role = "tp"
    num_hosts: int = 1
    obstacle: str = ""


@dataclass(frozen=True)
class Decision:
    """Whether a group uses symmetric memory, and why; falsy for no."""

    symmetric: bool
    reason: str

    def __bool__(self) -> bool:
        return self.symmetric


def decide(group: GroupFacts, policy: Policy) -> Decision:
    """Whether `group` uses symmetric memory under `policy`.

    Ranks of an attention-TP group work on the same tokens, so it is always symmetric. Ranks of a
    TP group do too, unless attention is data-parallel and not padded. A group of one rank, one
    across hosts, and any group while the policy is not enabled are not.
    """
    if not policy.enabled:
        return Decision(False, "symmetric memory is off")
    if group.size == 1:
        return Decision(False, f"group {group.name!r} has one rank")
    if group.num_hosts > 1:
        return Decision(
            False, f"the ranks of group {group.name!r} are on {group.num_hosts} hosts, not on one"
        )
    if group.role == "tp" and policy.dp_attention and not policy.dp_max_padding:
        return Decision(
            False,
            f"with DP attention and without max padding, the ranks of TP group {group.name!r} "
            "hold different numbers of tokens",
        )
    if group.obstacle:
        return Decision(False, f"group {group.name!r} has no symmetric memory: {group.obstacle}")
    why = {"attn_tp": "an attention-TP group", "tp": "a TP group with as many tokens on each rank"}
    return Decision(True, f"group {group.name!r} is {why[group.role]} on one host")
