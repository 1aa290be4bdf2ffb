"""Guards of eager calls: stand-ins that check their contract are given what the table asks for.

Each stand-in raises where the real kernel would touch wrong memory. What a guarded call gives is
compared with the stand-in on dense rows.
"""

import random
import sys
from itertools import product

import pytest
import torch

from fixpass.config import Config
from fixpass.eager_kernels import WRAPPED, wrap
from fixpass.lowering.contract_table import rows_of
from fixpass.runtime.errors import KernelError
from helpers.standins import (
    LayoutFault,
    aiter_add,
    aiter_layer_norm,
    aiter_rms_norm,
    scaled,
    vllm_fused_add,
    vllm_rms_norm,
)

EPS = 1e-6


def bf16(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(*shape, generator=generator).bfloat16()


WEIGHT = bf16(128, seed=9)
# Shapes and strides of operands with six rows of 128.
LAYOUTS = {
    "dense": lambda: bf16(6, 128),
    "dense 3-D": lambda: bf16(2, 3, 128),
    "heads of a packed projection": lambda: bf16(3, 1024)[:, 256:512].view(3, 2, 128),
    "rows of a wider tensor": lambda: bf16(6, 200)[:, 8:136],
    "transposed": lambda: bf16(128, 6).t(),
    "heads before tokens": lambda: bf16(3, 2, 128).transpose(0, 1),
    "every second row": lambda: bf16(12, 128)[::2],
    "a stride of a dimension of size 1": lambda: bf16(6, 128).as_strided(
        (6, 1, 128), (128, 999, 1)
    ),
    "an odd offset": lambda: bf16(6 * 128 + 1)[1:].view(6, 128),
    "one row over and over": lambda: bf16(1, 128).expand(6, 128),
}


def rows(x):
    return x.reshape(-1, 128).contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_of_any_layout_is_that_of_dense_rows(layout):
    x = LAYOUTS[layout]()
    norm = wrap(aiter_rms_norm, "aiter::rmsnorm2d_fwd")
    got = norm(x, WEIGHT, EPS)
    assert got.shape == x.shape
    assert torch.equal(rows(got), aiter_rms_norm(rows(x), WEIGHT, EPS))


def test_without_a_guard_the_strided_heads_are_a_fault(monkeypatch):
    heads = LAYOUTS["heads of a packed projection"]()
    monkeypatch.setenv("FIXPASS_EAGER_KERNELS", "off")
    norm = wrap(aiter_rms_norm, "aiter::rmsnorm2d_fwd")
    assert norm is aiter_rms_norm
    with pytest.raises(LayoutFault):
        norm(heads, WEIGHT, EPS)


@pytest.mark.parametrize(("first", "second"), product(LAYOUTS, repeat=2))
def test_a_fused_add_takes_x_and_residual_each_in_its_own_layout(first, second):
    x, residual = LAYOUTS[first](), LAYOUTS[second]()
    out, total = torch.empty_like(x), torch.empty_like(x)
    want, want_total = torch.empty(6, 128).bfloat16(), torch.empty(6, 128).bfloat16()
    aiter_add(want, rows(x), rows(residual), want_total, WEIGHT, EPS)
    if x.stride(0) == 0:
        out, total = torch.empty(x.shape).bfloat16(), torch.empty(x.shape).bfloat16()
    wrap(aiter_add, "aiter::rmsnorm2d_fwd_with_add")(out, x, residual, total, WEIGHT, EPS)
    assert torch.equal(rows(out), want)
    assert torch.equal(rows(total), want_total)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one row over and over"])
def test_a_fused_add_in_place_writes_where_it_read(layout):
    x, residual = LAYOUTS[layout](), LAYOUTS[layout]().clone(memory_format=torch.preserve_format)
    want, want_total = rows(x).clone(), rows(residual).clone()
    vllm_fused_add(want, want_total, WEIGHT, EPS)
    wrap(vllm_fused_add, "_C::fused_add_rms_norm")(x, residual, WEIGHT, EPS)
    assert torch.equal(rows(x), want)
    assert torch.equal(rows(residual), want_total)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_result_that_is_given_has_a_layout_of_its_own(layout):
    x, result = LAYOUTS[layout](), torch.empty(128, 6).bfloat16().t()
    want = torch.empty(6, 128).bfloat16()
    vllm_rms_norm(want, rows(x), WEIGHT, EPS)
    wrap(vllm_rms_norm, "_C::rms_norm")(result, x, WEIGHT, EPS)
    assert torch.equal(result, want)


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (0, 2, 128), (3, 0)])
def test_no_rows_do_not_reach_the_kernel(shape):
    x, weight = torch.empty(shape).bfloat16(), torch.empty(shape[-1]).bfloat16()
    with pytest.raises(LayoutFault):
        aiter_rms_norm(x.reshape(0, shape[-1] or 1), weight, EPS)
    assert wrap(aiter_rms_norm, "aiter::rmsnorm2d_fwd")(x, weight, EPS).shape == shape
    out, total = torch.empty_like(x), torch.empty_like(x)
    wrap(aiter_add, "aiter::rmsnorm2d_fwd_with_add")(out, x, x, total, weight, EPS)


