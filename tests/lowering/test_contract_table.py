"""The contract table: every constraint of every row stops what it should, and none adds a guard."""

import itertools

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fixpass.lowering.contract import Contract
from fixpass.lowering.contract_table import CONTRACTS, contract_of, kernel_names
from fixpass.lowering.layout import Layout
from fixpass.lowering.site import OPERANDS, Site
from fixpass.lowering.target import TARGETS
from fixpass.runtime.providers import PROVIDERS

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
ROWS = ("x", "residual", "out", "q", "k")
identified = {
    "argvalues": CONTRACTS,
    "ids": [f"{c.kernel}-{c.generation or c.op}" for c in CONTRACTS],
}


def good_site(contract: Contract) -> Site:
    """A site that the contract takes: dense bf16 rows and a weight."""
    if contract.op == "linear":
        weight = Layout.contiguous((128, 6), BF16)
        x, bias = Layout.contiguous((6, 128), BF16), Layout.contiguous((6,), BF16)
        return Site("linear", {"x": x, "weight": weight, "bias": bias}, "cpu")
    layouts = {name: Layout.contiguous((6, 128), BF16) for name in OPERANDS[contract.op]}
    layouts |= {
        name: Layout.contiguous((128,), BF16)
        for name in layouts
        if name.endswith(("weight", "bias"))
    }
    layouts["out"] = Layout.contiguous((6, 128), BF16)
    for steps in ({}, {"norm_dtype": BF16}):
        for names in (set(layouts), set(layouts) - {"bias"}):
            site = Site(contract.op, {n: layouts[n] for n in names}, "cuda", steps)
            if contract.check(site):
                return site
    raise AssertionError(f"no site satisfies {contract.kernel}")


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
        Layout((2, 3, 2, 3, 2, 128), (4096, 1100, 512, 140, 130, 1), dtype),
        *(Layout.contiguous((6, 128), other) for other in (F32, F64, torch.float16)),
    ]
    for count in range(1, 4):
        for names in itertools.combinations([n for n in ROWS if n in site.layouts], count):
            for change in changes:
                yield site.with_layouts(**dict.fromkeys(names, change))
    if site.op == "linear":
        yield from broken_matrices(site)
    for name in ("weight", "bias"):
        if name in site.layouts:
            yield site.with_layouts(**{name: Layout.contiguous((128,), F32)})
            rest = {n: v for n, v in site.layouts.items() if n != name}
            yield Site(site.op, rest, "cuda", site.steps)
        else:
            yield site.with_layouts(**{name: Layout.contiguous((128,), dtype)})
    for steps in (
        {"compute_dtype": BF16},
        {"norm_dtype": BF16},
        {"norm_dtype": None},
        {"weight_offset": 0.5},
    ):
        yield Site(site.op, site.layouts, "cuda", {**site.steps, **steps})


def broken_matrices(site: Site):
    """The linear layer with many rows, a bias of two dimensions, a weight that overlaps itself."""
    yield site.with_layouts(x=Layout.contiguous((17, 128), BF16))
    yield site.with_layouts(bias=Layout.contiguous((1, 6), BF16))
    yield site.with_layouts(weight=Layout.contiguous((128, 6), F32))
    for stride in ((12, 2), (3, 1), (0, 1), (1, 100), (1, 0)):
        yield site.with_layouts(weight=Layout((128, 6), stride, BF16))


@pytest.mark.parametrize("contract", **identified)
def test_each_clause_broken_in_turn_is_the_one_named(contract):
    named = set()
    for site in broken_sites(good_site(contract)):
        verdict = contract.check(site)
        if not verdict:
            named.add(verdict.constraint)
            assert str(verdict.constraint) in str(verdict)
    # A rule on rounding that allows both places can only be broken by the offset, which we do.
    assert [str(c) for c in contract.constraints if c not in named] == []


@pytest.mark.parametrize("contract", **identified)
def test_a_row_asked_of_unbacked_sizes_adds_no_guard(contract):
    env = ShapeEnv()
    rows, pitch = env.create_unbacked_symint(), env.create_unbacked_symint()
    site = good_site(contract)
    strange = Layout((rows, 128), (pitch, 1), BF16)
    for names in itertools.product(*[(False, True)] * len(site.rows)):
        changed = {n: strange for n, flag in zip(site.rows, names, strict=True) if flag}
        assert contract.check(site.with_layouts(**changed)).answer in (True, False, None)
    assert env.guards == []


def test_an_open_clause_is_said_to_be_not_proved():
    env = ShapeEnv()
    rows, pitch = env.create_unbacked_symint(), env.create_unbacked_symint()
    contract = contract_of("aiter_rms_norm", "rms_norm")
    site = good_site(contract).with_layouts(x=Layout((rows, 128), (pitch, 1), BF16))
    verdict = contract.check(site)
    assert verdict.answer is None
    assert not verdict
    assert str(verdict) == ("aiter_rms_norm: x is dense 2-D is not proved for bf16[u0, 128][u1, 1]")


def test_every_kernel_of_a_target_and_every_provider_has_a_row():
    for target in TARGETS:
        assert set(target.kernels) <= set(kernel_names())
    assert set(PROVIDERS) <= set(kernel_names())


def test_of_two_generations_the_installed_one_counts(monkeypatch):
    def generation():
        return contract_of("aiter_rms_norm", "rms_norm").generation

    found = []
    for installed in ("", "ck", "opus"):
        monkeypatch.setattr(
            "fixpass.lowering.contract_table.aiter_generation", lambda i=installed: i
        )
        found.append(generation())
    assert found == ["ck", "ck", "opus"]


def test_every_row_says_where_it_is_from():
    assert all(contract.source for contract in CONTRACTS)
