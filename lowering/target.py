"""Targets: a device and its norm kernels in order of preference.

A target is one literal. `target_named` raises on an unknown name and lists the known ones;
`target_of` finds the target of a device that is present. Installed libraries are not looked at.
"""

from dataclasses import dataclass

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

    def has(self, kernel: str) -> bool:
        """Whether the kernel may be chosen."""
        return kernel in self.kernels and kernel not in self.missing


_OURS = ("strided_rms_norm", "strided_layer_norm", "strided_add_rms_norm", "strided_qk_norm")
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
    Target("cuda:sm_80", "cuda", _CUDA_KERNELS),
    Target("cuda:sm_90", "cuda", _CUDA_KERNELS),
    Target("cuda:sm_100", "cuda", _CUDA_KERNELS),
    Target("rocm:gfx942", "cuda", _ROCM_KERNELS),
    Target("rocm:gfx950", "cuda", _ROCM_KERNELS),
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
    """The target of a present device. A device that no target names gets Inductor's code only.

    more: targets that win over ours.
    """
    name = _name_of(device)
    found = (target for target in (*more, *TARGETS) if target.name == name)
    return next(found, Target(name, device.type, (FALLBACK,)))


def _name_of(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return f"rocm:{properties.gcnArchName.partition(':')[0]}"
    return f"cuda:sm_{properties.major}{properties.minor}"
