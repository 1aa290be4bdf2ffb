"""CONTRACTS: what each kernel accepts. One row a kernel and op; the source stands on the row.

The rows are read by the passes and by the eager guards. A row promises no more than its source
shows: where a kernel takes some layout by luck, the row leaves it out.
"""

from functools import cache

import torch

from fixpass.lowering.constraints import (
    Absent,
    ComputesIn,
    Constraint,
    Dense,
    Dense2D,
    DtypeIn,
    FewRows,
    HiddenAtMost,
    HiddenEven,
    LastStridesDivisible,
    LeadingDims,
    NotEmpty,
    Present,
    Rank,
    RowsOrColumns,
    SameDtype,
    SameHidden,
    SameShape,
    SameStride,
    UnitLastStride,
    WeightRule,
)
from fixpass.lowering.contract import Contract
from fixpass.runtime import linear
from fixpass.runtime.kernels.checks import FLOATS as FLOAT
from fixpass.runtime.kernels.checks import MAX_HIDDEN
from fixpass.runtime.providers import aiter_generation
from fixpass.runtime.strided import MAX_RANK

HALF = (torch.float16, torch.bfloat16)

# What nearly every opaque kernel asks: fp32 inside, one dtype outside, a weight and no bias.
_PLAIN: tuple[Constraint, ...] = (
    NotEmpty(),
    ComputesIn(torch.float32),
    Present("weight"),
    Absent("bias"),
    SameDtype("weight"),
    SameDtype("out"),
)
_PLAIN_LAYER_NORM = tuple(Present("bias") if c == Absent("bias") else c for c in _PLAIN)
_RESIDUAL: tuple[Constraint, ...] = (SameShape("residual", "x"), SameDtype("residual"))
_EITHER = WeightRule((False, True))
_AFTER = WeightRule((False,))
_BEFORE = WeightRule((True,))
_ROWS: tuple[Constraint, ...] = (Dense2D("x"), Dense2D("out"))
# An odd hidden size corrupts the borders of rows: ROCm/aiter#5044.
_AITER: tuple[Constraint, ...] = (HiddenEven(), *_PLAIN, _EITHER)
_STRIDED: tuple[Constraint, ...] = (
    DtypeIn("x", FLOAT),
    DtypeIn("out", FLOAT),
    ComputesIn(torch.float32),
    Rank("x", 1, MAX_RANK),
    HiddenAtMost(MAX_HIDDEN),
    LeadingDims(4),
)

_CK = "aiter 0.1.7.post2, CK: m = numel / n, stride = input.stride(0), unchecked"
_OPUS = "aiter 2026, opus: fp16, bf16 and fp32; copies what is not row-strided, so rows are dense"
_AITER_TRITON = "aiter 0.1.7.post2, Triton: n_rows, n_cols = x.shape"
_VLLM = "vLLM 0.32, csrc/layernorm_kernels.cu"
_FLASHINFER = "flashinfer 0.6, norm.py"
_OURS = "fixpass.runtime.kernels"

