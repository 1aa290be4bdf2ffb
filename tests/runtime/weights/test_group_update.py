"""Updates that all ranks make, or none: real ranks that raise, are killed, and are stopped."""

import os
import signal

import pytest
import torch.distributed as dist

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights import commit_guards
from fixpass.runtime.weights.lock import version
from fixpass.runtime.weights.update import update
from fixpass.runtime.weights.update_group import UpdateGroup
from helpers import group_workers as workers
from helpers.ranks import Ranks

PHASES = workers.PHASES
run_section_wait = commit_guards._Section.wait
BEFORE = PHASES[:4]
"""Phases in which there is no decision yet."""


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4, seconds=900) as ranks:
        ranks.run(workers.begin, None, None, None, None, 30.0)
        yield ranks


def states(results):
    return {state for _, state in results}


def test_all_ranks_get_one_version(ranks):
    ((before, _),) = states([(None, state) for state in ranks.run(workers.state)])
    assert states(ranks.run(workers.step, 5)) == {(before + 1, 5.0)}
    assert states(ranks.run(workers.step, 6, None, None, None, "double_buffer")) == {
        (before + 2, 6.0)
    }


def assert_raised_by(raising, results):
    """The rank that raised has its own error, and the others one that names the rank."""
    for rank, (said, _) in enumerate(results):
        named = f"no rank was updated: rank {raising} raised ValueError('as planned')"
        assert said == ["as planned" if rank == raising else named]


@pytest.mark.parametrize("phase", BEFORE)
def test_a_rank_that_raises_leaves_all_ranks_alone(ranks, phase):
    before = ranks.run(workers.state)
    results = ranks.run(workers.step, 7, 2, phase, "raise")
    assert [state for _, state in results] == before
    assert_raised_by(2, results)


def test_a_checkpoint_that_does_not_fit_one_rank_is_refused_by_all(ranks):
    before = ranks.run(workers.state)
    results = ranks.run(workers.bad_checkpoint, 1)
    assert [state for _, state in results] == before
    assert "does not fit into '2.weight'" in results[1][0]
    for rank in (0, 2, 3):
        assert results[rank][0].startswith("no rank was updated: rank 1 raised CheckpointError(")


def test_the_first_update_of_a_group_may_fail_before_the_others_begin(ranks):
    results = ranks.run(workers.first_update_fails, 1)
    assert states(results) == {(1, 2.0)}
    assert_raised_by(1, results)


def test_ranks_that_update_different_versions_are_told(ranks):
    before = ranks.run(workers.state)
    results = ranks.run(workers.other_version, 3)
    assert [state for _, state in results] == before
    for text, _ in results:
        assert "the ranks update different versions" in text
        assert f"rank 3: {before[0][0]} to 50" in text


def test_each_rank_writes_its_own_part_of_a_checkpoint(ranks):
    for rank, (equal, *versions) in enumerate(ranks.run(workers.sharded)):
        assert equal == [True, True, True], rank
        assert versions == [1, 1, 1]


def test_readers_see_whole_versions_that_are_the_same_on_all_ranks(ranks):
    results = ranks.run(workers.read_while_updating, 100, "buffered")
    assert [wrong for wrong, *_ in results] == [[]] * 4
    assert all(reads > 0 for _, reads, *_ in results)
    ((number, value),) = {state for *_, state in results}
    assert number == value


def test_a_call_that_does_not_end_on_one_rank_keeps_all_on_the_old_weights(ranks):
    before = ranks.run(workers.state)
    ranks.send(0, workers.hold_read_lock)
    ranks.collect([0])
    results = ranks.run(workers.step, 5, None, None, None, "buffered", 0.2)
    assert [state for _, state in results] == before
    assert "1 calls of the model did not end within 0.2 s" in results[0][0][0]
    for (text,), _ in results[1:]:
        assert text.startswith("no rank was updated: rank 0 raised UpdateError('1 calls of the")
    ranks.send(0, workers.end_call)
    ranks.collect([0])
    assert len(states(ranks.run(workers.step, 6))) == 1


def run_with_stopped(ranks, pids, victim, *job):
    """Start a job in which a rank is stopped; the others' results, and then its own."""
    ranks.start(*job)
    others = ranks.collect([rank for rank in range(ranks.size) if rank != victim])
    os.kill(pids[victim], signal.SIGCONT)
    return others, *ranks.collect([victim])


def check_stopped(ranks, pids, phase):
    before = set(ranks.run(workers.state))
    others, own = run_with_stopped(ranks, pids, 1, workers.step, 8, 1, phase, "stop")
    if phase in BEFORE:
        assert states([*others, own]) == before
        for (text,), _ in others:
            assert text.startswith("no rank was updated: rank 1, process ")
            assert "is stopped" in text
        assert own[0][0].startswith("no rank was updated: rank 1, process ")
    else:
        ((number, _),) = before
        assert states([*others, own]) == {(number + 1, 8.0)}
        for (text,), _ in others:
            assert text.startswith("this rank has the new weights, and rank 1, process ")
    again = ranks.run(workers.step, 9)
    assert len(states(again)) == 1
    assert [said for said, _ in again] == [[]] * ranks.size


