"""skinny_linear: right for every shape, stride and dtype, the same bits whatever the threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixpass.runtime import linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (
    "rows",
    "columns",
    "pitched rows",
    "pitched columns",
    "every other",
    "expanded",
    "overlapping",
)
skinny_linear = torch.ops.fixpass.skinny_linear.default
skinny_linears = torch.ops.fixpass.skinny_linears.default


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert linear.unavailable() == ""


def matrix(rows, columns, dtype, layout="rows"):
    """Random values (rows, columns) that lie in memory as `layout` says."""
    values = torch.randn(rows, columns, dtype=torch.float64)
    if layout == "expanded":
        return values[:, :1].to(dtype).expand(rows, columns)
    if layout == "overlapping":
        return (
            torch.randn(rows + columns, dtype=torch.float64).to(dtype).unfold(0, columns, 1)[:rows]
        )
    if layout == "every other":
        storage = torch.full((rows, 2 * columns), float("nan"), dtype=dtype)
        return storage[:, ::2].copy_(values)
    if "columns" in layout:
        kind = "pitched rows" if "pitched" in layout else "rows"
        return matrix(columns, rows, dtype, kind).t().copy_(values)
    # An odd offset and an odd pitch: nothing is aligned, and what lies between is no number.
    pad = 3 if "pitched" in layout else 0
    storage = torch.full((rows, columns + pad), float("nan"), dtype=dtype)
    return storage[:, pad:].copy_(values)


def assert_as_exact_as_torch(got, x, weight, bias=None):
    """`got` differs from float64 by little more than torch's own result does."""
    exact = x.double() @ weight.double() + (0 if bias is None else bias.double())
    theirs = x @ weight if bias is None else torch.addmm(bias, x, weight)
    assert (got.shape, got.dtype, got.stride()) == (exact.shape, x.dtype, exact.stride())
    ulp = torch.finfo(x.dtype).eps * exact.abs().max().clamp(min=1) if exact.numel() else 0
    summed = torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs())
    allowed = (theirs - exact).abs() + 2 * summed + ulp
    assert bool(((got - exact).abs() <= allowed).all())


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 20),
    depth=st.one_of(st.integers(1, 70), st.sampled_from([127, 512, 1025, 2050])),
    size=st.one_of(st.integers(1, 70), st.sampled_from([129, 300, 515])),
    dtype=st.sampled_from(DTYPES),
    x_layout=st.sampled_from(LAYOUTS),
    layout=st.sampled_from(LAYOUTS),
    has_bias=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
)
def test_values_are_those_of_float64(rows, depth, size, dtype, x_layout, layout, has_bias, threads):
    x, weight = matrix(rows, depth, dtype, x_layout), matrix(depth, size, dtype, layout)
    bias = matrix(1, size, dtype, "every other")[0] if has_bias else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = skinny_linear(x, weight, bias)
    finally:
        torch.set_num_threads(before)
    assert_as_exact_as_torch(got, x, weight, bias)
    is_torchs = rows > linear.MOST_ROWS or layout in ("every other", "expanded", "overlapping")
    if not is_torchs:
        torch.testing.assert_close(skinny_linear(x, weight, bias), got, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_long_sums_round_no_more_than_those_of_mm(rows, layout):
    torch.manual_seed(0)
    x, weight = matrix(rows, 14336, torch.float32), matrix(14336, 256, torch.float32, layout)
    exact = x.double() @ weight.double()
    ours, theirs = (
        (y - exact).square().mean() for y in (skinny_linear(x, weight, None), x @ weight)
    )
    assert ours <= theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_row_has_the_same_bits_in_every_batch(dtype, layout):
    # x of these depths fits into the first cache, does not fit, and has one block and many.
    for depth in (30, 1030, 6150):
        assert_same_bits(matrix(16, depth, dtype), matrix(depth, 130, dtype, layout))


def assert_same_bits(x, weight):
    alone = torch.cat([skinny_linear(row[None], weight, None) for row in x])
    for rows in range(2, 17):
        got = skinny_linear(x[:rows], weight, None)
        torch.testing.assert_close(got, alone[:rows], rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 17),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=4, max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_several_weights_give_what_each_gives_alone(rows, sizes, layouts, dtype):
    x = matrix(rows, 70, dtype)
    weights = [
        matrix(70, size, dtype, layout) for size, layout in zip(sizes, layouts, strict=False)
    ]
    biases = [None if i % 2 else torch.randn(size).to(dtype) for i, size in enumerate(sizes)]
    results = skinny_linears(x, weights, biases)
    for got, weight, bias in zip(results, weights, biases, strict=True):
        torch.testing.assert_close(got, skinny_linear(x, weight, bias), rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    behind=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    ends_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_experts_give_what_each_gives_over_its_rows(counts, behind, dtype, layout, ends_dtype):
    x = matrix(sum(counts) + behind, 70, dtype)
    matrices = [matrix(70, 33, dtype, layout) for _ in counts]
    # One storage for all, which keeps the layout of each.
    stacked = torch.stack([each.t() for each in matrices]).transpose(1, 2)
    weight = stacked if "rows" in layout else torch.stack(matrices)
    ends = torch.tensor(counts).cumsum(0).to(ends_dtype)
    got = torch.ops.fixpass.skinny_experts(x, weight, ends)
    parts = x.split([*counts, behind])
    for part, each, result in zip(parts, matrices, got.split([*counts, behind]), strict=False):
        if len(part):
            assert_as_exact_as_torch(result, part, each)
    assert not got[len(x) - behind :].any()


@pytest.mark.parametrize("ends", [[2, 1], [1, 4], [-1, 2], [3]])
def test_ends_of_experts_that_do_not_fit_are_named(ends):
    x, weight = torch.randn(3, 5), torch.randn(2, 5, 7)
    with pytest.raises(ValueError, match="fixpass::skinny_experts: "):
        torch.ops.fixpass.skinny_experts(x, weight, torch.tensor(ends))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_nan_and_infinity_propagate_as_in_eager(dtype, layout):
    x, weight = matrix(4, 75, dtype), matrix(75, 40, dtype, layout)
    x[0, 3], x[1, 74], weight[74, 5], weight[0, 39] = float("nan"), float("inf"), -float("inf"), 0
    got, wanted = skinny_linear(x, weight, None), x @ weight
    assert torch.equal(got.isnan(), wanted.isnan())
    infinite = wanted.isinf()
    assert torch.equal(got[infinite], wanted[infinite])
    assert bool(got.isinf().eq(infinite).all())


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
def test_empty_operands(shape):
    rows, depth, size = shape
    x, weight, bias = torch.randn(rows, depth), torch.randn(depth, size), torch.randn(size)
    for vector in (None, bias):
        wanted = x @ weight if vector is None else torch.addmm(vector, x, weight)
        assert torch.equal(skinny_linear(x, weight, vector), wanted)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.randn(3, 5), torch.randn(4, 7), None),
        (torch.randn(3, 5), torch.randn(5, 7), torch.randn(6)),
        (torch.randn(3, 5), torch.randn(5, 7).bfloat16(), None),
        (torch.randn(5), torch.randn(5, 7), None),
        (torch.randn(2, 3, 5), torch.randn(5, 7), None),
    ],
)
def test_operands_that_do_not_fit_raise_what_torch_raises(x, weight, bias):
    with pytest.raises(RuntimeError):
        linear.skinny_linear(x, weight, bias)
    with pytest.raises(RuntimeError):
        skinny_linear(x, weight, bias)


