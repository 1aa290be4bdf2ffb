"""What ranks do in the tests of updates whose store is lost: rank 0 holds the store, and ends it."""

import contextlib
import time

import torch.distributed as dist

from fixpass.runtime.weights.load import reload
from helpers import group_workers as workers


def host_store():
    """Hold a store in this process; its port."""
    workers.here["server"] = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return workers.here["server"].port


def until_lost(step=None):
    """Wait for the loss of the store, which its host ends when all ranks have come to a step."""
    group = workers.here["group"]
    with contextlib.suppress(RuntimeError):
        while True:
            progress = group.progress()
            if step is not None and all(p.reached(group.attempt, step) for p in progress):
                workers.here.pop("server", None)
            time.sleep(0.005)


def until_all_are_done():
    workers.here["group"].tell("done")
    until_lost("done")


def until_others_vote():
    group = workers.here["group"]
    while not all(
        each.rank == group.rank or each.reached(group.attempt, "voted") for each in group.progress()
    ):
        time.sleep(0.005)


def step_without_store(value, moment):
    """Update to a value. Rank 0 loses the store at a moment, and no rank goes on before."""
    if moment == "before the vote":
        workers.planted("agree", before=lambda: until_lost("staged"))
    elif moment == "after the write":
        workers.planted("confirm", before=until_all_are_done)
    elif moment == "after the vote":
        workers.planted("_waited", "_counted", before=lambda: until_lost("voted"))
    elif workers.here["group"].rank == 0:
        # The last one that votes decides.
        workers.planted("agree", before=until_others_vote, after=lambda: workers.here.pop("server"))
    else:
        workers.planted("_waited", before=until_lost)
    return workers.step(value)


def reload_alone(value, number):
    reload(workers.here["model"], workers.weights(value), version=number, progress=False)