def check_killed(ranks, phase, store, place):
    before = set(ranks.run(workers.state))
    ranks.start(workers.step, 8, 1, phase, "kill")
    survivors = [rank for rank in range(ranks.size) if rank != 1]
    others = ranks.collect(survivors)
    for (text,), _ in others:
        assert "rank 1, process " in text
        assert "has ended" in text
    ((number, value),) = states(others)
    assert (number, value) in before if phase in BEFORE else value == 8.0
    ranks.processes[1].join()
    ranks.spawn(1, None)
    ranks.send(1, workers.begin, store, place, 1, ranks.size, 5.0)
    ranks.collect([1])
    if number:
        ranks.send(1, workers.come_back, value)
        assert ranks.collect([1]) == [number]
    again = ranks.run(workers.step, 9)
    assert states(again) == {(number + 1, 9.0)}
    assert [said for said, _ in again] == [[]] * ranks.size


def check_raised(ranks, phase):
    before = ranks.run(workers.state)
    results = ranks.run(workers.step, 8, 1, phase, "raise")
    if phase in BEFORE:
        assert [state for _, state in results] == before
        assert_raised_by(1, results)
        return
    new = (before[0][0] + 1, 8.0)
    (said, other), (own, state) = results
    assert other == new
    assert own == ["as planned"]
    if phase == "after the write":
        assert (said, state) == ([], new)
        return
    assert said[0].startswith("this rank has the new weights, and rank 1, process ")
    assert state == before[1]
    for (text,), _ in ranks.run(workers.step, 9):
        assert "the ranks update different versions" in text
    ranks.send(1, workers.come_back, 8)
    assert ranks.collect([1]) == [new[0]]


@pytest.fixture(params=["tcp", "file"])
def place(request, tmp_path):
    """Where processes that share no group meet: a store that outlives each of them."""
    if request.param == "file":
        yield workers.file_store, str(tmp_path / "store")
        return
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield workers.tcp_store, server.port


@pytest.fixture
def engines(place):
    """Two processes that share a store and no process group."""
    with Ranks(2, group=False) as ranks:
        for rank in range(2):
            ranks.send(rank, workers.begin, *place, rank, 2, 5.0)
        ranks.pids = ranks.collect()
        yield ranks


@pytest.mark.parametrize("place", ["tcp"], indirect=True)
def test_engines_without_a_group_fail_and_come_back(engines, place):
    assert states(engines.run(workers.step, 5)) == {(1, 5.0)}
    check_stopped(engines, engines.pids, "after the vote")
    check_killed(engines, "after the vote", *place)


@pytest.mark.full
def test_engines_survive_a_rank_that_raises_in_any_phase(engines):
    for phase in PHASES:
        check_raised(engines, phase)
        assert len(states(engines.run(workers.step, 5))) == 1, phase


@pytest.mark.full
@pytest.mark.parametrize("phase", PHASES)
def test_engines_survive_a_rank_that_is_stopped_in_any_phase(engines, phase):
    engines.run(workers.step, 5)
    check_stopped(engines, engines.pids, phase)


@pytest.mark.full
@pytest.mark.parametrize("phase", PHASES)
def test_engines_survive_a_rank_that_is_killed_in_any_phase(engines, place, phase):
    engines.run(workers.step, 5)
    check_killed(engines, phase, *place)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["stop", "kill"])
@pytest.mark.parametrize("phase", PHASES)
def test_four_ranks_survive_one_that_fails_in_any_phase(phase, kind):
    with Ranks(4) as ranks:
        pids = ranks.run(workers.begin, None, None, None, None, 5.0)
        ranks.run(workers.step, 5)
        if kind == "stop":
            check_stopped(ranks, pids, phase)
            return
        ranks.start(workers.step, 8, 1, phase, "kill")
        others = ranks.collect([0, 2, 3])
        for (text,), _ in others:
            assert "rank 1, process " in text
            assert "has ended" in text
        assert states(others) == {(1, 5.0) if phase in BEFORE else (2, 8.0)}


@pytest.mark.full
@pytest.mark.parametrize("mode", ["buffered", "double_buffer"])
def test_ten_thousand_updates_of_four_ranks_with_readers(ranks, mode):
    results = ranks.run(workers.read_while_updating, 5000, mode)
    assert [wrong for wrong, *_ in results] == [[]] * 4
    assert len({state for *_, state in results}) == 1


def test_a_mode_that_can_fail_while_it_writes_is_refused():
    group = UpdateGroup(dist.HashStore(), 0, 1)
    refused = pytest.raises(UpdateError, match="needs one of the modes buffered, double_buffer")
    with refused, update(workers.model_of(), "undo_log", group=group):
        pass


def test_an_interrupt_in_the_vote_is_raised_after_the_write():
    """The other rank is not kept waiting for a confirmation."""
    model, store, ranks = workers.model_of(), dist.HashStore(), []

    def interrupted(self, wait=run_section_wait):
        wait(self)
        if not ranks:
            ranks.append(None)
            raise KeyboardInterrupt

    group = UpdateGroup(store, 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit_guards._Section, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt), update(model, group=group) as tx:
            tx.load_state_dict(workers.weights(3))
    assert version(model) == 1
    (progress,) = group.progress()
    assert progress.reached(1, "done")


def test_a_group_of_one_updates_alone():
    model = workers.model_of()
    with update(model, group=UpdateGroup(dist.HashStore(), 0, 1)) as tx:
        tx.load_state_dict(workers.weights(3))
    assert tx.report.version == 1
