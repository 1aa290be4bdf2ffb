"""STRIDED: our Triton kernels, which read and write rows of any strides.

Their launchers check what the rows promise. `fixpass.lowering.contract_table` lists them behind the
kernels of other libraries.
"""

import torch

from fixpass.lowering.constraints import (
    Constraint,
    HiddenAtMost,
    LeadingDims,
    Rank,
    SameHidden,
    SameShape,
)
from fixpass.lowering.contract import Contract, Kernel
from fixpass.lowering.dtype_constraints import (
    Alike,
    ComputesIn,
    DtypeIn,
    GroupDivides,
    OneNumber,
    RotaryTables,
    RoundsTo,
    SameDtype,
    SameHead,
)
from fixpass.runtime.kernels.checks import FLOATS as FLOAT
from fixpass.runtime.kernels.checks import MAX_HIDDEN
from fixpass.runtime.providers import TRITON
from fixpass.runtime.quantized_norm import QUANTIZED
from fixpass.runtime.strided import MAX_RANK

_ROWS: tuple[Constraint, ...] = (
    DtypeIn("x", FLOAT),
    DtypeIn("weight", FLOAT),
    ComputesIn(torch.float32),
    RoundsTo(FLOAT),
    Rank("x", 1, MAX_RANK),
    HiddenAtMost(MAX_HIDDEN),
    LeadingDims(4),
)
_BIAS = DtypeIn("bias", FLOAT)
_NORM = (DtypeIn("out", FLOAT), _BIAS, *_ROWS)
_TWO_SIDES: tuple[Constraint, ...] = (
    *(DtypeIn(name, FLOAT) for name in ("q", "out", "q_weight")),
    SameDtype("k"),
    Alike("k_weight", "q_weight"),
    ComputesIn(torch.float32),
    RoundsTo(FLOAT),
    Rank("q", 1, MAX_RANK),
    Rank("k", 1, MAX_RANK),
    HiddenAtMost(MAX_HIDDEN),
)
_RESIDUAL = (SameShape("residual", "x"), DtypeIn("residual", FLOAT))


def _ours(op: str, constraints: tuple[Constraint, ...]) -> Kernel:
    """Our Triton kernel of an op."""
    contract = Contract(constraints, "fixpass.runtime.kernels")
    return Kernel(f"strided_{op}", op, contract, f"fixpass.runtime.strided:{op}", TRITON)


STRIDED: tuple[Kernel, ...] = (
    _ours("rms_norm", _NORM),
    _ours("layer_norm", _NORM),
    _ours("add_rms_norm", (*_RESIDUAL, *_NORM)),
    _ours(
        "rms_norm_quant",
        (DtypeIn("out", QUANTIZED), *_RESIDUAL, _BIAS, *_ROWS, OneNumber("scale"), GroupDivides()),
    ),
    _ours(
        "gated_rms_norm",
        (
            SameShape("gate", "x"),
            DtypeIn("gate", FLOAT),
            GroupDivides(power_of_two=False),
            DtypeIn("out", FLOAT),
            *_ROWS,
        ),
    ),
    _ours("qk_norm", (*_TWO_SIDES, SameHidden("k", "q"))),
    _ours("qk_norm_rope", (*_TWO_SIDES, SameHead(), DtypeIn("cos", FLOAT), RotaryTables())),
)
