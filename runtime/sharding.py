"""Shards a model with FSDP2 so that a checkpoint can still be loaded into it.

FSDP2 renames classes and replaces parameters. So units are resolved before, and attributes of
parameters, such as `weight_loader`, are set again after. Tensor parallelism on another dimension
of the mesh comes first. No checkpoint is read here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from fixpass.runtime.attributes import keep_through_apply, recall, remember
from fixpass.runtime.errors import ShardingError
from fixpass.runtime.modules import find_attr
from fixpass.runtime.shard_conditions import (
    Condition,
    Rule,
    resolve_shard_conditions,
    shard_units,
)

# The attributes in which models list the parts that lose too much in a smaller dtype.
_KEEP = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_fsdp_mixed_dtype_params")

_FORWARD_METHODS = "_fsdp_forward_methods"


@dataclass(frozen=True)
class ShardReport:
    """How a model was sharded."""

    rule: Rule
    """Where the conditions come from."""
    units: tuple[str, ...]
    """The modules that are sharded by themselves, before the root."""
    kept: tuple[str, ...] = ()
    """The modules whose parameters keep their dtype though the policy has another."""
    forward_methods: tuple[str, ...] = ()
    """The methods besides `forward` that gather parameters."""


def fully_shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    conditions: Sequence[Condition] | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    keep_dtype: Iterable[str] = (),
    forward_methods: Iterable[str] = (),
    reshard_after_forward: bool | int = True,
    offload_policy: OffloadPolicy | None = None,
) -> ShardReport:
    """Shard `model` in place over `mesh`: blocks first, then the root.

    Attributes of parameters, such as `weight_loader`, are kept, also through a later `model.to()`.

    Args:
        model: The model. Parameters that `parallelize_module` made DTensors may be among its own.
        mesh: A mesh of one dimension, or of two for hybrid sharding.
        conditions: The conditions that choose the units; None takes those of the model's class.
        mp_policy: The dtypes of FSDP2's mixed precision.
        keep_dtype: Names of modules or parameters that `mp_policy` leaves in their dtype, besides
            those that the model's class lists.
        forward_methods: Names of methods of the model that use parameters, besides those in its
            `_fsdp_forward_methods`.
        reshard_after_forward: As in `fully_shard`.
        offload_policy: As in `fully_shard`.

    Raises:
        ShardingError: No module matches, or the model has no method of a given name.

    Example:
        `fully_shard_model(model, mesh, conditions=(entry_of("blocks"), named("embed_tokens")))`

    """
    resolved, rule = resolve_shard_conditions(model, conditions)
    units = shard_units(model, resolved)
    methods = (*(find_attr(model, _FORWARD_METHODS, None) or ()), *forward_methods)
    for method in methods:
        if not callable(find_attr(model, method, None)):
            raise ShardingError(f"{type(model).__name__} has no method {method!r} to register")
    policy = mp_policy or MixedPrecisionPolicy()
    kept = _kept(model, units, policy, {*_kept_names(model), *keep_dtype})
    remember(model)
    plain = replace(policy, param_dtype=None)
    # What keeps its dtype within a block is a unit of its own, and comes before the block.
    inner = tuple(name for name in kept if name and name not in units)
    for name in (*inner, *reversed(units), ""):
        fully_shard(
            model.get_submodule(name),
            mesh=mesh,
            mp_policy=plain if name in kept else policy,
            reshard_after_forward=reshard_after_forward,
            offload_policy=offload_policy or OffloadPolicy(),
        )
    recall(model)
    keep_through_apply(model)
    for method in methods:
        register_fsdp_forward_method(model, method)
    return ShardReport(rule, units, kept, methods)


def _kept_names(model: nn.Module) -> set[str]:
    return {name for attribute in _KEEP for name in find_attr(model, attribute, None) or ()}


def _kept(
    model: nn.Module, units: tuple[str, ...], policy: MixedPrecisionPolicy, names: set[str]
) -> tuple[str, ...]:
    """Modules to shard with no dtype of the policy; nothing where the policy has none."""
    if policy.param_dtype is None:
        return ()
    kept = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in names and _holds_parameters(module)
    ]
    kept = [name for name in kept if not any(name.startswith(f"{other}.") for other in kept)]
    # A parameter that lies in a unit itself, or a unit of several dtypes, keeps all of the unit.
    for unit in (*units, ""):
        below = [other for other in (*units, *kept) if other != unit and _inside(other, unit)]
        own = [
            (name, param)
            for name, param in model.get_submodule(unit).named_parameters(prefix=unit)
            if not any(_inside(name, other) for other in below)
        ]
        listed = any(name.rpartition(".")[2] in names for name, _ in own)
        if unit not in kept and (listed or len({param.dtype for _, param in own}) > 1):
            kept.append(unit)
    return tuple(kept)


def _inside(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
