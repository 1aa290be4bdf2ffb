"""Shard models with FSDP2: conditions that choose the units, and `fully_shard_model`.

`CONDITIONS` holds the named conditions, such as `CONDITIONS["is_layer"]`. Their former names in
this module, and those of `ENCODERS`, still work and warn.
"""

import warnings
from typing import Any

from torch import nn

from fixpass.runtime.shard_conditions import (
    CONDITIONS,
    ENCODERS,
    Condition,
    any_of,
    class_named,
    entry_of,
    named,
    numbered_within,
    resolve_shard_conditions,
    shard_units,
)
from fixpass.runtime.sharding import ShardReport, fully_shard_model

__all__ = [
    "CONDITIONS",
    "ENCODERS",
    "Condition",
    "ShardReport",
    "any_of",
    "class_named",
    "entry_of",
    "fully_shard_model",
    "named",
    "numbered_within",
    "resolve_shard_conditions",
    "shard_units",
]

_ENCODERS = {"ENCODER": "text", "CLIP_ENCODER": "clip", "T5_ENCODER": "t5"}
_ENTRIES = {
    "is_module_list_entry": lambda name, container: entry_of(container)(name, nn.Identity()),
    "is_module_list_entry_in": lambda name, names: entry_of(*names)(name, nn.Identity()),
}


def __getattr__(name: str) -> Any:
    found: Any
    if name in CONDITIONS:
        instead, found = f"CONDITIONS[{name!r}]", CONDITIONS[name]
    elif name in _ENCODERS:
        instead, found = f"ENCODERS[{_ENCODERS[name]!r}]", ENCODERS[_ENCODERS[name]]
    elif name in _ENTRIES:
        instead, found = "entry_of(...)(name, module)", _ENTRIES[name]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"fixpass.sharding.{name} is deprecated: use fixpass.sharding.{instead}",
        DeprecationWarning,
        stacklevel=2,
    )
    return found