def test_float64_and_integers_are_torchs():
    for dtype in (torch.float64, torch.int64):
        x, weight = torch.randn(3, 5).mul(9).to(dtype), torch.randn(5, 7).mul(9).to(dtype)
        assert torch.equal(skinny_linear(x, weight, None), x @ weight)


def test_a_gradient_is_torchs():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    skinny_linear(x, weight, None).square().sum().backward()
    wanted = torch.autograd.grad((x @ weight).square().sum(), (x, weight))
    torch.testing.assert_close((x.grad, weight.grad), wanted)


def test_an_output_shares_no_memory_and_the_next_call_reads_an_updated_weight():
    x, weight = torch.randn(2, 8), torch.randn(8, 4)
    first = skinny_linear(x, weight, None)
    kept = first.clone()
    weight.data.mul_(2)
    torch.testing.assert_close(skinny_linear(x, weight, None), 2 * kept)
    assert torch.equal(first, kept)


WAYS = {"operator": lambda: torch.ops.fixpass.skinny_linear.out, "direct": linear.direct_call}


@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("bias", [None, torch.randn(9)])
def test_an_output_that_is_given_gets_the_same_values(rows, bias):
    x, weight = torch.randn(rows, 40), torch.randn(40, 9)
    wanted = skinny_linear(x, weight, bias)
    for way in WAYS.values():
        # torch writes the last one, whose rows have gaps.
        for out in (torch.empty(rows, 9), torch.empty(rows, 18)[:, ::2]):
            way()(x, weight, bias, out=out)
            torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("way", ["operator", "direct"])
@pytest.mark.parametrize("rows", [9, 17])
def test_an_output_over_an_operand_is_refused(way, rows):
    x, weight, bias = torch.randn(rows, rows), torch.randn(rows, rows), torch.randn(rows)
    for out in (x, weight, bias.expand(rows, rows)):
        with pytest.raises(RuntimeError, match="to a single memory location"):
            WAYS[way]()(x, weight, bias, out=out)


@pytest.mark.parametrize("way", ["operator", "direct"])
def test_operands_that_do_not_fit_an_output_raise(way):
    with pytest.raises(RuntimeError, match="shape"):
        WAYS[way]()(torch.randn(3, 5), torch.randn(4, 7), None, out=torch.empty(3, 7))


def test_generated_code_calls_the_kernel_without_the_dispatcher():
    assert type(linear.direct_call()).__name__ == "builtin_function_or_method"


@pytest.mark.parametrize(
    "op", [skinny_linear, skinny_linears, torch.ops.fixpass.skinny_experts.default]
)
def test_the_ops_keep_the_rules_of_custom_ops(op):
    args = (torch.randn(3, 40), torch.randn(40, 9), torch.randn(9))
    if op is skinny_linears:
        args = (args[0], [args[1], torch.randn(7, 40).t()], [args[2], None])
    if op is torch.ops.fixpass.skinny_experts.default:
        args = (args[0], torch.randn(2, 40, 9), torch.tensor([1, 3]))
    with torch.no_grad():
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
