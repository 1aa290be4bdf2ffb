"""KERNELS: every norm kernel, its contract and its callable. The source stands on the row.

The passes and the eager wrappers read the rows. A row promises no more than its source shows:
where a kernel takes some layout by luck, the row leaves it out. Several rows may have one name and
op. The first row whose needs are met is used. If none is, the last row is: it promises least.
"""

from collections.abc import Iterable

import torch

from fixpass.lowering.constraints import (
    Absent,
    AlignedVector,
    Constraint,
    Dense,
    Dense2D,
    HiddenEven,
    LastStridesDivisible,
    NotEmpty,
    OffsetsBelow,
    Present,
    Rank,
    RowPitch,
    SameShape,
    UnitLastStride,
)
from fixpass.lowering.contract import Contract, Kernel
from fixpass.lowering.dtype_constraints import (
    ComputesIn,
    DtypeIn,
    SameDtype,
    WeightRule,
)
from fixpass.lowering.quantizing_kernels import QUANTIZING
from fixpass.lowering.site import OPS
from fixpass.lowering.strided_kernels import STRIDED
from fixpass.runtime.errors import ConfigError
from fixpass.runtime.kernels.checks import FLOATS as FLOAT
from fixpass.runtime.providers import register

HALF = (torch.float16, torch.bfloat16)

# What nearly every opaque kernel asks: fp32 inside, one dtype outside, a weight and no bias.
PLAIN: tuple[Constraint, ...] = (
    NotEmpty(),
    ComputesIn(torch.float32),
    Present("weight"),
    Absent("bias"),
    AlignedVector("weight"),
    SameDtype("weight"),
    SameDtype("out"),
)
_BIAS = (AlignedVector("bias"), SameDtype("bias"))
_PLAIN_LAYER_NORM = (*_BIAS, *(Present("bias") if c == Absent("bias") else c for c in PLAIN))
_RESIDUAL: tuple[Constraint, ...] = (SameShape("residual", "x"), SameDtype("residual"))
_EITHER = WeightRule((False, True))
_AFTER = WeightRule((False,))
_BEFORE = WeightRule((True,))
_ROWS: tuple[Constraint, ...] = (Dense2D("x"), Dense2D("out"))
# Rows of any pitch, as slices of a projection have them.
_PITCHED: tuple[Constraint, ...] = (Rank("x", 2, 2), UnitLastStride("x"), Dense2D("out"))
# An odd hidden size corrupts the borders of rows: ROCm/aiter#5044.
_AITER: tuple[Constraint, ...] = (HiddenEven(), *PLAIN, _EITHER)
_CK = "aiter 0.1.7.post2, CK: m = numel / n, stride = input.stride(0), unchecked"
_OPUS = "aiter of August 2026: fp16, bf16 and fp32; x by stride(0), the residual dense"
_VLLM = "vLLM 0.32, csrc/layernorm_kernels.cu"
_FLASHINFER = "flashinfer 0.6, norm.cuh: uint32 strides and offsets, 16-byte vectors"

_ANY = Contract((), "any layout: the op's decomposition, fused")
_PROVIDERS, _REFERENCES = "fixpass.runtime.providers", "fixpass.runtime.ops"
# The op of aiter whose schema tells the two generations apart: opus knows `gemma_norm`.
_WITH_ADD = "aiter::rmsnorm2d_fwd_with_add"


