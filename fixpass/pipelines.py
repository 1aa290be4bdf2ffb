"""From options and a device to the pipelines that run: ours, the user's, installed ones.

The entry point groups `fixpass.passes`, `fixpass.kernels` and `fixpass.targets` are read here, once
a process.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor import config as inductor_config

from fixpass.config import Config, local_world_size
from fixpass.lowering.contract import Kernel
from fixpass.lowering.contract_table import add_kernels, kernel_names, rows_of
from fixpass.lowering.eager_calls import check_call
from fixpass.lowering.target import FALLBACK, Target, target_of
from fixpass.passes import default_passes, entry_passes
from fixpass.passes.base import Pass
from fixpass.passes.fold_weights import FoldWeights
from fixpass.passes.pipeline import Pipeline
from fixpass.passes.place_symmetric_memory import PlaceSymmetricMemory
from fixpass.passes.prepack_linears import PrepackLinears
from fixpass.passes.select_linear_kernel import SelectLinearKernel
from fixpass.runtime.errors import ConfigError
from fixpass.runtime.providers import check_calls, describe_needs
from fixpass.runtime.symmetric_memory.policy import Policy
from fixpass.runtime.weights.prepack import packable_dtypes

log = logging.getLogger("fixpass")

OWN_LINEARS = ("freezing", "max_autotune", "max_autotune_gemm")
"""Options of Inductor with which it packs weights, or fuses pointwise operations into a matmul."""


@cache
def installed(group: str) -> tuple[Any, ...]:
    """The objects that installed packages offer through an entry point group, by entry name."""
    entries = sorted(entry_points(group=group), key=lambda entry: entry.name)
    return tuple(entry.load() for entry in entries)


@cache
def installed_passes() -> tuple[Pass, ...]:
    """An instance of each pass class of the entry point group `fixpass.passes`."""
    return _of_type("fixpass.passes", Pass, tuple(cls() for cls in installed("fixpass.passes")))


@cache
def installed_kernels() -> tuple[Kernel, ...]:
    """Each `Kernel` of the entry point group `fixpass.kernels`."""
    return _of_type("fixpass.kernels", Kernel, installed("fixpass.kernels"))


@cache
def installed_targets() -> tuple[Target, ...]:
    """Each `Target` of the entry point group `fixpass.targets`."""
    return _of_type("fixpass.targets", Target, installed("fixpass.targets"))


def _of_type(group: str, kind: type, found: tuple[Any, ...]) -> tuple[Any, ...]:
    for item in found:
        if not isinstance(item, kind):
            raise ConfigError(f"entry point group {group}: {item!r} is no fixpass.{kind.__name__}")
    return found


def in_order(ours: Sequence[Pass], theirs: Sequence[Pass]) -> tuple[Pass, ...]:
    """Our passes with those of others where their `after` and `before` ask for, else at the end.

    Raises:
        ConfigError: an anchor is none of the passes so far, or `after` does not precede `before`.

    """
    steps = list(ours)
    for step in theirs:
        names = [known.name for known in steps]
        for anchor in (step.after, step.before):
            if anchor and anchor not in names:
                known = ", ".join(names)
                raise ConfigError(f"pass {step.name}: there is no pass {anchor!r}; known: {known}")
        last = names.index(step.before) if step.before else len(steps)
        place = names.index(step.after) + 1 if step.after else last
        if place > last:
            raise ConfigError(f"pass {step.name}: {step.after} does not run before {step.before}")
        steps.insert(place, step)
    return tuple(steps)


def entry_pipeline(config: Config, *, may_restride: bool = False) -> Pipeline:
    """What runs on Dynamo's graph. It is not verified: no recorded value is functional there.

    may_restride: weights may be changed, under fold_weights="restride".
    """
    folds = FoldWeights(
        config.fold_weights or "cache",
        may_restride,
        explicit=config.fold_weights is not None,
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
    if config.verify:
        check_calls(check_call)
    ours = default_passes(target, collectives(config, target, may_communicate), linears)
    steps = in_order(ours, (*installed_passes(), *config.passes))
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
    if torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs
    ):
        return SelectLinearKernel(reason="the call records gradients")
    for name in OWN_LINEARS:
        if options[name]:
            return SelectLinearKernel(reason=f"its option {name!r} chooses their kernels")
    return SelectLinearKernel(target.device_type == "cpu")


def collectives(config: Config, target: Target, may_communicate: bool) -> PlaceSymmetricMemory:
    """The pass for collectives, with what there is to know about this process's groups."""
    given = config.symmetric_memory
    policy = given if isinstance(given, Policy) else Policy(enabled=given)
    if not has_groups():
        return PlaceSymmetricMemory(target, policy)
    from fixpass.runtime.symmetric_memory import groups

    groups.configure(timeout=config.symmetric_timeout)
    topology = f"{dist.get_world_size()} ranks, {local_world_size() or '?'} of them here"
    describe = groups.rendezvous_facts if may_communicate else groups.local_facts
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
    """Tell Inductor how our linear layers are lowered, and our collectives where there are any."""
    from fixpass.lowering.inductor_linear import register_linear

    register_linear()
    if has_groups():
        from fixpass.lowering.inductor import register

        register()


