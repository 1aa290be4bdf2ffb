"""Which weights a model has: a number that each update raises, and cheap keys that a write changes.

A key sees the writes that torch counts, and memory that was replaced. It does not see writes
through `.data` or numpy, of which torch tells nobody: see writes.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from fixpass.runtime.errors import VersionError
from fixpass.runtime.weights.lock import WeightsLock, lock_of, over, tensors_of
from fixpass.runtime.weights.targets import local_part

Changes = tuple[int, int]


def version(model: nn.Module) -> int:
    """The version of the weights of `model`: 0 before any update."""
    return lock_of(model).version


def bump(
    model: nn.Module, to: int | None = None, others: Collection[WeightsLock] | None = None
) -> int:
    """Raise the version of `model`, and of all that share a parameter with it; the new one.

    to: the new version, above the present one. The others, by default the gates over any parameter
    of the model, are raised by one.
    """
    own = lock_of(model)
    if to is not None and to <= own.version:
        raise VersionError(f"version {to} does not follow version {own.version}")
    for gate in over(tensors_of(model)) if others is None else others:
        if gate is not own:
            gate.version += 1
    own.version = own.version + 1 if to is None else to
    return own.version


def changes(param: Tensor) -> Changes:
    """A key that is another one after `param` was written to, or was given other memory.

    Of a tensor made in inference mode, whose writes torch does not count, only the memory.
    """
    local = local_part(param)
    count = -1 if local.is_inference() else local._version
    return count, local.data_ptr() if local.layout == torch.strided else 0


def all_changes(params: Iterable[Tensor]) -> tuple[Changes, ...]:
    """The keys of several parameters."""
    return tuple(changes(param) for param in params)
