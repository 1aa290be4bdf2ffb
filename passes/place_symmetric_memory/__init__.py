"""All-reduces behind row-parallel matmuls go through symmetric memory, where the group has it.

On CPU the matmul and its all-reduce become one op, which writes the product where all ranks read
it. On CUDA and ROCm the pass replaces the all-reduce by `fixpass::all_reduce`, and Inductor
allocates the input of that op in symmetric memory. Other collectives stay as they are. If a group
does not use symmetric memory, a remark gives the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from fixpass.lowering.target import Target
from fixpass.passes.base import Pass, PassResult
from fixpass.passes.place_symmetric_memory.all_reduce import RowParallel
from fixpass.passes.place_symmetric_memory.collectives import LEFT_ALONE, find_overload
from fixpass.passes.rewrite import apply_rewrite, find_anchors
from fixpass.runtime.symmetric_memory.policy import Decision, GroupFacts, Policy, decide


def nothing_known(name: str, device_type: str) -> GroupFacts:
    """The facts of a group in a process that has no process groups."""
    return GroupFacts(name, 0, obstacle="there is no process group in this process")


@dataclass(frozen=True)
class PlaceSymmetricMemory(Pass):
    """matmul -> all-reduce into symmetric memory, for groups that the policy admits."""

    name: ClassVar[str] = "place-symmetric-memory"

    target: Target
    policy: Policy = field(default_factory=Policy)
    topology: str = ""
    """The facts of the job that are known before any rank is asked. They go into the cache key."""
    describe: Callable[[str, str], GroupFacts] = field(
        default=nothing_known, repr=False, compare=False
    )
    """Returns the facts of a group from its name and device type. It may ask the other ranks."""

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        for name, why in LEFT_ALONE.items():
            overload = find_overload(name)
            for node in find_anchors(graph, (overload,)) if overload is not None else ():
                result.missed(node, why)
        rewrite = RowParallel(self.target.device_type, self.decide)
        apply_rewrite(graph, rewrite, result)

    def decide(self, name: str) -> Decision:
        """Whether the group uses symmetric memory. If the policy is on, this may set it up."""
        if not self.policy.enabled:
            return decide(GroupFacts(name, 0), self.policy)
        return decide(self.describe(name, self.target.device_type), self.policy)
