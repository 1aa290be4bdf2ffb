"""The store of a group: what a new process finds in it, and what ranks do that lose it."""

import pytest
import torch
import torch.distributed as dist

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights.lock import version
from fixpass.runtime.weights.update import update
from fixpass.runtime.weights.update_group import UpdateGroup, group_version
from helpers import group_workers as workers
from helpers import store_workers as stores
from helpers.ranks import Ranks


def test_a_new_process_finds_the_last_of_many_attempts():
    store, model = dist.HashStore(), workers.model_of()
    group = UpdateGroup(store, 0, 1)
    for number in range(1, 12):
        assert group_version(UpdateGroup(store, 0, 1)) == number - 1
        with update(model, group=group) as tx:
            tx.load_state_dict(workers.weights(number))
    with pytest.raises(ValueError, match="as planned"), update(model, group=group):
        raise ValueError("as planned")
    late = UpdateGroup(store, 0, 1)
    assert group_version(late) == 11
    assert late.attempt == 12


@pytest.mark.parametrize("votes_before", ["staging", "the vote"])
def test_a_rank_that_another_process_replaces_in_an_update_counts_once(votes_before):
    """The former process has staged. The new one belongs to the same update, and votes."""
    store, model = dist.HashStore(), workers.model_of()
    group = UpdateGroup(store, 0, 2)
    former, new = UpdateGroup(store, 1, 2), UpdateGroup(store, 1, 2)
    for process in (former, new):
        process.attempt += 1
        process.arrive("staged")

    def vote():
        new.arrive("voted", 0, 1)

    if votes_before == "the vote":
        workers.planted("agree", before=vote)
    replaced = pytest.raises(UpdateError, match="no rank was updated: a rank was replaced by")
    with replaced, update(model, group=group) as tx:
        tx.load_state_dict(workers.weights(3))
        if votes_before == "staging":
            vote()
    assert version(model) == 0


def test_a_rank_that_loses_the_store_before_its_vote_keeps_its_weights():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    model = workers.model_of()
    before = [param.clone() for param in model.parameters()]
    lost = pytest.raises(
        UpdateError, match=r"the store of the group is lost .* nothing was changed"
    )
    with lost as caught, update(model, group=UpdateGroup(client, 0, 2)) as tx:
        tx.load_state_dict(workers.weights(3))
        del server
    assert all(map(torch.equal, model.parameters(), before))
    assert "the other ranks were not told" in caught.value.__notes__[0]


@pytest.fixture(scope="module")
def without_group():
    with Ranks(2, group=False) as ranks:
        yield ranks


def begin_again(ranks, function):
    """Meet in a new store, which rank 0 holds."""
    ranks.send(0, stores.host_store)
    (port,) = ranks.collect([0])
    for rank in range(2):
        ranks.send(rank, function, workers.tcp_store, port, rank, 2, 5.0)
    ranks.collect()


@pytest.mark.parametrize(
    ("moment", "values", "said"),
    [
        ("before the vote", (1, 1), ("this rank has its old weights",) * 2),
        ("after the vote", (1, 1), ("the others may have the new ones",) * 2),
        (
            "after one rank has read the decision",
            (2, 1),
            ("this rank has the new weights", "the others may have the new ones"),
        ),
        ("after the write", (2, 2), ("this rank has the new weights",) * 2),
    ],
)
def test_ranks_that_lose_the_store_keep_whole_weights(without_group, moment, values, said):
    """Of the version that they say; the one behind the others loads that version by itself."""
    ranks = without_group
    begin_again(ranks, workers.begin)
    assert [state for _, state in ranks.run(workers.step, 1)] == [(1, 1.0)] * 2
    results = ranks.run(stores.step_without_store, 2, moment)
    assert [state for _, state in results] == [(value, value) for value in values]
    for (text,), expected in zip((said for said, _ in results), said, strict=True):
        assert "the store of the group is lost" in text
        assert expected in text
    results = ranks.run(workers.step, 3)
    assert [state for _, state in results] == [(value, value) for value in values]
    assert all("is lost" in text and "nothing was changed" in text for (text,), _ in results)
    begin_again(ranks, workers.meet)
    if values == (2, 1):
        for (text,), _ in ranks.run(workers.step, 3):
            assert "rank 0: 2 to 3, rank 1: 1 to 2" in text
        ranks.send(1, stores.reload_alone, 2, 2)
        ranks.collect([1])
    assert [state for _, state in ranks.run(workers.step, 9)] == [(max(values) + 1, 9.0)] * 2
