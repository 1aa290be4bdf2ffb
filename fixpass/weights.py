"""Checkpoints into models, folds of weights, and updates that are whole or not at all.

`load` and `Mapping` bring a checkpoint into a model; `fold` and `fold_model` rearrange weights in
place; `update` and `reload` give a live model other weights.
"""

from fixpass.runtime.weights.alias import pack, unpack
from fixpass.runtime.weights.checkpoint_view import checkpoint_layout
from fixpass.runtime.weights.digest import digest
from fixpass.runtime.weights.layouts import Alias, Bytes, Layout, Pad, Permute, Stride
from fixpass.runtime.weights.load import load, reload
from fixpass.runtime.weights.lock import read_lock, write_lock
from fixpass.runtime.weights.mapping import (
    FUSED_EXPERTS,
    GATE_UP,
    GATED_EXPERTS,
    MIXTRAL_EXPERTS,
    PLAIN_EXPERTS,
    QKV,
    ExpertPart,
    Experts,
    Mapping,
    Rename,
    Stacked,
    Stage,
    TensorParallel,
)
from fixpass.runtime.weights.module_hooks import protect, reset_layouts, set_layouts
from fixpass.runtime.weights.rebind import Rebound, copy_or_rebind
from fixpass.runtime.weights.relayout import layout_of, logical, reset_layout, set_layout
from fixpass.runtime.weights.report import LoadReport
from fixpass.runtime.weights.shuffle_op import shuffle_weight
from fixpass.runtime.weights.state_file import SavedState, resume
from fixpass.runtime.weights.table import forget
from fixpass.runtime.weights.update import Update, UpdateReport, update
from fixpass.runtime.weights.versions import version
from fixpass.runtime.weights.writes import (
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
    "Bytes",
    "ExpertPart",
    "Experts",
    "Layout",
    "LoadReport",
    "Mapping",
    "Pad",
    "Permute",
    "Rebound",
    "Rename",
    "SavedState",
    "Stacked",
    "Stage",
    "Stride",
    "TensorParallel",
    "UnseenWriteWarning",
    "Update",
    "UpdateReport",
    "Writes",
    "announce_loads",
    "checkpoint_layout",
    "copy_or_rebind",
    "digest",
    "forget",
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
    "unpack",
    "update",
    "version",
    "watch",
    "write_lock",
    "writes",
]