def test_a_residual_of_another_rank_is_added_row_by_row():
    x, residual = bf16(6, 128), bf16(2, 3, 128)
    out, total = torch.empty_like(x), torch.empty_like(x)
    with pytest.raises(LayoutFault):
        aiter_add(out, x, residual, total, WEIGHT, EPS)
    wrap(aiter_add, "aiter::rmsnorm2d_fwd_with_add")(out, x, residual, total, WEIGHT, EPS)
    assert torch.equal(total, x + residual.view(6, 128))


def test_a_residual_with_other_rows_raises_before_a_byte_is_read():
    x, residual = bf16(6, 128), bf16(5, 128)
    out, total = torch.empty_like(x), torch.empty_like(x)
    with pytest.raises(KernelError, match=r"residual \(residual_in\) has the shape \(5, 128\)"):
        wrap(aiter_add, "aiter::rmsnorm2d_fwd_with_add")(out, x, residual, total, WEIGHT, EPS)


@pytest.mark.parametrize("sensitive", [0, 1])
def test_a_dtype_that_the_kernel_does_not_take_gets_the_reference(sensitive):
    weight = torch.randn(128)
    x = bf16(2, 3, 128)
    got = wrap(aiter_rms_norm, "aiter::rms_norm")(x, weight, EPS, sensitive)
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    want = h.bfloat16() * weight if sensitive else h * weight
    assert torch.allclose(got.float(), want.bfloat16().float(), rtol=1e-2)


