"""The contract table: every constraint of every row stops what it should, and none adds a guard."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fixpass.lowering.contract import Contract, Kernel
from fixpass.lowering.contract_table import (
    KERNELS,
    add_kernels,
    kernel_names,
    kernel_of,
    rows_of,
)
from fixpass.lowering.layout import Layout
from fixpass.lowering.site import OPERANDS, Site
from fixpass.lowering.target import TARGETS
from fixpass.runtime import providers
from fixpass.runtime.errors import ConfigError
from helpers.processes import run_python

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
FP8 = torch.float8_e4m3fn
ROWS = ("x", "residual", "out", "q", "k", "cos", "sin")
identified = {
    "argvalues": KERNELS,
    "ids": [f"{k.name}-{k.op}-{k.needs}" for k in KERNELS],
}


def good_site(kernel: Kernel) -> Site:
    """A site that the contract takes: dense bf16 rows and a weight."""
    layouts = {name: Layout.contiguous((6, 128), BF16) for name in OPERANDS[kernel.op]}
    layouts |= {
        name: Layout.contiguous((128,), BF16)
        for name in layouts
        if name.endswith(("weight", "bias"))
    }
    if "scale" in layouts:
        layouts["scale"] = Layout.contiguous((1,), F32)
    every = [({"rotary_dim": 128}, BF16), ({"norm_dtype": BF16}, BF16), *quantised()]
    for steps, dtype in every:
        out = Layout.contiguous((6, 128), dtype)
        for left_out in ((), ("bias",), ("bias", "residual", "scale")):
            names = set(layouts) - set(left_out)
            site = Site(kernel.op, {**{n: layouts[n] for n in names}, "out": out}, "cuda", steps)
            if kernel.check(site):
                return site
    raise AssertionError(f"no site satisfies {kernel.name}")


def quantised():
    """Rounding steps with those of a quantisation, and the dtype of its codes."""
    for dtype, high, least in ((FP8, 448.0, 1 / (448 * 512)), (torch.int8, 127.0, 2**-23)):
        low = -high if dtype == FP8 else -128.0
        for apply in ("divide", "reciprocal"):
            steps = {"norm_dtype": BF16, "low": low, "high": high, "apply": apply}
            dynamic = {**steps, "limit": high, "scale_min": least}
            yield from ((each, dtype) for each in (steps, dynamic, {**dynamic, "group_size": 128}))


def broken_sites(site: Site):
    """The site with one thing changed at a time: shapes, strides, dtypes, steps, operands."""
    dtype = site.x.dtype
    changes = [
        Layout.contiguous((2, 3, 128), dtype),
        Layout.contiguous((2, 3, 4, 5, 6, 7, 128), dtype),
        Layout.contiguous((128,), dtype),
        Layout.contiguous((6, 70000), dtype),
        Layout.contiguous((6, 127), dtype),
        Layout.contiguous((0, 128), dtype),
        Layout((6, 128), (384, 1), dtype),
        Layout((6, 128), (129, 1), dtype),
        Layout((6, 128), (1, 6), dtype),
        Layout((6, 128), (128, 1), dtype, offset=1),
        Layout((6, 1, 128), (128, 999, 1), dtype),
        Layout((6, 128), (2**32, 1), dtype),
        Layout((2, 3, 2, 3, 2, 128), (4096, 1100, 512, 140, 130, 1), dtype),
        *(Layout.contiguous((6, 128), other) for other in (F32, F64, torch.float16)),
    ]
    for count in range(1, 4):
        for names in itertools.combinations([n for n in ROWS if n in site.layouts], count):
            for change in changes:
                yield site.with_layouts(**dict.fromkeys(names, change))
    if "x" in site.layouts:
        once = Layout((2**26, 128), (0, 1), dtype)
        everywhere = Layout.contiguous((2**26, 128), dtype)
        yield site.with_layouts(**{**dict.fromkeys(site.rows, once), "out": everywhere})
    for name in ("weight", "bias"):
        if name in site.layouts:
            yield site.with_layouts(**{name: Layout.contiguous((128,), F32)})
            yield site.with_layouts(**{name: Layout((128,), (2,), dtype)})
            rest = {n: v for n, v in site.layouts.items() if n != name}
            yield Site(site.op, rest, "cuda", site.steps)
        else:
            yield site.with_layouts(**{name: Layout.contiguous((128,), dtype)})
    for name, shape, other in (
        ("scale", (1,), dtype),
        ("scale", (128,), F32),
        ("residual", (3, 128), dtype),
        ("residual", (6, 128), F32),
    ):
        if name in OPERANDS[site.op]:
            yield site.with_layouts(**{name: Layout.contiguous(shape, other)})
            rest = {n: v for n, v in site.layouts.items() if n != name}
            yield Site(site.op, rest, "cuda", site.steps)
    if "out" in site.layouts and site.op == "rms_norm_quant":
        yield site.with_layouts(out=Layout.contiguous((6, 128), FP8))
        yield site.with_layouts(out=Layout.contiguous((6, 128), torch.int8))
    for steps in (
        {"compute_dtype": BF16},
        {"norm_dtype": BF16},
        {"norm_dtype": None},
        {"weight_offset": 0.5},
        {"group_size": 96},
        {"apply": "multiply"},
        {"rotary_dim": 127},
    ):
        yield Site(site.op, site.layouts, "cuda", {**site.steps, **steps})


@pytest.mark.parametrize("kernel", **identified)
def test_each_constraint_broken_in_turn_is_the_one_named(kernel):
    named = set()
    for site in broken_sites(good_site(kernel)):
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