def present_target(example_inputs: Sequence[object], config: Config) -> Target:
    """The target of the device that the inputs are on, with the kernels that are installed."""
    devices = [x.device for x in example_inputs if isinstance(x, torch.Tensor)]
    accelerated = [device for device in devices if device.type != "cpu"]
    return target_here(accelerated[0] if accelerated else torch.device("cpu"), config)


def target_here(device: torch.device, config: Config) -> Target:
    """The target of a device that is present; it says which of its kernels are not installed.

    Raises:
        ConfigError: a kernel is unknown; or, under `strict`, a kernel of the option
            `norm_kernels` is not installed.

    """
    target = preferred(target_of(device, known_targets(config)), config)
    if target.row:
        _say_once(f"target {target}, because {target.name} has no kernels of its own")
    missing = tuple(name for name in target.kernels if not _is_installed(name))
    if missing and config.strict and config.norm_kernels is not None:
        needs = "; ".join(f"{name} needs {_needs(name)}" for name in missing)
        raise ConfigError(f'option "norm_kernels": not installed: {needs}')
    return replace(target, missing=missing)


@cache
def _say_once(text: str) -> None:
    log.warning("%s", text)


def _is_installed(kernel: str) -> bool:
    return any(row.is_installed for row in rows_of(kernel))


def _needs(kernel: str) -> str:
    return describe_needs(rows_of(kernel)[-1].needs)


def known_targets(config: Config) -> tuple[Target, ...]:
    """The targets of the option `targets` and of installed packages, which win over ours."""
    return (*config.targets, *installed_targets())


def preferred(target: Target, config: Config) -> Target:
    """The target with the kernels of the option `norm_kernels`, kept to in that order.

    Without Inductor behind the passes (`lower="eager"`) its code comes last: nothing fuses it.

    Raises:
        ConfigError: a kernel of the target or of the option is unknown.

    """
    if config.norm_kernels is not None:
        target = replace(target, kernels=config.norm_kernels, prefers_fusion=False)
    elif config.lower == "eager":
        kernels = sorted(target.kernels, key=lambda name: name == FALLBACK)
        target = replace(target, kernels=tuple(kernels), prefers_fusion=False)
    check_kernels(target.kernels, config, f"target {target.name}")
    return target


def check_kernels(
    names: Sequence[str], config: Config, where: str = "option 'norm_kernels'"
) -> None:
    """Make the kernels of the options and of installed packages known; ConfigError for others."""
    add_kernels((*config.kernels, *installed_kernels()))
    unknown = [name for name in names if name not in kernel_names()]
    if unknown:
        known = ", ".join(kernel_names())
        raise ConfigError(f"{where}: unknown {unknown[0]!r}; known: {known}")


def _enabled(steps: tuple[Pass, ...], config: Config) -> tuple[Pass, ...]:
    return tuple(step for step in steps if step.name not in config.disable)