@pytest.mark.parametrize("bias", [None, bf16(128, seed=3)])
def test_a_layer_norm_without_a_bias_gets_the_reference(bias):
    norm = wrap(aiter_layer_norm, "aiter::layernorm2d_fwd")
    x = LAYOUTS["heads before tokens"]()
    # The same layouts with and without a bias are two plans.
    norm(x, WEIGHT, bf16(128), EPS)
    got = norm(x, WEIGHT, bias, EPS)
    want = torch.nn.functional.layer_norm(
        x.float(), (128,), WEIGHT.float(), None if bias is None else bias.float(), EPS
    )
    assert torch.allclose(got.float(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operands_may_come_by_name(layout):
    x = LAYOUTS[layout]()
    norm = wrap(aiter_by_name, "aiter::rmsnorm2d_fwd")
    got = norm(x, epsilon=EPS, weight=WEIGHT)
    assert torch.equal(got, norm(weight=WEIGHT, input=x, epsilon=EPS))
    assert torch.equal(rows(got), aiter_rms_norm(rows(x), WEIGHT, EPS))


def aiter_by_name(input, weight, epsilon, use_model_sensitive_rmsnorm=0):
    return aiter_rms_norm(input, weight, epsilon, use_model_sensitive_rmsnorm)


def newer_aiter(input, weight, epsilon, gemma_norm=False):
    assert not gemma_norm
    return aiter_rms_norm(input, weight, epsilon)


def test_a_flag_of_a_newer_version_is_read_from_its_signature_and_never_guessed():
    norm = wrap(newer_aiter, "aiter::rmsnorm2d_fwd")
    x, weight = bf16(2, 3, 128), torch.randn(128)
    assert norm(x, weight, EPS, False).shape == x.shape
    with pytest.raises(KernelError, match="the reference does not know gemma_norm"):
        norm(x, weight, EPS, True)
    with pytest.raises(KernelError, match="the reference does not know gemma_norm"):
        norm(x, weight, EPS, gemma_norm=1)


def test_a_call_with_an_operand_missing_is_the_kernels_to_refuse():
    norm = wrap(aiter_by_name, "aiter::rmsnorm2d_fwd")
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        norm(bf16(6, 128))


def test_offsets_count_where_a_contract_asks_for_them():
    norm = wrap(vllm_rms_norm, "_C::rms_norm")
    flat = bf16(6 * 128 + 16)
    calls = []

    def seen(result, x, weight, eps):
        calls.append(x.data_ptr() % 16)
        vllm_rms_norm(result, x, weight, eps)

    norm = wrap(seen, "_C::rms_norm")
    for offset in (0, 1, 8, 3):
        norm(torch.empty(6, 128).bfloat16(), flat[offset : offset + 768].view(6, 128), WEIGHT, EPS)
    assert calls == [0, 0, 0, 0]


def test_dynamo_sees_the_kernel_and_not_the_guard():
    norm = wrap(torch.nn.functional.silu, "aiter::rmsnorm2d_fwd")
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    x = bf16(6, 128)
    got = torch.compile(lambda x: norm(x), backend=backend, fullgraph=True)(x)
    assert torch.equal(got, torch.nn.functional.silu(x))
    (gm,) = graphs
    (call,) = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert call.target is torch.nn.functional.silu


def test_every_guard_has_a_contract_and_a_meaning():
    assert WRAPPED
    for row in WRAPPED:
        assert rows_of(row.kernel, row.op)
        assert set(row.roles.values()) <= set(row.arguments)


def test_an_unknown_kernel_raises_and_lists_the_known_ones():
    with pytest.raises(
        KernelError, match=r"no eager kernel 'aiter::norm' is known; .*aiter::rms_norm"
    ):
        wrap(aiter_rms_norm, "aiter::norm")


def test_guards_are_an_option_of_their_own():
    assert Config.resolve({}, {"FIXPASS_EAGER_KERNELS": "off"}).eager_kernels is False
    assert Config.resolve({}, {}).eager_kernels is True


def random_rows(rng, rows, hidden, written):
    """A tensor of `rows` rows in any shape, dense, permuted, padded or at an offset."""
    leading = {6: [(6,), (2, 3), (1, 6), (1, 3, 2)], 1: [(1,), (1, 1)], 0: [(0,), (2, 0), (0, 3)]}
    shape = (*rng.choice(leading[rows]), hidden)
    kind = rng.choice(["dense", "permuted", "padded", "offset", *([] if written else ["expanded"])])
    if kind == "offset":
        return (
            torch.randn(rows * hidden + 8)
            .bfloat16()[rng.choice([1, 3, 8]) :][: rows * hidden]
            .view(shape)
        )
    if kind == "expanded":
        return torch.randn(*[1] * (len(shape) - 1), hidden).bfloat16().expand(shape)
    if kind == "padded":
        wide = torch.randn([size + rng.choice([0, 1, 8]) for size in shape]).bfloat16()
        return wide[tuple(slice(size) for size in shape)]
    order = list(range(len(shape)))
    if kind == "permuted":
        rng.shuffle(order)
    inverse = [order.index(dim) for dim in range(len(shape))]
    return torch.randn([shape[dim] for dim in order]).bfloat16().permute(inverse)


@pytest.mark.parametrize("seed", range(4))
def test_random_operands_of_fused_adds_come_out_right(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    apart = wrap(aiter_add, "aiter::rmsnorm2d_fwd_with_add")
    in_place = wrap(vllm_fused_add, "_C::fused_add_rms_norm")
    for _ in range(100):
        # Odd rows are nothing that aiter's kernels take.
        count, hidden = rng.choice([6, 6, 1, 0]), rng.choice([16, 32, 7])
        weight = torch.randn(hidden).bfloat16()
        x, residual, out, total = (
            random_rows(rng, count, hidden, written) for written in (False, False, True, True)
        )
        summed = (x.reshape(count, hidden) + residual.reshape(count, hidden)).clone()
        apart(out, x, residual, total, weight, EPS)
        assert torch.equal(total.reshape(count, hidden), summed)
        want = scaled(summed, weight, EPS, rounds_before=False)
        assert torch.equal(out.reshape(count, hidden), want)
        x, residual = (random_rows(rng, count, hidden, True) for _ in range(2))
        summed = (x.reshape(count, hidden) + residual.reshape(count, hidden)).clone()
        in_place(x, residual, weight, EPS)
        assert torch.equal(residual.reshape(count, hidden), summed)
        want = scaled(summed, weight, EPS, rounds_before=True)
        assert torch.equal(x.reshape(count, hidden), want)


def test_the_old_name_of_the_module_still_works_and_names_the_new_one():
    sys.modules.pop("fixpass.guards", None)
    with pytest.warns(DeprecationWarning, match="fixpass.guards is now fixpass.eager_kernels"):
        from fixpass.guards import guard
    assert guard is wrap
