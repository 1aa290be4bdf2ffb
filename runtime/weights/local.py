"""The part of a tensor that this rank holds: the local tensor of a DTensor, and where it lies."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.box import Box

PLAIN = frozenset((nn.Parameter, Tensor))
"""Classes whose memory is their own."""


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, to look at: no gradient goes through it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_freed(tensor: Tensor) -> bool:
    """Whether a plain tensor has values and no memory: torch itself would read at address 0."""
    return type(tensor) in PLAIN and tensor.numel() > 0 and not tensor.untyped_storage().nbytes()


def local_box(tensor: Tensor) -> tuple[Tensor, Box]:
    """A tensor's values on this rank, and which box of the whole tensor they are.

    Of a plain tensor that is all of it. Raises CheckpointError for a DTensor that is a sum still
    to be made.
    """
    if not isinstance(tensor, DTensor):
        return tensor, Box.whole(tuple(tensor.shape))
    if any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(f"a DTensor with placements {tensor.placements} has no values yet")
    shape, start = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), Box(tuple(start), tuple(shape))
