"""Targets: known names, and an error that lists them."""

import pytest
import torch

from fixpass.lowering.target import CPU, TARGETS, Target, target_like, target_named, target_of
from fixpass.runtime.errors import ConfigError


def test_a_target_is_found_by_its_name():
    assert target_named("rocm:gfx942").kernels[0] == "aiter_rms_norm"
    assert target_of(torch.device("cpu")) is CPU


def test_an_unknown_target_raises_with_the_known_ones():
    names = ", ".join(target.name for target in TARGETS)
    with pytest.raises(ConfigError, match=f"unknown target 'rocm'; known targets: {names}"):
        target_named("rocm")


def test_a_device_without_a_row_gets_inductor_alone():
    assert target_of(torch.device("meta")).kernels == ("inductor",)


def test_every_target_lists_the_kernel_that_takes_anything():
    assert [target.name for target in TARGETS if "inductor" not in target.kernels] == []


@pytest.mark.parametrize(
    ("device", "row"),
    [
        ("cuda:sm_121", "cuda:sm_120"),
        ("cuda:sm_86", "cuda:sm_80"),
        ("rocm:gfx940", "rocm:gfx90a"),
        ("rocm:gfx1251", "rocm:gfx1250"),
    ],
)
def test_a_device_without_a_row_takes_the_newest_older_one_of_its_family(device, row):
    target = target_like(device, "cuda")
    assert target.kernels == target_named(row).kernels
    assert str(target) == f"{device}, with the kernels of {row}"


@pytest.mark.parametrize("device", ["cuda:sm_75", "rocm:gfx908", "rocm:gfx1100", "xpu"])
def test_a_device_older_than_every_row_of_its_family_gets_inductor_alone(device):
    assert target_like(device, "cuda").kernels == ("inductor",)


def test_a_target_of_the_user_is_a_relation_too():
    own = Target("rocm:gfx1100", "cuda", ("strided_rms_norm", "inductor"))
    assert target_like("rocm:gfx1101", "cuda", (own,)).kernels == own.kernels
