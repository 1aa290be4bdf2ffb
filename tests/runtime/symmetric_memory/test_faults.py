"""What goes wrong on one rank is heard by all: in time, by name, and leaves nothing behind."""

import os

import pytest

from helpers import symmetric_faults as faults
from helpers import symmetric_workers as workers
from helpers.ranks import Ranks


def leftovers():
    return [name for name in os.listdir("/dev/shm") if name.startswith("fixpass-")]


@pytest.mark.parametrize("numel", [16, 1_000_000])
def test_the_others_hear_at_once_which_rank_was_killed(numel):
    with Ranks(3) as ranks:
        ranks.start(faults.dies_or_waits, 1, numel)
        for first, seconds, again in ranks.collect([0, 2]):
            # One may hear it from the process, another from the first that gave up.
            assert "of group '0'" in first
            assert "has ended" in first or "has given an all-reduce up" in first
            assert "destroy the process group and make it again" in first
            assert seconds < 20
            assert again == first
    assert leftovers() == []


def test_the_error_names_the_rank_and_what_could_not_be_done():
    with Ranks(2) as ranks:
        ranks.start(faults.dies_or_waits, 1, 16)
        first, _, _ = ranks.collect([0])[0]
    assert first == (
        "rank 1 of group '0': its process has ended, and the all-reduce of float32[16] on rank 0 "
        "cannot be completed: destroy the process group and make it again"
    )


@pytest.mark.parametrize("native", [True, False])
def test_a_rank_that_does_not_come_in_time_is_named(native):
    with Ranks(2) as ranks:
        ranks.run(workers.configure_native, native)
        early, late = ranks.run(faults.comes_late, 1, 4)
    assert "rank 1 of group '0' has not come within 1 s" in early
    assert "rank 0 of group '0' has given the all-reduce up" in late


@pytest.mark.parametrize("native", [True, False])
def test_a_rank_that_closes_its_context_is_known_to_have_left(native):
    with Ranks(2) as ranks:
        ranks.run(workers.configure_native, native)
        stays, leaves = ranks.run(faults.leaves, 1)
    assert "rank 1 of group '0' has left the group" in stays
    assert leaves == "the context is closed"


def test_without_room_on_one_rank_all_use_the_process_group_and_say_so():
    with Ranks(2) as ranks:
        ranks.run(faults.no_room)
        for symmetric, reason in ranks.run(workers.describe):
            assert not symmetric
            assert "rank 1: /dev/shm has no room for" in reason
        assert ranks.run(workers.wrong_sums, [10]) == [[], []]
        assert ranks.run(workers.sum_of_ones) == [2.0, 2.0]
    assert leftovers() == []


def test_without_a_compiler_torch_operations_do_it_and_say_so():
    with Ranks(2) as ranks:
        ranks.run(faults.without_compiler, "no C++ compiler was found")
        for symmetric, reason in ranks.run(workers.describe):
            assert symmetric
            assert "in torch operations: " in reason
            assert "no C++ compiler was found" in reason
        assert ranks.run(workers.wrong_sums, [0, 1, 100, 65536, 200_000]) == [[], []]
        for errors, after in ranks.run(workers.raised, [(2,), (3,)], ["float32", "float32"]):
            assert "rank 0 float32[2], rank 1 float32[3]" in errors[0]
            assert after == [2.0, 2.0, 2.0]
        whole, double, maximum = ranks.run(workers.other_dtypes)[0]
        assert whole.tolist() == [1, 3, 5, 7, 9]
        assert double.tolist() == [0.2, 0.2, 0.2]
        assert maximum.tolist() == [1.0]


def test_a_group_across_hosts_stays_with_the_process_group_and_one_within_a_host_does_not():
    with Ranks(4) as ranks:
        ranks.run(faults.another_host)
        for symmetric, reason in ranks.run(workers.describe):
            assert not symmetric
            assert "are on 2 hosts, not on one" in reason
        assert ranks.run(workers.sum_of_ones) == [4.0] * 4
        assert ranks.run(workers.groups_of_parity) == [(True, 2.0), (True, 4.0)] * 2
