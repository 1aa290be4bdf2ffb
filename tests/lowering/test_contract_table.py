"""The contract table: every constraint of every row stops what it should, and none adds a guard."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fixpass.lowering.contract import Contract
from fixpass.lowering.contract_table import (
    KERNELS,
    add_kernels,
    kernel_names,
    kernel_of,
    rows_of,
)
from fixpass.lowering.layout import Layout
from fixpass.lowering.target import TARGETS
from fixpass.runtime import providers
from fixpass.runtime.errors import ConfigError
from helpers.contract_sites import broken_sites, call_sites, good_site
from helpers.processes import run_python

BF16 = torch.bfloat16
identified = {
    "argvalues": KERNELS,
    "ids": [f"{k.name}-{k.op}-{k.needs}" for k in KERNELS],
}


@pytest.mark.parametrize("kernel", **identified)
def test_each_constraint_broken_in_turn_is_the_one_named(kernel):
    named = set()
    good = good_site(kernel)
    for site in (*broken_sites(good), *call_sites(good)):
        verdict = kernel.check(site)
        if not verdict:
            named.add(verdict.constraint)
            assert str(verdict.constraint) in str(verdict)
    # A rule on rounding that allows both places can only be broken by the offset, which we do.
    assert [str(c) for c in kernel.contract.constraints if c not in named] == []


@pytest.mark.parametrize("kernel", **identified)
def test_a_row_asked_of_unbacked_sizes_adds_no_guard(kernel):
    env = ShapeEnv()
    rows, pitch = env.create_unbacked_symint(), env.create_unbacked_symint()
    site = good_site(kernel)
    strange = Layout((rows, 128), (pitch, 1), BF16)
    for names in itertools.product(*[(False, True)] * len(site.rows)):
        changed = {n: strange for n, flag in zip(site.rows, names, strict=True) if flag}
        assert kernel.check(site.with_layouts(**changed)).answer in (True, False, None)
    assert env.guards == []


def test_an_open_constraint_is_said_to_be_not_proved():
    env = ShapeEnv()
    rows, pitch = env.create_unbacked_symint(), env.create_unbacked_symint()
    kernel = kernel_of("aiter_rms_norm", "rms_norm")
    site = good_site(kernel).with_layouts(x=Layout((rows, 128), (pitch, 1), BF16))
    verdict = kernel.check(site)
    assert verdict.answer is None
    assert not verdict
    assert str(verdict) == ("aiter_rms_norm: x is dense 2-D is not proved for bf16[u0, 128][u1, 1]")


def test_every_kernel_of_a_target_has_a_row_and_every_row_a_function():
    for target in TARGETS:
        assert set(target.kernels) <= set(kernel_names())
    assert all(callable(providers.load(kernel.callable)) for kernel in KERNELS)


GENERATIONS = """
import torch
from fixpass.lowering.contract_table import (
    KERNELS,
    add_kernels,
    kernel_names,
    kernel_of,
    rows_of,
)
library = torch.library.Library("aiter", "FRAGMENT")
print(kernel_of("aiter_add_rms_norm", "add_rms_norm").needs)
library.define("rms_norm(Tensor input, Tensor weight, float epsilon) -> Tensor")
library.define("rmsnorm2d_fwd_with_add(Tensor! out, Tensor input{}) -> ()")
print(kernel_of("aiter_add_rms_norm", "add_rms_norm").needs)
print(kernel_of("aiter_rms_norm", "rms_norm").needs)
"""
CK = "aiter::rmsnorm2d_fwd_with_add"
OPUS = "aiter::rmsnorm2d_fwd_with_add(gemma_norm)"


@pytest.mark.parametrize(
    ("argument", "found"),
    [("", [CK, CK, "aiter::rms_norm"]), (", int gemma_norm=0", [CK, OPUS, OPUS])],
)
def test_of_two_rows_of_one_kernel_the_installed_one_counts(argument, found):
    """Without aiter the older generation counts, which promises least."""
    assert run_python("-P", "-c", GENERATIONS.format(argument)).split() == found


def test_a_kernel_cannot_take_the_name_of_another():
    (ours,) = rows_of("strided_rms_norm")
    add_kernels([ours])
    with pytest.raises(ConfigError, match="known already, with another contract"):
        add_kernels([replace(ours, contract=Contract())])
    with pytest.raises(ConfigError, match="unknown op 'softmax'; known: rms_norm, layer_norm"):
        add_kernels([replace(ours, name="other", op="softmax")])


def test_every_row_says_where_it_is_from():
    assert all(kernel.contract.source for kernel in KERNELS)
