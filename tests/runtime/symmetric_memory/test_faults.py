"""What goes wrong on one rank is heard by all: in time, by name, and leaves nothing behind."""

import os

import pytest

from helpers import symmetric_faults as faults
from helpers import symmetric_workers as workers
from helpers.ranks import Ranks, free_port


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


def test_a_rank_that_does_not_come_in_time_is_named():
    with Ranks(2) as ranks:
        ranks.run(workers.wait_one_second)
        early, late = ranks.run(faults.comes_late, 1, 4)
    assert "rank 1 of group '0' has not come within 1 s" in early
    assert "rank 0 of group '0' has given the all-reduce up" in late


def test_a_rank_that_closes_its_context_is_known_to_have_left():
    with Ranks(2) as ranks:
        ranks.run(workers.wait_one_second)
        stays, leaves = ranks.run(faults.leaves, 1)
    assert "rank 1 of group '0' has left the group" in stays
    assert leaves == "the context is closed"


@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_rank_was_replaced_the_new_group_has_memory_again(victim):
    """The survivors have held rendezvous that the new process knows nothing of."""
    with Ranks(2) as ranks:
        survivor, port = 1 - victim, free_port()
        ranks.run(workers.two_groups)
        ranks.start(faults.dies_or_waits, victim, 16)
        ranks.collect([survivor])
        ranks.spawn(victim, port)
        ranks.pipes[survivor].send((faults.rejoin, (survivor, 2, port)))
        ranks.collect([survivor])
        assert [symmetric for symmetric, _ in ranks.run(workers.describe)] == [True, True]
        assert ranks.run(workers.sum_of_ones) == [2.0, 2.0]
        assert ranks.run(workers.two_groups) == [True, True]


def test_without_room_on_one_rank_all_use_the_process_group_and_say_so():
    with Ranks(2) as ranks:
        ranks.run(faults.no_room)
        for symmetric, reason in ranks.run(workers.describe):
            assert not symmetric
            assert "rank 1: /dev/shm has no room for" in reason
        assert ranks.run(workers.wrong_sums, [10]) == [[], []]
        assert ranks.run(workers.sum_of_ones) == [2.0, 2.0]
    assert leftovers() == []


def test_without_a_compiler_on_one_rank_all_use_the_process_group_and_say_so():
    with Ranks(2) as ranks:
        ranks.run(faults.without_compiler, 1, "there is no C++ compiler 'c++'")
        for symmetric, reason in ranks.run(workers.describe):
            assert not symmetric
            assert "rank 1: its C++ part cannot be built: there is no C++ compiler" in reason
        assert ranks.run(workers.wrong_sums, [0, 1, 100, 65536]) == [[], []]
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
