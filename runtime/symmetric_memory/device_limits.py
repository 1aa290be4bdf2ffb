"""Message sizes at which an all-reduce on a device changes its way, by device and ranks.

fixpass has measured none of them. Each number has the source that it was read from.
"""

from dataclasses import dataclass

from fixpass.runtime.symmetric_memory.settings import KIB

_MIB = 1024 * KIB


@dataclass(frozen=True)
class Limits:
    """The sizes for one architecture and number of ranks, in bytes of one rank's message."""

    one_shot: int
    """Each rank reads all data once in one-shot, and about two times 1/num_ranks of it in two-shot,
    with one meeting more: up to this size one-shot is faster."""
    symmetric: int
    """Above this size the process group (NCCL, RCCL) is faster."""
    multimem: bool
    """Whether the switch's own sum (NVLink SHARP) is faster than two-shot."""


# Largest messages and the ranks with multimem: vLLM of 2026, all_reduce_utils.py and symm_mem.py.
_LARGEST = {
    "9.0": {2: 64 * _MIB, 4: 32 * _MIB, 6: 64 * _MIB, 8: 64 * _MIB},
    "10.0": {2: 8 * _MIB, 4: 32 * _MIB, 6: 128 * _MIB, 8: 128 * _MIB},
    "10.3": {2: 4 * _MIB, 4: 32 * _MIB, 6: 32 * _MIB, 8: 64 * _MIB},
}
_MULTIMEM = {"9.0": (4, 6, 8), "10.0": (6, 8), "10.3": (6, 8)}
# The largest two-shot message of PyTorch 2.13, intra_node_comm.cu.
_LARGEST_ELSEWHERE = 10 * _MIB


def limits_of(architecture: str, num_ranks: int) -> Limits:
    """The limits of a device.

    Args:
        architecture: the compute capability of a CUDA device, such as "9.0"; other devices take the
            limits that PyTorch gives to all.
        num_ranks: the ranks of the group.

    """
    symmetric = _LARGEST.get(architecture, {}).get(num_ranks, _LARGEST_ELSEWHERE)
    one_shot = min(_one_shot(num_ranks), symmetric)
    return Limits(one_shot, symmetric, num_ranks in _MULTIMEM.get(architecture, (num_ranks,)))


def _one_shot(num_ranks: int) -> int:
    """The limits of vLLM of 2026, custom_all_reduce.cuh, whose kernels read as PyTorch's do."""
    if num_ranks <= 2:
        # Two ranks read the same bytes in both ways.
        return 1 << 62
    if num_ranks <= 4:
        return 512 * KIB
    # vLLM has no row for more than eight: a rank reads as many bytes as one of eight does.
    return 256 * KIB if num_ranks <= 8 else 8 * 256 * KIB // num_ranks
