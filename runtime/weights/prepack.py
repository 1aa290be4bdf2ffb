"""Pack weights of linear layers for oneDNN, and run them: the op `fixpass::prepacked_linear`.

oneDNN packs a plain weight of 16 bits per element again in each call of a linear layer. A packed
weight is an opaque tensor, which no graph takes as an input: so the graph takes a number, under
which the packed weight is kept as long as its handle lives. For a plain float32 weight torch calls
MKL, which is slower on many processors. The op has no gradient.
"""

import itertools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from weakref import finalize

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fixpass.runtime import ops
from fixpass.runtime.errors import WeightError

_NUMBERS = itertools.count(1)
_PACKED: dict[int, Tensor] = {}


def packable_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes of weights that oneDNN packs on this CPU. Empty but on x86, where we measured."""
    mkldnn = torch.backends.mkldnn
    is_known = platform.machine().lower() in ("x86_64", "amd64")
    if not (is_known and mkldnn.is_available() and torch._C._get_mkldnn_enabled()):
        return ()
    supported = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return tuple(dtype for dtype, yes in supported.items() if yes)


@dataclass(frozen=True)
class Prepacked:
    """A `Packer`: packs a cached value for oneDNN and gives its handle."""

    weight_of: Callable[[Tensor], Tensor]
    """Makes the weight (out_features, in_features) of a linear layer from the value."""

    def __call__(self, value: Tensor) -> Tensor:
        """Pack a value; returns a new handle, an int64 tensor of one element."""
        packed = torch.ops.mkldnn._reorder_linear_weight(self.weight_of(value).contiguous())
        number = next(_NUMBERS)
        handle = torch.tensor([number], device="cpu")
        _PACKED[number] = packed
        finalize(handle, _PACKED.pop, number, None)
        return handle

    def nbytes(self, handle: Tensor) -> int:
        """Bytes of the packed weight."""
        return _PACKED[int(handle)].nbytes


def _run_linear(x: Tensor, handle: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    packed = _PACKED.get(int(handle))
    if packed is None:
        raise WeightError(
            f"no packed weight has the handle {int(handle)} in this process: handles are of one "
            "process and one compiled graph, and are not saved with it"
        )
    if forward_ad._current_level >= 0 and any(map(_has_tangent, (x, bias))):
        raise WeightError(
            "fixpass::prepacked_linear has no forward-mode derivative: compile with "
            'options={"disable": ["prepack-linears"]}'
        )
    if bias is not None:
        # oneDNN reads it as if it were contiguous.
        bias = bias.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return result


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def _fake_linear(x: Tensor, handle: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


ops.DEFINITIONS.define(
    "prepacked_linear(Tensor x, Tensor handle, Tensor? bias, int out_features) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
ops.DEFINITIONS.impl("prepacked_linear", _run_linear, "CPU")
torch.library.register_fake("fixpass::prepacked_linear", _fake_linear, lib=ops.DEFINITIONS)
