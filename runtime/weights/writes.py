"""Writes to weights outside of an update: those that torch counts are seen, others are sampled.

A `Watch` compares the keys of versions and the objects under their names, which sees every write
that torch counts and all memory that was replaced. Writes that torch tells nobody of, through
`.data`, numpy or a storage, change values alone: a fingerprint of some values of each parameter
finds those that change many of them. A write of a few values between the samples is not found.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights.cells import raw
from fixpass.runtime.weights.targets import local_box, targets
from fixpass.runtime.weights.versions import Changes, changes

SAMPLES = 256


class UnseenWriteWarning(UserWarning):
    """Weights were written in a way that torch does not signal."""


@dataclass(frozen=True)
class Writes:
    """Names of parameters: written as torch counts it, other objects now, written unseen."""

    seen: tuple[str, ...]
    replaced: tuple[str, ...]
    unseen: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.seen or self.replaced or self.unseen)


@dataclass(frozen=True)
class _Note:
    tensor: Tensor
    key: Changes
    fingerprint: int


class Watch:
    """The parameters and persistent buffers of a model, as they were when last looked at.

    samples: values of each tensor in its fingerprint; 0 for all of them. It keeps the tensors.
    """

    def __init__(self, model: nn.Module, samples: int = SAMPLES) -> None:
        self._samples = samples
        self._notes: dict[str, _Note] = {}
        self.refresh(model)

    def refresh(self, model: nn.Module) -> None:
        """Take the present weights as known."""
        self._notes = {
            name: _Note(t.tensor, changes(t.tensor), fingerprint(t.tensor, self._samples))
            for name, t in targets(model).items()
        }

    def check(self, model: nn.Module) -> Writes:
        """What was written since; it is known from now on. Warns of what torch did not signal."""
        seen, replaced, unseen = [], [], []
        for name, target in targets(model).items():
            noted = self._notes.get(name)
            if noted is None or noted.tensor is not target.tensor:
                replaced.append(name)
            elif noted.key != changes(target.tensor):
                seen.append(name)
            elif noted.fingerprint != fingerprint(target.tensor, self._samples):
                unseen.append(name)
        self.refresh(model)
        if unseen:
            warnings.warn(
                f"{len(unseen)} weights were written in a way that torch does not signal, among "
                f"them {unseen[0]}: what was derived from them may be stale. Write them in "
                "fixpass.weights.update, or call fixpass.weights.announce_loads once",
                UnseenWriteWarning,
                stacklevel=2,
            )
        return Writes(tuple(seen), tuple(replaced), tuple(unseen))


_WATCHES: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()


def watch(model: nn.Module, samples: int = SAMPLES) -> None:
    """Begin to watch a model; every update that is committed is known to the watch."""
    inside = unwrapped(model)
    announce_steps()
    _WATCHES[inside] = Watch(inside, samples)


def writes(model: nn.Module) -> Writes:
    """What was written to a watched model, outside of updates, since this was last asked."""
    inside = unwrapped(model)
    found = _WATCHES.get(inside)
    if found is None:
        watch(inside)
        return Writes((), (), ())
    return found.check(inside)


def committed(model: nn.Module) -> None:
    """An update was committed: a watch of the model, if there is one, takes it as known."""
    inside = unwrapped(model)
    if (found := _WATCHES.get(inside)) is not None:
        found.refresh(inside)


def announce_loads(model: nn.Module) -> tuple[str, ...]:
    """Let each `weight_loader` set on a parameter tell torch of its write; the names of those.

    Loaders write through `.data`, of which torch tells nobody. The attribute becomes a function
    that calls the former one, which stays under `__wrapped__`. Those of a class are left alone.
    """
    done = []
    for name, target in targets(model).items():
        loader = vars(target.tensor).get("weight_loader")
        if callable(loader) and not isinstance(loader, _Announcing):
            target.tensor.__dict__["weight_loader"] = _Announcing(loader)
            done.append(name)
    return tuple(done)


_STEPS: list[RemovableHandle] = []


def announce_steps() -> None:
    """Let each step of any optimizer tell torch of its writes, once a process.

    Those with fused=True write without raising the version of a parameter (torch 2.13).
    """
    if not _STEPS:
        _STEPS.append(register_optimizer_step_post_hook(_announce_step))


def _announce_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer.defaults.get("fused"):
        for group in optimizer.param_groups:
            torch.autograd.graph.increment_version(group["params"])


class _Announcing:
    """A loader that tells torch that it wrote to its first argument."""

    def __init__(self, loader: Callable[..., Any]) -> None:
        functools.update_wrapper(self, loader)
        self._loader = loader

    def __call__(self, param: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._loader(param, *args, **kwargs)
        finally:
            torch.autograd.graph.increment_version(param)


def fingerprint(tensor: Tensor, samples: int = SAMPLES) -> int:
    """A number of some values of a tensor on this rank, evenly spread; of all with samples=0."""
    local = local_box(tensor.detach())[0]
    if local.numel() == 0:
        return 0
    if local.is_complex():
        local = torch.view_as_real(local)
    flat = local.permute(sorted(range(local.dim()), key=lambda dim: -local.stride()[dim]))
    bits = flat.reshape(-1).view(raw(local.dtype))
    step = max(1, bits.numel() // samples) if samples else 1
    return hash(bits[step // 2 :: step].cpu().numpy().tobytes())
