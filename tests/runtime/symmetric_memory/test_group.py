"""All-reduce on two, four and eight real ranks: right to the bit, and in the memory that all share."""

import pytest
import torch

from helpers import symmetric_workers as workers
from helpers.ranks import Ranks

# Both sides of a slot of 256 KiB and of a piece of 1 MiB, in float32 and in 16 bits.
SIZES = [0, 1, 2, 63, 64, 65, 4096, 65535, 65536, 65537, 131072, 131073, 262145, 524289, 1000003]


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four():
    with Ranks(4) as ranks:
        yield ranks


def test_the_ranks_of_one_host_have_symmetric_memory(two):
    assert (
        two.run(workers.describe)
        == [(True, "group '0' is a TP group with as many tokens on each rank on one host")] * 2
    )


def test_two_ranks_get_the_sum_in_rank_order_to_the_bit(two):
    assert two.run(workers.wrong_sums, SIZES) == [[], []]


def test_four_ranks_on_two_cores_get_it_too(four):
    assert four.run(workers.wrong_sums, SIZES) == [[], [], [], []]


def test_eight_ranks_on_two_cores_get_it_too():
    with Ranks(8) as ranks:
        assert ranks.run(workers.wrong_sums, [1, 65536, 131073, 262145]) == [[]] * 8


def test_hundreds_of_calls_of_random_sizes_in_a_row(four):
    wrong = four.run(workers.random_calls, 300, 7)
    assert [count for count, _ in wrong] == [0, 0, 0, 0]


def test_small_messages_are_one_shot_and_large_ones_two_shot(two):
    before, _ = two.run(workers.stats)
    two.run(workers.wrong_sums, [65536, 65537])
    after, _ = two.run(workers.stats)
    # float32 of 65,537 is over a slot; in 16 bits it is not.
    assert (after.one_shot - before.one_shot, after.two_shot - before.two_shot) == (10, 2)


def test_nothing_is_left_in_shared_memory_while_the_group_lives(two):
    two.run(workers.describe)
    assert two.run(workers.shared_segments) == [[], []]


def test_results_are_dense_whatever_the_strides_of_the_input(two):
    (got, stride, scalar, in_place), other = two.run(workers.strided_sum)
    assert got.shape == (4, 3)
    assert stride == (3, 1)
    assert scalar.shape == ()
    assert scalar == 4
    assert in_place
    assert torch.equal(got, other[0])


def test_other_dtypes_and_operations_go_through_the_process_group(two):
    whole, double, maximum = two.run(workers.other_dtypes)[0]
    assert whole.tolist() == [1, 3, 5, 7, 9]
    assert double.tolist() == [0.2, 0.2, 0.2]
    assert maximum.tolist() == [1.0]


def test_ranks_that_disagree_on_a_shape_all_hear_what_each_brought(two):
    results = two.run(workers.raised, [(2, 3), (3, 2)], ["float32", "float32"], 3)
    for errors, after in results:
        assert (
            errors
            == [
                "the ranks of group '0' bring different tensors to an all-reduce: "
                "rank 0 float32[2, 3], rank 1 float32[3, 2]"
            ]
            * 3
        )
        assert after == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("dims", [5, 6, 8, 9, 12])
def test_ranks_that_disagree_on_one_dimension_of_many_all_hear_it(two, dims):
    for moved in range(1, dims):
        shapes = [[1] * dims, [1] * dims]
        shapes[0][0], shapes[1][moved] = 7, 7
        for errors, after in two.run(workers.raised, shapes, ["float32", "float32"]):
            assert "bring different tensors to an all-reduce: rank 0 float32[7, 1" in errors[0]
            assert after == [2.0, 2.0, 2.0]
    last = [[2] * (dims - 2) + [3, 2], [2] * (dims - 2) + [2, 3]]
    for errors, after in two.run(workers.raised, last, ["float32", "float32"]):
        assert "bring different tensors" in errors[0]
        assert after == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("dtypes", [["float32", "bfloat16"], ["float32", "float64"]])
def test_ranks_that_disagree_on_a_dtype_all_hear_it(two, dtypes):
    for errors, after in two.run(workers.raised, [(4,), (4,)], dtypes):
        assert f"rank 0 {dtypes[0]}[4], rank 1 {dtypes[1]}[4]" in errors[0]
        assert after == [2.0, 2.0, 2.0]


def test_one_shot_on_one_rank_and_two_shot_on_the_other_is_no_hang(four):
    shapes = [(10,), (300000,), (10,), (10,)]
    for errors, after in four.run(workers.raised, shapes, ["float32"] * 4):
        assert "rank 1 float32[300000]" in errors[0]
        assert after == [4.0, 4.0, 4.0]


def test_a_product_made_in_the_context_is_read_where_it_lies(two):
    for right, staged, _ in two.run(workers.resident_matmul, 512, 512):
        assert right
        assert staged == 0


def test_a_product_without_room_in_the_memory_is_copied_there(two):
    for right, staged, stats in two.run(workers.resident_matmul, 2048, 4096):
        assert right
        assert staged > 0
        assert stats.heap_bytes_in_use == 0


def test_tensors_of_the_memory_are_given_back_and_refused_when_there_is_no_room(two):
    for total, held, after, refusal in two.run(workers.tensors_in_memory):
        assert (total, held, after) == (2000, 2048, 0)
        assert "has no room for 4294967296 bytes" in refusal


def test_two_groups_are_used_in_turn(two):
    assert two.run(workers.two_groups) == [True, True]


def test_a_group_is_destroyed_and_made_again(two):
    assert two.run(workers.remade_group) == [[(True, [2.0] * 4)] * 3] * 2


def test_groups_of_some_of_the_ranks(four):
    assert four.run(workers.groups_of_halves) == [1.0, 1.0, 5.0, 5.0]


def test_a_forked_child_is_refused_and_its_parent_goes_on(two):
    for heard, after in two.run(workers.from_a_child):
        assert "was made before this process was forked" in heard
        assert after == 2.0


def test_a_second_thread_is_refused_while_the_first_waits(two):
    (total, refusal), (other, _) = two.run(workers.from_two_threads)
    assert total == other == 2.0
    assert "is in use by another thread" in refusal


@pytest.mark.full
def test_a_hundred_thousand_random_calls_of_four_ranks_are_right_and_the_memory_stays_flat():
    with Ranks(4, seconds=1800) as ranks:
        for wrong, growth in ranks.run(workers.random_calls, 100_000, 3):
            assert wrong == 0
            assert growth < 4096
