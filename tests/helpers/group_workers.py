"""What ranks do in the tests of updates that all of them make: update, read, and fail on order."""

import os
import signal
import threading
import time
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights import group_commit
from fixpass.runtime.weights.load import reload
from fixpass.runtime.weights.lock import read_lock, version
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.mapping_rules import TensorParallel
from fixpass.runtime.weights.processes import state_of
from fixpass.runtime.weights.update import Update, update
from fixpass.runtime.weights.update_group import UpdateGroup, group_version

PHASES = (
    "staging",
    "staged",
    "before the vote",
    "after the vote",
    "after the decision",
    "after the write",
)
here = {}
"""The model and the group of this process, from one job to the next."""


def tcp_store(port):
    return dist.TCPStore("127.0.0.1", port, is_master=False)


def file_store(path):
    return dist.FileStore(path, -1)


def model_of():
    return nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))).requires_grad_(False)


def weights(value):
    return {f"{index}.weight": torch.full((8, 8), float(value)) for index in range(4)}


def begin(make_store=None, place=None, rank=None, size=None, timeout=60.0):
    """Make a model with the value 0, and the group that updates it."""
    here["model"] = model_of()
    for param in here["model"].parameters():
        param.zero_()
    if make_store is None:
        here["group"] = UpdateGroup.of(dist.group.WORLD)
        here["group"].timeout = timeout
    else:
        meet(make_store, place, rank, size, timeout)
    return os.getpid()


def meet(make_store, place, rank, size, timeout):
    """Make the group that updates the model, in a store."""
    here["group"] = UpdateGroup(make_store(place), rank, size, timeout=timeout)


def state():
    """The version, and the one value that all weights have."""
    (value,) = {value for param in here["model"].parameters() for value in param.unique().tolist()}
    return version(here["model"]), value


def fault(kind):
    if kind == "raise":
        raise ValueError("as planned")
    # To this thread: another one might take the signal later.
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind]
    signal.pthread_kill(threading.get_ident(), number)


def planted(*names, before=None, after=None, owner=group_commit.Attempt):
    """Do something once, before or after the first of these steps in the next update."""
    originals = {name: getattr(owner, name) for name in names}

    def restore():
        for each, original in originals.items():
            setattr(owner, each, original)

    def wrapped(name):
        def method(self, *args):
            restore()
            if before is not None:
                before()
            result = originals[name](self, *args)
            if after is not None:
                after()
            return result

        return method

    for name in names:
        setattr(owner, name, wrapped(name))
    here["restore"] = restore


def failing(phase, kind):
    """Fail once, in a phase of the next update."""
    if (phase, kind) == ("after the write", "raise"):
        planted("_finish", before=lambda: fault(kind), owner=Update)
        return
    step = {"staged": "staged", "after the write": "confirm"}.get(phase, "agree")
    names = ("_waited", "_counted") if phase == "after the vote" else (step,)
    when = "after" if phase == "after the decision" else "before"
    planted(*names, **{when: lambda: fault(kind)})


def until_failed(who):
    """Wait until a rank has voted, and raised or does not run any more."""
    group = here["group"]
    while not (victim := group.progress()[who]).reached(group.attempt, "voted"):
        time.sleep(0.01)
    while state_of(victim.process) == "runs" and group.decision(group.attempt) is None:
        time.sleep(0.01)


def step(value, who=None, phase=None, kind=None, mode="buffered", timeout=None):
    """Update to a value; one rank may fail. What was raised or warned, and the state after it."""
    said = []
    is_victim = here["group"].rank == who
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if is_victim and phase not in (None, "staging"):
                failing(phase, kind)
            elif phase == "after the vote":
                planted("agree", before=lambda: until_failed(who))
            with update(here["model"], mode, timeout=timeout, group=here["group"]) as tx:
                tx.load_state_dict(weights(value))
                if is_victim and phase == "staging":
                    fault(kind)
        except (UpdateError, ValueError) as error:
            said.append(str(error))
        finally:
            # An update that is aborted early does not come to the planted step.
            here.pop("restore", lambda: None)()
    said += [str(warning.message) for warning in caught]
    return said, state()