KERNELS: tuple[Kernel, ...] = (
    Kernel("inductor", "rms_norm", _ANY, f"{_REFERENCES}:rms_norm"),
    Kernel("inductor", "layer_norm", _ANY, f"{_REFERENCES}:layer_norm"),
    Kernel("inductor", "add_rms_norm", _ANY, f"{_REFERENCES}:add_rms_norm"),
    Kernel("inductor", "qk_norm", _ANY, f"{_REFERENCES}:qk_norm"),
    Kernel("inductor", "qk_norm_rope", _ANY, f"{_REFERENCES}:qk_norm_rope"),
    Kernel("inductor", "rms_norm_quant", _ANY, f"{_REFERENCES}:rms_norm_quant"),
    Kernel("inductor", "gated_rms_norm", _ANY, f"{_REFERENCES}:gated_rms_norm"),
    Kernel(
        "aiter_rms_norm",
        "rms_norm",
        Contract((*_PITCHED, DtypeIn("x", FLOAT), *_AITER), _OPUS),
        f"{_PROVIDERS}:aiter_rms_norm",
        needs=f"{_WITH_ADD}(gemma_norm)",
    ),
    Kernel(
        "aiter_rms_norm",
        "rms_norm",
        Contract((*_ROWS, DtypeIn("x", HALF), *_AITER), _CK),
        f"{_PROVIDERS}:aiter_rms_norm",
        needs="aiter::rms_norm",
    ),
    Kernel(
        "aiter_layer_norm",
        "layer_norm",
        Contract((*_ROWS, DtypeIn("x", HALF), HiddenEven(), *_PLAIN_LAYER_NORM, _AFTER), _CK),
        f"{_PROVIDERS}:aiter_layer_norm",
        needs="aiter::layernorm2d_fwd",
    ),
    Kernel(
        "aiter_add_rms_norm",
        "add_rms_norm",
        Contract((*_PITCHED, Dense2D("residual"), DtypeIn("x", FLOAT), *_RESIDUAL, *_AITER), _OPUS),
        f"{_PROVIDERS}:aiter_add_rms_norm",
        needs=f"{_WITH_ADD}(gemma_norm)",
    ),
    Kernel(
        "aiter_add_rms_norm",
        "add_rms_norm",
        Contract((*_ROWS, Dense2D("residual"), DtypeIn("x", HALF), *_RESIDUAL, *_AITER), _CK),
        f"{_PROVIDERS}:aiter_add_rms_norm",
        needs=_WITH_ADD,
    ),
    Kernel(
        "vllm_rms_norm",
        "rms_norm",
        Contract(
            (
                Rank("x", 2, 4),
                UnitLastStride("x"),
                LastStridesDivisible("x", 16),
                Dense("out"),
                DtypeIn("x", FLOAT),
                *PLAIN,
                _BEFORE,
            ),
            _VLLM + ": the second pass reads rows as 16-byte vectors, unchecked",
        ),
        f"{_PROVIDERS}:vllm_rms_norm",
        needs="_C::rms_norm",
    ),
    Kernel(
        "vllm_add_rms_norm",
        "add_rms_norm",
        Contract(
            (
                Dense("x"),
                RowPitch("x"),
                Dense("residual"),
                Dense("out"),
                DtypeIn("x", FLOAT),
                *_RESIDUAL,
                *PLAIN,
                _BEFORE,
            ),
            _VLLM + ": stride(-2) with flattened rows; a packed 3-D x reads wrong rows",
        ),
        f"{_PROVIDERS}:vllm_add_rms_norm",
        needs="_C::fused_add_rms_norm",
        overwrites=("x", "residual"),
    ),
    Kernel(
        "flashinfer_rms_norm",
        "rms_norm",
        Contract(
            (
                Rank("x", 2, 3),
                UnitLastStride("x"),
                LastStridesDivisible("x", 16),
                OffsetsBelow("x", 32, asked_at_call=True),
                Dense("out"),
                OffsetsBelow("out", 32, asked_at_call=True),
                DtypeIn("x", HALF),
                *PLAIN,
                WeightRule((False,), (0.0, 1.0)),
            ),
            _FLASHINFER + ": 2-D row-strided, 3-D any leading strides",
        ),
        f"{_PROVIDERS}:flashinfer_rms_norm",
        needs="flashinfer::rmsnorm",
    ),
    Kernel(
        "flashinfer_add_rms_norm",
        "add_rms_norm",
        Contract(
            (
                Rank("x", 2, 2),
                UnitLastStride("x"),
                UnitLastStride("residual"),
                LastStridesDivisible("x", 16),
                LastStridesDivisible("residual", 16),
                OffsetsBelow("x", 32, asked_at_call=True),
                OffsetsBelow("residual", 32, asked_at_call=True),
                Dense2D("out"),
                DtypeIn("x", HALF),
                *_RESIDUAL,
                *PLAIN,
                WeightRule((False,), (0.0, 1.0)),
            ),
            _FLASHINFER,
        ),
        f"{_PROVIDERS}:flashinfer_add_rms_norm",
        needs="flashinfer::fused_add_rmsnorm",
        overwrites=("x", "residual"),
    ),
    *QUANTIZING,
    *STRIDED,
)

_table: dict[tuple[str, str], tuple[Kernel, ...]] = {}


def add_kernels(kernels: Iterable[Kernel]) -> None:
    """Make kernels known to this process: to the passes, and to compiled code by their names.

    Raises:
        ConfigError: the op of a kernel is unknown, or its name stands for another kernel already.

    """
    added: dict[tuple[str, str], tuple[Kernel, ...]] = {}
    for kernel in kernels:
        key = kernel.name, kernel.op
        if kernel.op not in OPS:
            known = ", ".join(OPS)
            raise ConfigError(f"kernel {kernel.name!r}: unknown op {kernel.op!r}; known: {known}")
        if key in _table:
            if kernel not in _table[key]:
                raise ConfigError(
                    f"kernel {kernel.name!r} of {kernel.op} is known already, with another "
                    "contract or callable: give one of the two another name"
                )
            continue
        added[key] = (*added.get(key, ()), kernel)
    _table.update(added)
    register(kernel for rows in added.values() for kernel in rows)


def kernel_of(name: str, op: str) -> Kernel | None:
    """The row of kernel `name` that computes `op` with the installed library, or None."""
    rows = _table.get((name, op), ())
    if len(rows) < 2:
        return rows[0] if rows else None
    return next((row for row in rows if row.is_installed), rows[-1])


def rows_of(name: str = "", op: str = "") -> tuple[Kernel, ...]:
    """All rows, or those of one kernel name or one op, in the table's order."""
    rows = (row for rows in _table.values() for row in rows)
    return tuple(row for row in rows if name in ("", row.name) and op in ("", row.op))


def kernel_names(op: str = "") -> tuple[str, ...]:
    """The name of every known kernel, or of every kernel of `op`, once."""
    return tuple(dict.fromkeys(row.name for row in rows_of(op=op)))


add_kernels(KERNELS)