CONTRACTS: tuple[Contract, ...] = (
    Contract("inductor", "rms_norm", (), "any layout: the op's decomposition, fused"),
    Contract("inductor", "layer_norm", (), "any layout: the op's decomposition, fused"),
    Contract("inductor", "add_rms_norm", (), "any layout: the op's decomposition, fused"),
    Contract("inductor", "qk_norm", (), "any layout: the op's decomposition, fused"),
    Contract("aiter_rms_norm", "rms_norm", (*_ROWS, DtypeIn("x", HALF), *_AITER), _CK, "ck"),
    Contract("aiter_rms_norm", "rms_norm", (*_ROWS, DtypeIn("x", FLOAT), *_AITER), _OPUS, "opus"),
    Contract(
        "aiter_layer_norm",
        "layer_norm",
        (*_ROWS, DtypeIn("x", HALF), HiddenEven(), *_PLAIN_LAYER_NORM, _AFTER),
        _CK,
    ),
    Contract(
        "aiter_add_rms_norm",
        "add_rms_norm",
        (*_ROWS, Dense2D("residual"), DtypeIn("x", HALF), *_RESIDUAL, *_AITER),
        _CK,
        "ck",
    ),
    Contract(
        "aiter_add_rms_norm",
        "add_rms_norm",
        (*_ROWS, Dense2D("residual"), DtypeIn("x", FLOAT), *_RESIDUAL, *_AITER),
        _OPUS,
        "opus",
    ),
    Contract(
        "aiter_triton_rms_norm",
        "rms_norm",
        (Rank("x", 2, 2), UnitLastStride("x"), Dense2D("out"), DtypeIn("x", HALF), *_PLAIN, _AFTER),
        _AITER_TRITON,
    ),
    Contract(
        "aiter_triton_add_rms_norm",
        "add_rms_norm",
        (
            Rank("x", 2, 2),
            UnitLastStride("x"),
            *_RESIDUAL,
            SameStride("residual", "x"),
            SameStride("out", "x"),
            DtypeIn("x", HALF),
            *_PLAIN,
            _AFTER,
        ),
        _AITER_TRITON + "; the residual is indexed with x's stride",
    ),
    Contract(
        "vllm_rms_norm",
        "rms_norm",
        (
            Rank("x", 2, 4),
            UnitLastStride("x"),
            LastStridesDivisible("x", 16),
            Dense("out"),
            DtypeIn("x", FLOAT),
            *_PLAIN,
            _BEFORE,
        ),
        _VLLM + ": the second pass reads rows as 16-byte vectors, unchecked",
    ),
    Contract(
        "vllm_add_rms_norm",
        "add_rms_norm",
        (
            Dense("x"),
            Dense("residual"),
            Dense("out"),
            DtypeIn("x", FLOAT),
            *_RESIDUAL,
            *_PLAIN,
            _BEFORE,
        ),
        _VLLM + ": stride(-2) with flattened rows; a packed 3-D x reads wrong rows",
    ),
    Contract(
        "flashinfer_rms_norm",
        "rms_norm",
        (
            Rank("x", 2, 3),
            UnitLastStride("x"),
            LastStridesDivisible("x", 16),
            Dense("out"),
            DtypeIn("x", HALF),
            *_PLAIN,
            WeightRule((False,), (0.0, 1.0)),
        ),
        _FLASHINFER + ": 2-D row-strided, 3-D any leading strides",
    ),
    Contract(
        "flashinfer_add_rms_norm",
        "add_rms_norm",
        (
            Rank("x", 2, 2),
            UnitLastStride("x"),
            UnitLastStride("residual"),
            LastStridesDivisible("x", 16),
            LastStridesDivisible("residual", 16),
            Dense2D("out"),
            DtypeIn("x", HALF),
            *_RESIDUAL,
            *_PLAIN,
            WeightRule((False,), (0.0, 1.0)),
        ),
        _FLASHINFER,
    ),
    Contract("strided_rms_norm", "rms_norm", _STRIDED, _OURS),
    Contract("strided_layer_norm", "layer_norm", _STRIDED, _OURS),
    Contract(
        "strided_add_rms_norm",
        "add_rms_norm",
        (SameShape("residual", "x"), DtypeIn("residual", FLOAT), *_STRIDED),
        _OURS,
    ),
    Contract(
        "strided_qk_norm",
        "qk_norm",
        (
            DtypeIn("q", FLOAT),
            SameDtype("k"),
            ComputesIn(torch.float32),
            Rank("q", 1, MAX_RANK),
            Rank("k", 1, MAX_RANK),
            HiddenAtMost(MAX_HIDDEN),
            SameHidden("k", "q"),
        ),
        _OURS + ": q and k in one launch",
    ),
    Contract(
        "skinny_linear",
        "linear",
        (
            Rank("x", 2, 2),
            Rank("weight", 2, 2),
            Rank("bias", 1, 1),
            FewRows(linear.MOST_ROWS),
            DtypeIn("x", linear.DTYPES),
            SameDtype("weight"),
            SameDtype("bias"),
            RowsOrColumns("weight"),
        ),
        "fixpass.runtime.linear: reads x of any strides; rows or columns of W with any pitch",
    ),
)


def contract_of(kernel: str, op: str) -> Contract | None:
    """The row for `kernel` computing `op`, or None when it does not compute that op.

    Of several generations of a library the installed one counts, and the oldest, which promises
    least, where none is installed.
    """
    rows = _rows_of(kernel, op)
    installed = aiter_generation() if any(row.generation for row in rows) else ""
    fitting = (row for row in rows if not installed or row.generation in ("", installed))
    return next(fitting, None)


@cache
def _rows_of(kernel: str, op: str) -> tuple[Contract, ...]:
    return tuple(row for row in CONTRACTS if row.kernel == kernel and row.op == op)


def kernel_names() -> tuple[str, ...]:
    """Every norm kernel of the table, once, in the table's order."""
    norms = (contract for contract in CONTRACTS if contract.op != "linear")
    return tuple(dict.fromkeys(contract.kernel for contract in norms))
