"""From options and a device to the pipelines that run: ours, the user's, installed ones.

Entry points of the group `fixpass.passes` are read here, once a process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor import config as inductor_config

from fixpass.config import Config, local_world_size
from fixpass.lowering.target import Target, target_of
from fixpass.passes import default_passes, entry_passes
from fixpass.passes.base import Pass
from fixpass.passes.fold_weights import FoldWeights
from fixpass.passes.pipeline import Pipeline
from fixpass.passes.place_symmetric_memory import PlaceSymmetricMemory
from fixpass.passes.prepack_linears import PrepackLinears
from fixpass.passes.select_linear_kernel import SelectLinearKernel
from fixpass.runtime.errors import ConfigError, UnsupportedTorchError
from fixpass.runtime.providers import is_available
from fixpass.runtime.symmetric_memory.policy import Policy
from fixpass.runtime.weights.prepack import packable_dtypes

OLDEST, NEWEST = (2, 11), (2, 14)
OWN_LINEARS = ("freezing", "max_autotune", "max_autotune_gemm")
"""Options of Inductor with which it packs weights, or fuses pointwise operations into a matmul."""


def check_torch(version: str = torch.__version__) -> None:
    """Raise UnsupportedTorchError unless the installed torch is one that fixpass supports."""
    found = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= found <= NEWEST:
        raise UnsupportedTorchError(
            f"fixpass supports torch {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, found "
            f'{version}: install another torch, or compile with backend="inductor"'
        )


@cache
def installed_passes() -> tuple[Pass, ...]:
    """Passes that installed packages offer through the entry point group `fixpass.passes`."""
    found = []
    for entry in sorted(entry_points(group="fixpass.passes"), key=lambda entry: entry.name):
        step = entry.load()()
        if not isinstance(step, Pass):
            raise ConfigError(f"entry point {entry.name} ({entry.value}) gives no fixpass.Pass")
        found.append(step)
    return tuple(found)


def entry_pipeline(config: Config, *, may_restride: bool = False) -> Pipeline:
    """What runs on Dynamo's graph. It is not verified: no recorded value is functional there.

    may_restride: weights may be changed, under fold="inplace".
    """
    folds = FoldWeights(
        config.fold or "derived",
        may_restride,
        explicit=config.fold is not None,
        uses_fsdp=_is_sharded(),
    )
    steps = _enabled(entry_passes(folds, PrepackLinears(packable_dtypes())), config)
    return Pipeline(steps, strict=config.strict, fuel=config.fuel)


def graph_pipeline(
    config: Config,
    target: Target,
    linears: SelectLinearKernel | None = None,
    *,
    may_communicate: bool = True,
) -> Pipeline:
    """What runs on the functional ATen graph for `target`.

    may_communicate: the ranks of a group may be asked about it, which waits until they all compile.
    """
    ours = default_passes(target, collectives(config, target, may_communicate), linears)
    steps = (*ours, *installed_passes(), *config.passes)
    return Pipeline(_enabled(steps, config), config.verify, config.strict, config.fuel)


def linears(
    config: Config, target: Target, example_inputs: Sequence[object], patches: Mapping[str, Any]
) -> SelectLinearKernel | None:
    """The pass for linear layers, with what is known of this compile.

    patches: the options of Inductor that the compile changes.
    """
    if config.linear == "inductor":
        return None
    options = {name: getattr(inductor_config, name) for name in OWN_LINEARS} | dict(patches)
    set_ones = [name for name in OWN_LINEARS if options[name]]
    if torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs
    ):
        reason = "the call records gradients"
    elif set_ones:
        reason = f"its option {set_ones[0]!r} chooses their kernels"
    else:
        return SelectLinearKernel(target.device_type == "cpu")
    return SelectLinearKernel(reason=reason)


def collectives(config: Config, target: Target, may_communicate: bool) -> PlaceSymmetricMemory:
    """The pass for collectives, with what there is to know about this process's groups."""
    given = config.symmetric_memory
    policy = given if isinstance(given, Policy) else Policy(enabled=given)
    if not has_groups():
        return PlaceSymmetricMemory(target, policy)
    from fixpass.runtime.symmetric_memory import groups

    groups.configure(timeout=config.symmetric_timeout)
    topology = f"{dist.get_world_size()} ranks, {local_world_size() or '?'} of them here"
    describe = groups.settle if may_communicate else groups.peek
    return PlaceSymmetricMemory(target, policy, topology, describe)


def _is_sharded() -> bool:
    """Whether FSDP2 has wrapped any module here: it makes a class for each class that it wraps."""
    if not has_groups():
        return False
    from torch.distributed.fsdp import FSDPModule

    return bool(FSDPModule.__subclasses__())


def has_groups() -> bool:
    """Whether this process has process groups."""
    return dist.is_available() and dist.is_initialized()


def register_lowerings() -> None:
    """Tell Inductor how our collectives are lowered, where there can be any."""
    if has_groups():
        from fixpass.lowering.inductor import register

        register()


def present_target(example_inputs: Sequence[object], config: Config) -> Target:
    """The target of the device that the inputs are on, with the kernels that are installed."""
    devices = [x.device for x in example_inputs if isinstance(x, torch.Tensor)]
    accelerated = [device for device in devices if device.type != "cpu"]
    return target_here(accelerated[0] if accelerated else torch.device("cpu"), config)


def target_here(device: torch.device, config: Config) -> Target:
    """The target of a device that is present, with the kernels that are installed."""
    target = preferred(target_of(device), config)
    installed = tuple(k for k in target.kernels if k == "inductor" or is_available(k))
    return replace(target, kernels=installed)


def preferred(target: Target, config: Config) -> Target:
    """The target with the user's order of kernels, where there is one: then it is kept to."""
    if config.norm_kernels is None:
        return target
    return replace(target, kernels=config.norm_kernels, prefers_fusion=False)


def _enabled(steps: tuple[Pass, ...], config: Config) -> tuple[Pass, ...]:
    return tuple(step for step in steps if step.name not in config.disable)
