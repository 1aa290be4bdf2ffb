"""Declared tensors: refreshed with the weights in one transaction, in every mode, or not at all."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import UpdateError, WeightError
from fixpass.runtime.weights import commit
from fixpass.runtime.weights.module_hooks import set_layouts
from fixpass.weights import derive, load, read_lock, reload, update, version

MODES = ("direct", "buffered", "undo_log", "double_buffer")


def model_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False))
    derive(model[0], "weight_t", turned, of=["weight"])
    return model


def turned(weight):
    return weight.t().contiguous()


def new_weights(model, seed=1):
    torch.manual_seed(seed)
    return {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}


def everything(model):
    """All values, bits and addresses, in order of the census."""
    held = [*model.state_dict().values(), model[0].weight_t]
    return [(tensor.data_ptr(), tensor.clone()) for tensor in held]


def assert_same(model, before):
    now = everything(model)
    assert [place for place, _ in now] == [place for place, _ in before]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(now, before, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["tensors", "files"])
def test_a_reload_refreshes_it_in_place(mode, how, tmp_path):
    model = model_of()
    held, place = model[0].weight_t, model[0].weight_t.data_ptr()
    for seed in range(3):
        new = new_weights(model, seed)
        source = new
        if how == "files":
            source = tmp_path / f"{seed}.pt"
            torch.save(new, source)
        report = reload(model, source, mode, progress=False, on_stale="raise")
        assert torch.equal(model[0].weight_t, new["0.weight"].t())
        assert model[0].weight_t is held
        assert held.data_ptr() == place
        assert (report.derived, report.stale) == (("0.weight_t",), ())
        assert "refreshed 1: 0.weight_t" in str(report)


def test_a_load_refreshes_it_too():
    model = model_of()
    new = new_weights(model)
    load(model, new, progress=False)
    assert torch.equal(model[0].weight_t, new["0.weight"].t())


def test_an_update_of_another_weight_does_not_compute_it():
    model = model_of()
    calls = []
    derive(model[0], "weight_t", lambda weight: calls.append(1) or turned(weight), of=["weight"])
    with update(model, scope="parameters") as tx:
        tx.load("1.weight", torch.zeros(4, 6))
    assert len(calls) == 1  # At its declaration.
    assert tx.report.derived == ()


def test_a_partial_update_computes_it_from_new_and_old_bytes():
    model = model_of()
    old = model[0].weight.detach().clone()
    with update(model, scope="parts") as tx:
        tx.load("0.weight", torch.ones(1, 4), start=(2,))
    old[2] = 1
    assert torch.equal(model[0].weight_t, old.t())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", ["raises", "shape", "dtype", "number"])
def test_a_function_that_fails_leaves_the_old_weights_and_the_old_value(mode, fault):
    model = model_of()
    fails = []
    wrong = {
        "shape": lambda weight: weight.clone(),
        "dtype": lambda weight: turned(weight).double(),
        "number": lambda weight: 1.0,
        "raises": lambda weight: weight.no_such_attribute,
    }[fault]
    derive(model[0], "weight_t", lambda w: wrong(w) if fails else turned(w), of=["weight"])
    before = everything(model)
    fails.append(True)
    with pytest.raises(UpdateError, match="Linear: 'weight_t', of weight, could not be derived"):
        reload(model, new_weights(model), mode, progress=False)
    assert_same(model, before)
    assert version(model) == 0
    fails.clear()
    reload(model, new_weights(model), mode, progress=False)
    assert version(model) == 1


@pytest.mark.parametrize("mode", ["undo_log", "double_buffer"])
def test_a_commit_that_fails_brings_the_old_value_back(mode, monkeypatch):
    model = model_of()
    before = everything(model)

    def failing(*args):
        raise MemoryError

    owner, name = {
        "undo_log": (commit.Commit, "_check_files"),
        "double_buffer": (commit.DoubleBuffer, "flip"),
    }[mode]
    calls, real = [], getattr(owner, name)

    def at_the_end(self, *args):
        calls.append(1)
        # The files of an undo log are checked before the lock closes, and after the write.
        return failing() if mode == "double_buffer" or len(calls) == 2 else real(self, *args)

    monkeypatch.setattr(owner, name, at_the_end)
    with pytest.raises(MemoryError):
        reload(model, new_weights(model), mode, progress=False)
    assert_same(model, before)


def test_a_reader_sees_weight_and_value_of_one_version():
    model = model_of()
    seen = []

    def look(weight):
        with read_lock(model) as number:
            seen.append((number, torch.equal(model[0].weight_t, model[0].weight.t())))
        return turned(weight)

    derive(model[1], "weight_t", look, of=["weight"])
    for seed in range(3):
        reload(model, new_weights(model, seed), progress=False)
    # The function runs while calls go on, before anything is written.
    assert seen == [(0, True), (0, True), (1, True), (2, True)]


def test_a_value_may_follow_from_another_declared_one():
    model = model_of()
    derive(model[0], "twice", lambda value: 2 * value, of=["weight_t"])
    new = new_weights(model)
    reload(model, new, progress=False)
    assert torch.equal(model[0].twice, 2 * new["0.weight"].t())


def test_a_registered_tensor_may_be_declared_and_no_checkpoint_needs_it():
    model = model_of()
    model[0].register_buffer("kept", torch.empty(4, 6))
    derive(model[0], "kept", turned, of=["weight"])
    saved = {name: torch.full_like(t, 7.0) for name, t in model.state_dict().items()}
    for state in (saved, {name: saved[name] for name in ("0.weight", "1.weight")}):
        reload(model, state, progress=False)
        assert torch.equal(model[0].kept, torch.full((4, 6), 7.0))
    report = reload(model, saved | {"0.kept": torch.zeros(4, 6)}, progress=False)
    assert torch.equal(model[0].kept, torch.full((4, 6), 7.0))
    assert [skipped.name for skipped in report.load.skipped] == ["0.kept"]


def test_it_sees_the_weight_as_the_kernel_does():
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    set_layouts(model, {"0.weight": "transposed"})
    derive(model[0], "sums", lambda weight: weight.sum(1), of=["weight"])
    new = torch.randn(32, 64)
    reload(model, {"0.weight": new}, progress=False)
    torch.testing.assert_close(model[0].sums, new.sum(0))


def test_a_tensor_made_in_inference_mode_is_refreshed_outside_of_it():
    model = model_of()
    with torch.inference_mode():
        model[0].weight_t = torch.zeros(4, 6)
    new = new_weights(model)
    reload(model, new, progress=False)
    assert torch.equal(model[0].weight_t, new["0.weight"].t())


def test_a_declaration_computes_the_value_and_makes_an_attribute_that_is_not_there():
    module = nn.Linear(3, 2)
    module.total = torch.zeros(())
    derive(module, "total", torch.sum, of=["weight"])
    derive(module, "number", lambda bias: bias.sum().item(), of=["bias"])
    assert torch.equal(module.total, module.weight.detach().sum())
    assert module.number == module.bias.sum().item()


def two_by_two(weight):
    return torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("name", "function", "of", "message"),
    [
        ("a.b", turned, ["weight"], "Linear has no 'a.b'"),
        ("view", turned, ["weight"], "'view' is a view of one of weight: it follows by itself"),
        (
            "held",
            two_by_two,
            ["weight"],
            r"'held' is torch.float32 \(3,\) on cpu, and its function",
        ),
        ("held", turned, ["no"], "Linear has no 'no'"),
        ("held", turned, ["in_features"], "'held' is derived of in_features, which is no tensor"),
        ("held..", turned, ["weight"], "is not a path such as"),
    ],
)
def test_a_declaration_that_cannot_hold_is_an_error(name, function, of, message):
    module = nn.Linear(3, 2)
    module.view, module.held = module.weight.data.t(), torch.zeros(3)
    with pytest.raises(WeightError, match=message):
        derive(module, name, function, of=of)


def test_copies_and_pickles_have_the_tensor_and_no_declaration(tmp_path):
    model = model_of()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        new = new_weights(model)
        old = twin[0].weight_t.clone()
        with pytest.warns(UserWarning, match=r"0.weight_t \(a transpose of 0.weight\)"):
            reload(twin, new, progress=False)
        assert torch.equal(twin[0].weight_t, old)


def test_a_declaration_dies_with_its_module():
    model = model_of()
    derive(model[0], "weight_t", lambda weight, model=model: turned(weight), of=["weight"])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
