"""load is an update: the same lock, version, layouts and modes; and what a commit guarantees."""

import _thread
import contextlib
import os
import random
import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fixpass.runtime.errors import CheckpointError, PoisonedError, UpdateError
from fixpass.runtime.weights.files import OpenFile
from fixpass.runtime.weights.formats import safetensors as safetensors_files
from fixpass.runtime.weights.layouts import Pad, WeightLayout
from fixpass.runtime.weights.lock import lock_of, version
from fixpass.runtime.weights.state_file import read_state
from fixpass.weights import (
    checkpoint_layout,
    load,
    logical,
    pack,
    read_lock,
    reload,
    set_layouts,
    update,
    write_lock,
)

MODES = ("direct", "buffered", "undo_log", "double_buffer")
LAYOUTS = (
    "aiter_16x16",
    "transposed",
    "transposed_dense",
    "column_major",
    "gate_up_interleaved",
    WeightLayout("padded", (Pad((48, 48)),)),
)


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def one(layout):
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(64, 64).bfloat16(), requires_grad=False)
    set_layouts(model, {"w": layout})
    return model


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["files", "state dict", "iterator"])
def test_a_weight_of_any_layout_is_loaded_by_its_logical_values(tmp_path, layout, kind, mode):
    model = one(layout)
    untouched = one(layout)
    for number in (1, 2, 3):
        new = {"w": torch.randn(64, 64).bfloat16()}
        save_file(new, tmp_path / "w.safetensors")
        load(
            model, {"files": tmp_path, "state dict": new, "iterator": iter(new.items())}[kind], mode
        )
        assert torch.equal(logical(model.w), new["w"])
        assert torch.equal(model.state_dict()["w"], new["w"])
        assert version(model) == number
    assert (model.w.shape, model.w.stride()) == (untouched.w.shape, untouched.w.stride())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_load_inside_checkpoint_layout_writes_the_same_values(layout, mode):
    model, new = one(layout), {"w": torch.randn(64, 64).bfloat16()}
    before = logical(model.w)
    refused = pytest.raises(UpdateError, match="shows the checkpoint's layout now")
    said = refused if mode == "double_buffer" else contextlib.nullcontext()
    with write_lock(model), checkpoint_layout(model.parameters()), said:
        load(model, new, mode)
    assert torch.equal(logical(model.w), before if mode == "double_buffer" else new["w"])


def test_parts_of_a_pack_are_loaded_into_the_pack(mode):
    model = nn.ModuleDict({n: nn.Linear(8, 8, bias=False) for n in "qk"}).requires_grad_(False)
    whole = pack([model["q"].weight, model["k"].weight])
    new = {f"{name}.weight": torch.randn(8, 8) for name in "qk"}
    load(model, new, mode)
    whole = pack([model["q"].weight, model["k"].weight])
    assert torch.equal(whole, torch.cat([new["q.weight"], new["k.weight"]]))


def test_a_load_waits_for_calls_under_way(mode):
    model, new = nn.Linear(4, 4, bias=False), {"weight": torch.ones(4, 4)}
    with read_lock(model):
        before = model.weight.clone()
        thread = threading.Thread(target=load, args=(model, new, mode))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert torch.equal(model.weight, before)
    thread.join(60)
    assert torch.equal(model.weight, new["weight"])


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_former_names_of_modes_warn_and_work():
    model, new = nn.Linear(4, 4, bias=False), {"weight": torch.ones(4, 4)}
    with pytest.warns(DeprecationWarning, match="mode='undo_log'") as caught:
        load(model, new, journal=True)
    assert caught[0].filename == __file__
    former = {"staged": "buffered", "journal": "undo_log", "double": "double_buffer"}
    for number, (old, now) in enumerate(former.items()):
        with pytest.warns(
            DeprecationWarning, match=f"mode='{old}' is now called '{now}'"
        ) as caught:
            assert reload(model, new, old, progress=False).mode == now
        assert caught[0].filename == __file__
        with pytest.warns(DeprecationWarning, match=now), update(model, old) as tx:
            tx.load_state_dict(new)
        assert version(model) == 3 + 2 * number


def test_a_direct_update_can_not_refuse_nan():
    with (
        pytest.raises(UpdateError, match="finite=True needs a mode"),
        update(nn.Linear(2, 2), "direct", finite=True),
    ):
        pass


