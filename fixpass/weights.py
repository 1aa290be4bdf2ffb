"""Checkpoints into models: `load`, the `Mapping` between their names, and the report of a load."""

from fixpass.runtime.checkpoint.loader import load
from fixpass.runtime.checkpoint.mapping import (
    ExpertPart,
    Experts,
    Mapping,
    Rename,
    Stacked,
    Stage,
    TensorParallel,
)
from fixpass.runtime.checkpoint.presets import (
    FUSED_EXPERTS,
    GATE_UP,
    GATED_EXPERTS,
    MIXTRAL_EXPERTS,
    PLAIN_EXPERTS,
    QKV,
)
from fixpass.runtime.checkpoint.report import LoadReport

__all__ = [
    "FUSED_EXPERTS",
    "GATED_EXPERTS",
    "GATE_UP",
    "MIXTRAL_EXPERTS",
    "PLAIN_EXPERTS",
    "QKV",
    "ExpertPart",
    "Experts",
    "LoadReport",
    "Mapping",
    "Rename",
    "Stacked",
    "Stage",
    "TensorParallel",
    "load",
]
