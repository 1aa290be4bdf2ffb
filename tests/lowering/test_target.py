"""Targets: known names, and an error that lists them."""

import pytest
import torch

from fixpass.lowering.target import CPU, TARGETS, target_named, target_of
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
