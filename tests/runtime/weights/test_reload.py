"""reload: files, state dicts and live tensors into a model that goes on, compiled or not."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fixpass  # noqa: F401  # registers the backend
from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.files import OpenFile
from fixpass.runtime.weights.load import reload
from fixpass.runtime.weights.lock import lock_of, version
from fixpass.runtime.weights.module_hooks import set_layouts
from fixpass.runtime.weights.parameter_layout import logical
from fixpass.runtime.weights.update import update
from helpers.folding import aiter

MODES = ("buffered", "undo_log", "double_buffer")


def model_of(seed=0, layers=4):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))


def saved(folder, seed, shards=2):
    """A checkpoint of several files, and its tensors."""
    state = model_of(seed).state_dict()
    names = list(state)
    for index in range(shards):
        part = {name: state[name] for name in names[index::shards]}
        save_file(part, folder / f"model-{index}.safetensors")
    return state


def holds(model, state):
    return all(torch.equal(logical(param), state[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["files", "state dict", "iterator"])
def test_a_model_is_reloaded_from_any_source(tmp_path, mode, kind):
    model = model_of()
    set_layouts(model, {"1.weight": "aiter_16x16", "2.weight": "column_major"})
    for seed in (1, 2):
        state = saved(tmp_path, seed)
        source = {"files": tmp_path, "state dict": state, "iterator": iter(state.items())}[kind]
        report = reload(model, source, mode, progress=False, threads=seed)
        assert holds(model, state)
        assert torch.equal(model[1].weight, aiter(state["1.weight"]))
        assert report.version == version(model) == seed
        assert sorted(report.load.loaded) == sorted(state)
        assert report.load.num_bytes == sum(value.nbytes for value in state.values())


def test_a_report_says_what_was_done():
    model = model_of()
    report = reload(model, model_of(1).state_dict(), progress=False)
    lines = str(report).splitlines()
    assert lines[0].startswith("loaded 8 tensors, 66,560 bytes in ")
    assert lines[1].startswith("version 1, buffered, calls held back for 0.")


def test_a_progress_bar_counts_the_bytes(tmp_path, capsys):
    saved(tmp_path, 1)
    reload(model_of(), tmp_path, progress=True)
    assert "reloading" in (shown := capsys.readouterr().err)
    assert "66.6k/66.6k" in shown


@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_is_truncated_while_it_is_read_changes_nothing(tmp_path, mode, monkeypatch):
    """The size is right when the headers are read, and wrong when the last bytes are."""
    model, state = model_of(), model_of().state_dict()
    state = {name: value.clone() for name, value in state.items()}
    saved(tmp_path, 1)
    read = OpenFile.read

    def truncating(*args):
        path = tmp_path / "model-1.safetensors"
        os.truncate(path, path.stat().st_size // 2)
        read(*args)

    monkeypatch.setattr(OpenFile, "read", truncating)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: it became shorter") as caught:
        reload(model, tmp_path, mode, progress=False, threads=1)
    assert "'0.bias' (f32[64] in model-1.safetensors)" in caught.value.__notes__[0]
    assert holds(model, state)
    assert version(model) == 0


def test_overwriting_the_file_afterwards_leaves_the_model_alone(tmp_path):
    model = model_of()
    state = saved(tmp_path, 1)
    reload(model, tmp_path, progress=False)
    for path in tmp_path.iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    assert holds(model, state)


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_model_goes_on_without_a_recompile(mode):
    model, x = model_of(), torch.randn(2, 64)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(x)
        for seed in (1, 2, 3):
            reload(compiled, model_of(seed).state_dict(), mode, progress=False)
            assert torch.equal(compiled(x), model_of(seed)(x))
    assert len(graphs) == 1
    assert version(compiled) == version(model) == 3


def resident():
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_reloads(count, mode):
    """Reload under readers in other threads; torn reads, and bytes of growth from the middle on."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    set_layouts(model, {f"{index}.weight": "aiter_16x16" for index in range(0, 8, 2)})
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.0)
    states = [
        {f"{index}.weight": torch.full((64, 64), float(value)) for index in range(8)}
        for value in range(7)
    ]
    gate, stop, torn, reads = lock_of(model), threading.Event(), [], [0]

    def call():
        while not stop.is_set():
            with gate.read_lock() as number:
                params = [param.detach() for param in model.parameters()]
                found = {float(value) for p in params for value in (p.min(), p.max())}
            reads[0] += 1
            if found != {float(number % 7)}:
                torn.append((number, found))

    threads = [threading.Thread(target=call, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    pointers, sizes = [p.data_ptr() for p in model.parameters()], []
    try:
        for number in range(1, count + 1):
            with update(model, mode, threads=1) as tx:
                tx.load_state_dict(states[number % 7])
            if number in (count // 2, count):
                sizes.append(resident())
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    if mode != "double_buffer":
        assert pointers == [p.data_ptr() for p in model.parameters()]
    assert version(model) == count
    assert reads[0] > 0
    assert torn == []
    return sizes[1] - sizes[0]


@pytest.mark.parametrize("mode", MODES)
def test_300_reloads_under_readers_are_never_torn_and_nothing_grows(mode):
    # A set of weights kept at each would be 19 MiB; the rest is how an allocator rounds.
    assert run_reloads(300, mode) < 12 << 20


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
def test_10000_reloads_under_readers_are_never_torn_and_nothing_grows(mode):
    assert run_reloads(10_000, mode) < 8 << 20
