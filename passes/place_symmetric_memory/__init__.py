"""All-reduces behind row-parallel matmuls go through symmetric memory, where the group has it.

On CPU the matmul and its all-reduce become one op, whose product lies where all ranks read it. On
CUDA and ROCm the all-reduce becomes ours, and Inductor allocates what feeds it symmetric. Other
collectives are left as they are, and every group that is not used says why.
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
    """What is known of a group where nobody can be asked."""
    return GroupFacts(name, 0, obstacle="there is no process group in this process")


@dataclass(frozen=True)
class PlaceSymmetricMemory(Pass):
    """matmul -> all-reduce into symmetric memory, for groups that the policy admits."""

    name: ClassVar[str] = "place-symmetric-memory"

    target: Target
    policy: Policy = field(default_factory=Policy)
    topology: str = ""
    """What of the job's shape is known before ranks are asked: it goes into the cache's key."""
    describe: Callable[[str, str], GroupFacts] = field(
        default=nothing_known, repr=False, compare=False
    )
    """Facts of a group by its name and the device's type; may ask the other ranks."""

    def run(self, graph: fx.Graph, result: PassResult) -> None:
        for name, why in LEFT_ALONE.items():
            overload = find_overload(name)
            for node in find_anchors(graph, (overload,)) if overload is not None else ():
                result.missed(node, why)
        rewrite = RowParallel(self.target.device_type, self.decide)
        apply_rewrite(graph, rewrite, result)

    def decide(self, name: str) -> Decision:
        """Whether the group of that name uses symmetric memory. Asking may make it, if it is on."""
        if not self.policy.enabled:
            return decide(GroupFacts(name, 0), self.policy)
        return decide(self.describe(name, self.target.device_type), self.policy)
