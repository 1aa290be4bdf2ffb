"""Which parameters are folded, and how: a side table by identity.

The state stands beside the parameters, not on them: a tag would be lost with an attribute, copied
to a tensor that is not folded, and guarded by Dynamo. Entries die with their parameter.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fixpass.runtime.weights.layout_plan import Plan


@dataclass(frozen=True)
class Folded:
    """A parameter whose memory holds `plan`, in a storage that starts at `pointer`."""

    plan: Plan
    pointer: int
    before: tuple[tuple[int, ...], tuple[int, ...]]
    """Shape and strides that it had."""


_FOLDED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_changes = [0]


def generation() -> int:
    """A number that rises with each fold, unfold, pack and unpack in this process."""
    return _changes[0]


def changed() -> None:
    """Raise the generation."""
    _changes[0] += 1


def any_folded() -> bool:
    """Whether any parameter in this process is folded: asking for each takes its time."""
    return len(_FOLDED) > 0


def record_of(param: Tensor) -> Folded | None:
    """How `param` is folded, or None."""
    if not any_folded():
        return None
    found: Folded | None = _FOLDED.get(param)
    return found


def record(param: Tensor, folded: Folded) -> None:
    before = record_of(param)
    _FOLDED[param] = folded
    # The same fold at another address is none.
    if before is None or before.plan is not folded.plan:
        changed()


def forget(param: Tensor) -> None:
    _FOLDED.pop(param, None)
    changed()


def memory_of(param: Tensor, plan: Plan) -> Tensor:
    """The elements of a folded parameter as they lie in memory: 1-D and contiguous."""
    data = param.detach()
    return data.as_strided((plan.numel,), (1,), data.storage_offset())
