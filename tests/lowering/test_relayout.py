"""Relayouts: the cheapest change that makes a contract hold."""

import torch

from fixpass.lowering.contract_table import kernel_of
from fixpass.lowering.layout import Layout
from fixpass.lowering.relayout import Relayout, apply_relayout, cheapest_relayout, hint, why_not
from fixpass.lowering.site import Site

BF16 = torch.bfloat16
AITER = kernel_of("aiter_rms_norm", "rms_norm")
AITER_ADD = kernel_of("aiter_add_rms_norm", "add_rms_norm")


def site(op="rms_norm", dtype=BF16, **rows):
    out = Layout.contiguous(rows["x"].shape, dtype)
    weight = Layout.contiguous((rows["x"].shape[-1],), dtype)
    return Site(op, {"out": out, "weight": weight, **rows}, "cuda")


def test_a_dense_2d_site_needs_nothing():
    plan = cheapest_relayout(AITER, site(x=Layout.contiguous((6, 128), BF16)))
    assert plan == Relayout((), False, 0)
    assert not plan


def test_dense_leading_dimensions_need_a_view():
    plan = cheapest_relayout(AITER, site(x=Layout.contiguous((2, 3, 128), BF16)))
    assert plan == Relayout((), True, 0)
    assert str(plan) == "view as rows"


def test_packed_heads_need_a_copy_of_x_alone():
    packed = Layout((2048, 32, 128), (6144, 128, 1), BF16)
    plan = cheapest_relayout(AITER, site(x=packed))
    assert plan == Relayout(("x",), True, 2 * 2048 * 32 * 128 * 2)
    assert AITER.check(apply_relayout(site(x=packed), plan))


def test_only_the_operand_that_breaks_the_contract_is_copied():
    dense, packed = Layout.contiguous((6, 128), BF16), Layout((6, 128), (384, 1), BF16)
    for name, other in (("x", "residual"), ("residual", "x")):
        plan = cheapest_relayout(AITER_ADD, site("add_rms_norm", **{name: packed, other: dense}))
        assert plan.copied == (name,)


def test_a_dtype_that_the_kernel_does_not_take_cannot_be_relaid():
    wrong = site(dtype=torch.float32, x=Layout((6, 2, 128), (512, 128, 1), torch.float32))
    assert cheapest_relayout(AITER, wrong) is None
    assert str(why_not(AITER, wrong)) == (
        "aiter_rms_norm: x.dtype in (f16, bf16) does not hold for f32[6, 2, 128][512, 128, 1]"
    )


def test_rank_0_has_no_rows_and_no_plan():
    scalar = Site("rms_norm", {n: Layout((), (), BF16) for n in ("x", "weight", "out")}, "cuda")
    assert cheapest_relayout(AITER, scalar) is None


def test_the_hint_of_a_number_is_the_number():
    assert hint(12) == 12
