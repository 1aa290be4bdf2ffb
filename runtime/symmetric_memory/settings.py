"""Settings: sizes, time limits and patience of symmetric memory on CPU, with why they are so.

All ranks of a group must have the same sizes; the rendezvous compares them.
"""

import os
from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """How a group's memory on CPU is laid out, and how long its ranks wait.

    timeout: seconds that a rank waits for the others in a call before it raises.
    rendezvous_timeout: seconds that a rank waits for the others to make the group's memory; it
    includes building the C++ part, once a machine.
    slot_bytes: messages up to this size are one-shot. Below it, meeting once more costs more than
    reading every rank's data: with 2 ranks the two ways cross between 128 and 512 KiB.
    piece_bytes: larger messages go in pieces of this size, which stay in a core's cache.
    heap_bytes: room for results of matmuls and for tensors of `SymmetricContext.empty`.
    """

    timeout: float = 30.0
    rendezvous_timeout: float = 300.0
    slot_bytes: int = 256 * KIB
    piece_bytes: int = 1 * MIB
    heap_bytes: int = 16 * MIB

    @property
    def sizes(self) -> tuple[int, int, int]:
        return (self.slot_bytes, self.piece_bytes, self.heap_bytes)

    @property
    def segment_bytes(self) -> int:
        """The size of one rank's segment: a page of control, slots, stage, results, heap."""
        return CONTROL_BYTES + 2 * self.slot_bytes + 2 * self.piece_bytes + self.heap_bytes


CONTROL_BYTES = 4096


def patience(num_ranks: int) -> tuple[int, int]:
    """(spins, yields) before a waiting rank sleeps; few where ranks share cores.

    A spin is about 20 ns and a yield about 500 ns, so a rank with a core of its own sleeps after
    some 100 microseconds. One that shares its core hands it on at once: the rank that it waits
    for may need it.
    """
    if num_ranks <= len(os.sched_getaffinity(0)):
        return (2000, 200)
    return (20, 50)
