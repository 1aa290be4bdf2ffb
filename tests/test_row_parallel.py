"""Row-parallel blocks compiled with fixpass on real ranks: Inductor's results, one op each."""

import pytest
import torch

from helpers.ranks import Ranks
from helpers.row_parallel import few_rows, run_block
from helpers.symmetric_workers import stats

pytestmark = pytest.mark.inductor


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_a_block_of_llama_gives_what_inductor_gives_and_all_ranks_the_same_bits(two, part):
    want = two.run(run_block, part, "inductor", 64, (1, 7))
    got = two.run(run_block, part, "fixpass", 64, (1, 7))
    for (outputs, strides, _), (expected, expected_strides, _) in zip(got, want, strict=True):
        torch.testing.assert_close(outputs, expected)
        assert strides == expected_strides
    for mine, other in zip(got[0][0], got[1][0], strict=True):
        assert torch.equal(mine, other)
    assert all(any("writes f32" in remark for remark in remarks) for _, _, remarks in got)
    assert stats_of(two).one_shot > 0


def test_bfloat16_is_as_close_to_float32_as_inductor_is(two):
    exact = two.run(run_block, "mlp", "eager", 64, (5,))[0][0][0]
    results = {
        backend: two.run(run_block, "mlp", backend, 64, (5,), torch.bfloat16)[0][0][0].float()
        for backend in ("inductor", "fixpass")
    }
    errors = {backend: (value - exact).abs().max() for backend, value in results.items()}
    assert errors["fixpass"] <= 2 * errors["inductor"]


def test_lengths_that_change_use_one_graph_and_meet_no_more_than_once(two):
    counts = (2, 3, 300, 5)
    want = two.run(run_block, "mlp", "inductor", 64, counts, torch.float32, True)
    got = two.run(run_block, "mlp", "fixpass", 64, counts, torch.float32, True)
    for (outputs, _, remarks), (expected, _, _) in zip(got, want, strict=True):
        torch.testing.assert_close(outputs, expected)
        assert remarks


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_few_rows_are_multiplied_by_the_kernel_of_linear_layers(two, rows):
    for got, by_kernel, by_mm in two.run(few_rows, rows):
        assert torch.equal(got, by_kernel)
        # These round differently for few rows: the result is one of the two.
        assert torch.equal(by_kernel, by_mm) is (rows == 17)


def stats_of(ranks):
    return ranks.run(stats)[0]
