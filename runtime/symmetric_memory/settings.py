"""Settings: sizes, time limits and patience of symmetric memory on CPU, with why they are so.

All ranks of a group must have the same sizes; the rendezvous compares them.
"""

import os
from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """How a group's memory on CPU is laid out, and how long its ranks wait."""

    timeout: float = 30.0
    """Seconds that a rank waits for the others in a call before it raises."""
    rendezvous_timeout: float = 300.0
    """Seconds that a rank waits for the others in a rendezvous, which includes building the C++."""
    slot_bytes: int = 256 * KIB
    """Messages up to this size are one-shot: all ranks read all data after one barrier. With 2
    ranks, one-shot and two-shot take equally long somewhere between 128 and 512 KiB."""
    piece_bytes: int = 1 * MIB
    """Larger messages go in pieces of this size, which stay in a core's cache."""
    heap_bytes: int = 16 * MIB
    """Room for results of matmuls and for tensors of `SymmetricContext.empty`."""

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
