"""Load checkpoints, set the layouts of weights, and update the weights of a live model.

`load` and `Mapping` bring a checkpoint into a model. `set_layout` and `set_layouts` rearrange
weights in place. `update` and `reload` give a live model other weights: all of them, or none.
"""

import warnings
from typing import Any

from fixpass.runtime.weights.audit import Audit, Finding, audit
from fixpass.runtime.weights.census import Census, Entry, census
from fixpass.runtime.weights.checkpoint_diff import Comparison, diff, stored_tensors
from fixpass.runtime.weights.checkpoint_view import checkpoint_layout
from fixpass.runtime.weights.derived import derive
from fixpass.runtime.weights.doctor import Diagnosis, check
from fixpass.runtime.weights.layouts import (
    Alias,
    Bytes,
    Pad,
    Permute,
    Stride,
    SwapHalves,
    WeightLayout,
)
from fixpass.runtime.weights.load import load, reload
from fixpass.runtime.weights.lock import read_lock, version, write_lock
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.mapping_rules import (
    FUSED_EXPERTS,
    GATE_UP,
    GATED_EXPERTS,
    MIXTRAL_EXPERTS,
    PLAIN_EXPERTS,
    QKV,
    ExpertPart,
    Experts,
    Rename,
    Stacked,
    Stage,
    TensorParallel,
)
from fixpass.runtime.weights.module_hooks import protect, reset_layouts, set_layouts
from fixpass.runtime.weights.parameter_layout import (
    forget,
    layout_of,
    logical,
    reset_layout,
    set_layout,
)
from fixpass.runtime.weights.rebind import Rebound, copy_or_rebind, pack, unpack
from fixpass.runtime.weights.reports import LoadReport, UpdateReport
from fixpass.runtime.weights.shuffle_op import shuffle_weight
from fixpass.runtime.weights.stale import StaleWarning
from fixpass.runtime.weights.state_file import SavedState, digest, resume
from fixpass.runtime.weights.update import Update, update
from fixpass.runtime.weights.update_group import UpdateGroup, group_version
from fixpass.runtime.weights.weight_version import (
    UnseenWriteWarning,
    Writes,
    announce_loads,
    watch,
    writes,
)

__all__ = [
    "FUSED_EXPERTS",
    "GATED_EXPERTS",
    "GATE_UP",
    "MIXTRAL_EXPERTS",
    "PLAIN_EXPERTS",
    "QKV",
    "Alias",
    "Audit",
    "Bytes",
    "Census",
    "Comparison",
    "Diagnosis",
    "Entry",
    "ExpertPart",
    "Experts",
    "Finding",
    "LoadReport",
    "Mapping",
    "Pad",
    "Permute",
    "Rebound",
    "Rename",
    "SavedState",
    "Stacked",
    "Stage",
    "StaleWarning",
    "Stride",
    "SwapHalves",
    "TensorParallel",
    "UnseenWriteWarning",
    "Update",
    "UpdateGroup",
    "UpdateReport",
    "WeightLayout",
    "Writes",
    "announce_loads",
    "audit",
    "census",
    "check",
    "checkpoint_layout",
    "copy_or_rebind",
    "derive",
    "diff",
    "digest",
    "forget",
    "group_version",
    "layout_of",
    "load",
    "logical",
    "pack",
    "protect",
    "read_lock",
    "reload",
    "reset_layout",
    "reset_layouts",
    "resume",
    "set_layout",
    "set_layouts",
    "shuffle_weight",
    "stored_tensors",
    "unpack",
    "update",
    "version",
    "watch",
    "write_lock",
    "writes",
]

_OLD_NAMES = {
    "Layout": "WeightLayout",
    "fold": "set_layout",
    "fold_model": "set_layouts",
    "reading": "read_lock",
    "unfold": "reset_layout",
    "unfold_model": "reset_layouts",
    "window": "checkpoint_layout",
    "writing": "write_lock",
}
"""Names of the release before, which warn and work for one more."""


def __getattr__(name: str) -> Any:
    if name not in _OLD_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _OLD_NAMES[name]
    warnings.warn(
        f"fixpass.weights.{name} is now fixpass.weights.{new}; the old name goes in the next "
        "release",
        DeprecationWarning,
        stacklevel=2,
    )
    return globals()[new]
