"""Ranks agree over the store, or all hear that they do not."""

from concurrent.futures import ThreadPoolExecutor

from torch.distributed import HashStore

from fixpass.runtime.symmetric_memory.agreement import agree


def test_every_rank_hears_every_other():
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        talks = [
            pool.submit(agree, store, "key", rank, 3, {"rank": rank}, 20.0) for rank in range(3)
        ]
        heard = [talk.result() for talk in talks]
    assert all(each.answers == ({"rank": 0}, {"rank": 1}, {"rank": 2}) for each in heard)
    assert all(each.failure == "" for each in heard)


def test_a_silent_rank_is_named_to_those_that_waited_and_to_itself_when_it_comes():
    store = HashStore()
    waited = agree(store, "key", 0, 2, {}, 0.2)
    late = agree(store, "key", 1, 2, {}, 20.0)
    assert waited.failure == late.failure
    assert waited.failure == "rank 1 did not come to the rendezvous within 0.2 s"
