"""Symmetric memory for your own code: `context(group)`, and the rule that decides about groups.

Compiled code needs none of this: the pass `place-symmetric-memory` finds the groups by itself.
"""

from fixpass.runtime.symmetric_memory.context import Stats, SymmetricContext, context, policy
from fixpass.runtime.symmetric_memory.policy import Decision, GroupFacts, Policy, Role, decide

__all__ = [
    "Decision",
    "GroupFacts",
    "Policy",
    "Role",
    "Stats",
    "SymmetricContext",
    "context",
    "decide",
    "policy",
]
