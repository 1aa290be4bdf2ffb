"""Targets: a device and its norm kernels in order of preference.

A target is one literal. `target_named` raises on an unknown name and lists the known ones;
`target_of` finds the target of a device that is present. Installed libraries are not looked at.
"""

import re
from dataclasses import dataclass, replace

import torch

from fixpass.runtime.errors import ConfigError

FALLBACK = "inductor"
"""The kernel that takes any layout: the op's decomposition, compiled by Inductor."""


@dataclass(frozen=True)
class Target:
    """A device that code is compiled for, and the kernels to choose from.

    Of kernels that move equally many bytes in equally many launches the first is chosen.
    """

    name: str
    device_type: str
    kernels: tuple[str, ...]
    prefers_fusion: bool = True
    """Count bytes and launches. False: take the first kernel that needs no copy, whatever Inductor
    could fuse."""
    missing: tuple[str, ...] = ()
    """The kernels of the list that are not installed: they are reported, and never chosen."""
    row: str = ""
    """The target whose kernels this device takes, where the device has none of its own."""

    def __str__(self) -> str:
        return f"{self.name}, with the kernels of {self.row}" if self.row else self.name

    def has(self, kernel: str) -> bool:
        """Whether the kernel may be chosen."""
        return kernel in self.kernels and kernel not in self.missing


_OURS = (
    "strided_rms_norm",
    "strided_layer_norm",
    "strided_add_rms_norm",
    "strided_qk_norm",
    "strided_qk_norm_rope",
    "strided_rms_norm_quant",
    "strided_gated_rms_norm",
)
_AITER = ("aiter_rms_norm", "aiter_layer_norm", "aiter_add_rms_norm")

# At equal cost Inductor's code goes before ours: it costs no call from Python, and its figures on
# CUDA equal those of the best public kernels; ours were not measured on a GPU yet.
_CUDA_KERNELS = (FALLBACK, *_OURS)
# aiter's kernels are the vendor's, and need no measurement of ours to be preferred.
_ROCM_KERNELS = (*_AITER, *_CUDA_KERNELS)

# On CPU Inductor's own C++ reads any stride and fuses; an opaque kernel would only cost.
CPU = Target("cpu", "cpu", (FALLBACK,))

TARGETS: tuple[Target, ...] = (
    CPU,
    *(Target(f"cuda:sm_{n}", "cuda", _CUDA_KERNELS) for n in (80, 89, 90, 100, 103, 120)),
    Target("rocm:gfx90a", "cuda", _CUDA_KERNELS),
    Target("rocm:gfx942", "cuda", _ROCM_KERNELS),
    Target("rocm:gfx950", "cuda", _ROCM_KERNELS),
    Target("rocm:gfx1201", "cuda", _CUDA_KERNELS),
    Target("rocm:gfx1250", "cuda", _CUDA_KERNELS),
)


def target_named(name: str, more: tuple[Target, ...] = ()) -> Target:
    """The target called `name`; ConfigError with the known names when there is none.

    more: targets that win over ours.
    """
    for target in (*more, *TARGETS):
        if target.name == name:
            return target
    known = ", ".join(target.name for target in (*more, *TARGETS))
    raise ConfigError(f"unknown target {name!r}; known targets: {known}")


def target_of(device: torch.device, more: tuple[Target, ...] = ()) -> Target:
    """The target of a present device.

    A device without a target takes the kernels of the newest target of its family that is not newer
    than the device. With none, it gets Inductor's code only.

    more: targets that win over ours.
    """
    return target_like(_name_of(device), device.type, more)


def target_like(name: str, device_type: str, more: tuple[Target, ...] = ()) -> Target:
    """The target called `name`, or one with the kernels of its nearest relation."""
    known = (*more, *TARGETS)
    found = next((target for target in known if target.name == name), None)
    if found is not None:
        return found
    family, generation = _generation(name)
    older = [t for t in known if _generation(t.name)[0] == family and t.name != t.device_type]
    older = [target for target in older if _generation(target.name)[1] <= generation]
    if not older:
        return Target(name, device_type, (FALLBACK,))
    nearest = max(older, key=lambda target: _generation(target.name)[1])
    return replace(nearest, name=name, row=nearest.name)


def _generation(name: str) -> tuple[str, int]:
    """The family of a device and its place in it: gfx9 and gfx12 are families, and so is sm."""
    if match := re.fullmatch(r"cuda:sm_(\d+)", name):
        return "sm", int(match[1])
    if match := re.fullmatch(r"rocm:gfx(\d+)([0-9a-f]{2})", name):
        return f"gfx{match[1]}", int(match[2], 16)
    return name, 0


def _name_of(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return f"rocm:{properties.gcnArchName.partition(':')[0]}"
    return f"cuda:sm_{properties.major}{properties.minor}"