# Python itself drops an interrupt that lands in the finaliser of an object.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", range(10))
def test_interrupts_at_random_moments_leave_one_version_of_the_weights(seed, mode):
    """The new weights with their version, or the old ones, or calls that are refused."""
    randomly = random.Random(seed)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(10))).requires_grad_(False)
    values = {0: None}
    for number in range(1, 25):
        new = {name: torch.full_like(p, float(number)) for name, p in model.state_dict().items()}
        before = version(model)
        timer = threading.Timer(randomly.random() * 0.004, _thread.interrupt_main)
        with contextlib.suppress(KeyboardInterrupt):
            timer.start()
            load(model, new, mode, progress=False)
        with contextlib.suppress(KeyboardInterrupt):
            timer.join()
            time.sleep(0.001)
        found = {float(x) for p in model.parameters() for x in (p.min(), p.max())}
        if lock_of(model).poisoned:
            assert mode == "direct"
            continue
        if version(model) == before:
            assert before == 0 or found == values[before]
        else:
            assert version(model) == before + 1
            assert found == {float(number)}
        values[version(model)] = found


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), RuntimeError("no")])
def test_an_exception_of_a_worker_thread_leaves_no_mixture(tmp_path, monkeypatch, error, mode):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    load(model, {name: torch.zeros_like(p) for name, p in model.state_dict().items()})
    for index in range(4):
        new = {f"{index}.weight": torch.ones(64, 64)}
        save_file(new, tmp_path / f"{index}.safetensors")
    read, calls = OpenFile.read, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        read(*args)

    monkeypatch.setattr(OpenFile, "read", failing)
    with pytest.raises(type(error)):
        load(model, tmp_path, mode, threads=2)
    monkeypatch.undo()
    if mode == "direct":
        with pytest.raises(PoisonedError), read_lock(model):
            pass
    else:
        assert not any(param.any() for param in model.parameters())
        assert version(model) == 1
    load(model, tmp_path, mode)
    with read_lock(model):
        assert all(param.all() for param in model.parameters())


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_that_is_replaced_by_a_rename_is_loaded_whole_or_refused(
    tmp_path, monkeypatch, shards, mode
):
    """Just after the headers were read: one file stays readable, of several one is of another."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3))).requires_grad_(False)
    load(model, {name: torch.zeros_like(p) for name, p in model.state_dict().items()})

    def publish(value):
        for index in range(shards):
            new = {f"{i}.weight": torch.full((8, 8), value) for i in range(index, 3, shards)}
            save_file(new, tmp_path / "next")
            os.replace(tmp_path / "next", tmp_path / f"{index}.safetensors")

    publish(1.0)
    parse = safetensors_files._parse

    def replacing(*args):
        monkeypatch.undo()
        publish(2.0)
        return parse(*args)

    monkeypatch.setattr(safetensors_files, "_parse", replacing)
    if shards == 1:
        load(model, tmp_path, mode)
        assert {float(x) for p in model.parameters() for x in p.unique()} == {1.0}
        return
    with pytest.raises(CheckpointError, match="was written or replaced while the checkpoint"):
        load(model, tmp_path, mode)
    assert {float(x) for p in model.parameters() for x in p.unique()} == {0.0}
    assert version(model) == 1
    load(model, tmp_path, mode)
    assert {float(x) for p in model.parameters() for x in p.unique()} == {2.0}


def test_a_state_file_that_can_not_be_written_at_the_end_undoes_nothing(
    tmp_path, monkeypatch, mode
):
    model, state, fsync, calls = nn.Linear(4, 4), tmp_path / "state.json", os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    new = {name: torch.full_like(p, 7.0) for name, p in model.state_dict().items()}
    with pytest.warns(UserWarning, match="the weights are whole and of version 1"):
        report = reload(model, new, mode, progress=False, state_file=state)
    assert report.version == version(model) == 1
    assert model.weight.eq(7.0).all()
    assert read_state(state).state == "committing"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_both_names_of_a_tied_parameter_must_have_equal_values(mode, tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    before = model["embed"].weight.clone()
    good = {"embed.weight": torch.ones(4, 3), "head.weight": torch.ones(4, 3)}
    for bad in (torch.full((4, 3), 2.0), torch.ones(4, 3).index_fill(0, torch.tensor(3), -0.0)):
        given = good | {"head.weight": bad}
        save_file(given, tmp_path / "w.safetensors")
        for source in (given, iter(given.items()), tmp_path):
            said = r"'embed.weight'.* and 'head.weight'.*their values differ"
            with pytest.raises(CheckpointError, match=said):
                load(model, source, mode)
    assert torch.equal(model["embed"].weight, before)
    load(model, good, mode)
    load(model, good, mode)
    with pytest.raises(CheckpointError, match="their values differ"):
        load(model, good | {"head.weight": torch.zeros(4, 3)}, mode)
    assert model["embed"].weight.eq(1).all()