def come_back(value):
    """Take the version of the others, and the weights of that version."""
    number = group_version(here["group"])
    reload(here["model"], weights(value), version=number, progress=False)
    return number


def first_update_fails(who):
    """In a new group, one rank fails before the others have begun their first update."""
    group, model, said = dist.new_group(), model_of(), []
    for value in (1, 2):
        time.sleep(0.3 * (dist.get_rank() != who))
        try:
            with update(model, group=group) as tx:
                if dist.get_rank() == who and value == 1:
                    raise ValueError("as planned")
                tx.load_state_dict(weights(value))
        except ValueError as error:
            said.append(str(error))
    return said, (version(model), model[0].weight[0, 0].item())


def bad_checkpoint(who):
    """One rank has a checkpoint that does not fit."""
    stored = weights(9)
    if here["group"].rank == who:
        stored["2.weight"] = torch.ones(3, 3)
    try:
        reload(here["model"], stored, group=here["group"], progress=False)
    except ValueError as error:
        return str(error), state()
    return "", state()


def other_version(who):
    try:
        number = 50 if here["group"].rank == who else 40
        reload(here["model"], weights(9), version=number, group=here["group"], progress=False)
    except UpdateError as error:
        return str(error), state()
    return "", state()


def sharded():
    """FSDP2, tensor parallelism and experts: each rank writes its own part of one checkpoint."""
    rank, size = dist.get_rank(), dist.get_world_size()
    full = torch.arange(64.0).view(8, 8)
    results = []
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    reload(model, {"0.weight": full}, group=dist.group.WORLD, progress=False)
    results.append(torch.equal(model[0].weight.full_tensor(), full))
    part = nn.Linear(8, 8 // size, bias=False)
    mapping = Mapping(tensor_parallel=TensorParallel(rank, size, (("weight", 0),)))
    reload(part, {"weight": full}, mapping=mapping, group=dist.group.WORLD, progress=False)
    results.append(torch.equal(part.weight, full.chunk(size)[rank]))
    experts = nn.Module()
    experts.w = nn.Parameter(torch.zeros(2, 8, 8))
    with update(experts, scope="parts", group=dist.group.WORLD) as tx:
        tx.load("w", full[None] + rank, start=(rank % 2,))
    results.append(torch.equal(experts.w[rank % 2], full + rank))
    return results, version(model), version(part), version(experts)


def read_while_updating(count, mode):
    """Update many times while a thread reads; the versions and values that it saw, if they differ."""
    model, wrong, reads, done = here["model"], [], [0], threading.Event()
    first = version(model)

    def reader():
        while not done.is_set():
            with read_lock(model) as number:
                values = {param[0, 0].item() for param in model.parameters()}
            reads[0] += 1
            if values != {float(number)}:
                wrong.append((number, values))

    for param in model.parameters():
        param.fill_(first)
    thread = threading.Thread(target=reader)
    thread.start()
    began = time.perf_counter()
    for number in range(first + 1, first + 1 + count):
        with update(model, mode, group=here["group"]) as tx:
            tx.load_state_dict(weights(number))
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    return wrong[:3], reads[0], seconds, state()


def cost(count):
    """Seconds of updates with the group and without it, in turn."""
    model, seconds = here["model"], {True: [], False: []}
    for index in range(2 * count):
        is_group = index % 2 == 0
        dist.barrier() if dist.is_initialized() else None
        began = time.perf_counter()
        with update(model, group=here["group"] if is_group else None) as tx:
            tx.load_state_dict(weights(index))
        seconds[is_group].append(time.perf_counter() - began)
    return seconds


def hold_read_lock():
    """Begin a call that does not end before `end_call`: this rank can't close its lock."""
    entered, leave = threading.Event(), threading.Event()

    def call():
        with read_lock(here["model"]):
            entered.set()
            leave.wait(60)

    here["call"] = leave, threading.Thread(target=call)
    here["call"][1].start()
    entered.wait()


def end_call():
    leave, thread = here.pop("call")
    leave.set()
    thread.join()
