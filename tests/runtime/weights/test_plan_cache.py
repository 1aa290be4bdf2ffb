"""A reload like the last one is not planned again; a reload like no other is, and both are right."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fixpass  # noqa: F401  # registers the backend
from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights import files
from fixpass.runtime.weights.lock import version
from fixpass.runtime.weights.parameter_layout import set_layout
from fixpass.runtime.weights.plan_cache import _CACHE
from fixpass.runtime.weights.rebind import pack
from helpers.folding import aiter
from helpers.reloading import MODES, holds, model_of, named, reloaded, saved, stacked


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["files", "state dict"])
def test_what_is_like_the_last_is_not_planned_again(tmp_path, plans, mode, threads, kind):
    model, reports = model_of(), []
    before = {name: (id(value), value._version) for name, value in named(model)}
    for number in range(1, 6):
        state = saved(tmp_path / str(number), number)
        source = tmp_path / str(number) if kind == "files" else state
        reports.append(reloaded(model, source, mode, threads=threads))
        assert holds(model, state)
        assert version(model) == reports[-1].version == number
        now = {name: (id(value), value._version) for name, value in named(model)}
        assert all(now[name][0] == before[name][0] for name in now)
        assert all(now[name][1] > before[name][1] for name in now), "a write that torch counts"
        before = now
    assert len(plans) == 1
    assert {(r.load.loaded, r.load.num_bytes, r.mode) for r in reports} == {
        (reports[0].load.loaded, reports[0].load.num_bytes, mode)
    }
    assert all(report.load.seconds > 0 for report in reports)


def test_tensors_that_are_stacked_into_one_go_where_they_went(tmp_path, plans):
    model, mapping = stacked(16)
    for seed in range(3):
        torch.manual_seed(seed)
        parts = {name: torch.randn(16, 16) for name in "qkv"}
        save_file({f"{n}.weight": part for n, part in parts.items()}, tmp_path / "w.safetensors")
        reloaded(model, tmp_path, mapping=mapping)
        assert torch.equal(model["qkv"].weight, torch.cat([parts[name] for name in "qkv"]))
    assert len(plans) == 1


@pytest.mark.parametrize("mode", MODES)
def test_tensors_in_memory_are_stacked_where_they_were_and_cut_where_they_are_large(
    plans, mode, monkeypatch
):
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    model, mapping = stacked(64)
    for seed in range(4):
        torch.manual_seed(seed)
        parts = {f"{name}.weight": torch.randn(64, 64) for name in ("v", "q", "k")}
        reloaded(model, parts, mode, mapping=mapping)
        whole = torch.cat([parts[f"{name}.weight"] for name in "qkv"])
        assert torch.equal(model["qkv"].weight, whole)
    assert len(plans) == 1


def test_weights_of_the_model_itself_may_be_given(plans):
    """They lie in memory that the update writes over."""
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(1, 5):
        swapped = {"a": "b", "b": "a"}
        state = {swapped[n[0]] + n[1:]: value for n, value in model.state_dict().items()}
        reloaded(model, state)
        other = before if number % 2 == 0 else {swapped[n[0]] + n[1:]: v for n, v in before.items()}
        assert holds(model, other)
    assert len(plans) == 1


def _row_major(state):
    state["0.up.weight"] = state["0.up.weight"].t().contiguous().t()


def _negated(state):
    state["0.up.weight"] = torch._neg_view(state["0.up.weight"])


def _in_other_order(state):
    state["0.up.weight"] = state.pop("0.up.weight")


def _of_a_subclass(state):
    state["0.up.weight"] = torch.Tensor._make_subclass(Odd, state["0.up.weight"])


class Odd(torch.Tensor):
    """Which may keep its values anywhere."""


@pytest.mark.parametrize("change", [_row_major, _negated, _in_other_order, _of_a_subclass])
def test_tensors_that_lie_otherwise_are_planned_again(tmp_path, plans, change):
    model = model_of()
    for seed in range(3):
        state = saved(tmp_path, seed)
        if seed == 2:
            change(state)
        reloaded(model, state, "undo_log")
        assert holds(model, state)
    assert len(plans) == 2


def _fold(model):
    set_layout(model[0].up.weight, "aiter_16x16")


def _other_parameter(model):
    model[1].down.weight = nn.Parameter(torch.zeros(64, 32), requires_grad=False)


def _other_module(model):
    model[1].down = nn.Linear(32, 64).requires_grad_(False)


def _column_major(model):
    model[0].up.weight.data = model[0].up.weight.t().contiguous().t()


def _other_dtype(model):
    model[0].up.weight.data = model[0].up.weight.double()


def _wants_gradient(model):
    model[0].up.weight.requires_grad_(True)


def _tied(model):
    model[1].up.weight = model[0].up.weight


def _packed(model):
    pack([model[0].up.weight, model[1].up.weight], "gate_up_pack")


def _own_loader(model):
    model[0].up.weight.weight_loader = lambda param, value: param.data.copy_(value).add_(0)


CHANGES = (
    _fold,
    _column_major,
    _wants_gradient,
    _packed,
    _own_loader,
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_another_one_is_planned_again(tmp_path, plans, mode, change):
    model = model_of()
    for seed in (1, 2):
        saved(tmp_path, seed)
        reloaded(model, tmp_path, mode)
    assert len(plans) == 1
    change(model)
    for seed in (3, 4, 5):
        state = saved(tmp_path, seed)
        reloaded(model, tmp_path, mode)
        assert holds(model, state)
    assert len(plans) > 1
    if change is _fold:
        assert torch.equal(model[0].up.weight, aiter(state["0.up.weight"]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [_other_parameter, _other_module])
def test_other_objects_that_are_alike_are_written_by_the_same_plan(tmp_path, plans, mode, change):
    model = model_of()
    for seed in (1, 2):
        saved(tmp_path, seed)
        reloaded(model, tmp_path, mode)
    old = model[1].down.weight.detach()
    values = old.clone()
    change(model)
    for seed in (3, 4, 5):
        state = saved(tmp_path, seed)
        reloaded(model, tmp_path, mode)
        assert holds(model, state)
    assert torch.equal(old, values)
    assert len(plans) == 1


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_was_exchanged_in_between_is_the_memory_that_is_written(tmp_path, mode):
    model = model_of()
    for seed in range(6):
        state = saved(tmp_path, seed)
        reloaded(model, tmp_path, mode)
        assert holds(model, state)
        old = model[0].up.weight.data
        model[0].up.weight.data = torch.zeros(32, 64)
        assert not torch.equal(old, model[0].up.weight)
        state = saved(tmp_path, seed + 10)
        reloaded(model, tmp_path, mode)
        assert holds(model, state)
        assert not torch.equal(old, state["0.up.weight"]), "what it had before was let alone"


def test_weights_that_became_tied_are_loaded_once(tmp_path):
    model = model_of()
    state = saved(tmp_path, 1)
    reloaded(model, tmp_path)
    _tied(model)
    with pytest.raises(CheckpointError, match=r"'0\.up\.weight'.* and '1\.up\.weight'.*differ"):
        reloaded(model, tmp_path)
    assert version(model) == 1
    state = saved(tmp_path, 2, 1)
    save_file({**state, "1.up.weight": state["0.up.weight"].clone()}, tmp_path / "m-0.safetensors")
    (tmp_path / "m-1.safetensors").unlink()
    report = reloaded(model, tmp_path)
    assert [item.name for item in report.load.skipped] == ["1.up.weight"]
    assert torch.equal(model[1].up.weight, state["0.up.weight"])


def test_a_dtype_that_no_longer_fits_is_refused(tmp_path):
    model = model_of()
    saved(tmp_path, 1)
    reloaded(model, tmp_path)
    _other_dtype(model)
    with pytest.raises(CheckpointError, match=r"0\.up\.weight"):
        reloaded(model, tmp_path)
    assert version(model) == 1


def test_other_headers_are_read(tmp_path, plans):
    model = model_of()
    saved(tmp_path, 1)
    reloaded(model, tmp_path)
    state = saved(tmp_path, 2)
    half = {name: value.half() for name, value in state.items() if value.is_floating_point()}
    save_file({**state, **half}, tmp_path / "m-0.safetensors")
    (tmp_path / "m-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cast"):
        reloaded(model, tmp_path)
    reloaded(model, tmp_path, cast=True)
    assert torch.equal(model[0].up.weight, half["0.up.weight"].float())
    assert len(plans) == 3


@pytest.mark.parametrize("options", [{"scope": "parameters"}, {"finite": True}, {"cast": True}])
def test_other_options_are_planned_again(tmp_path, plans, options):
    model = model_of()
    for seed in (1, 2):
        state = saved(tmp_path, seed)
        reloaded(model, tmp_path, **(options if seed == 2 else {}))
        assert holds(model, state)
    assert len(plans) == 2


def test_a_compiled_model_sees_the_weights(tmp_path):
    """Also those that a value was derived from, which depends on counted writes."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(512, 512), requires_grad=False)

        def forward(self, x):
            return x @ torch.cat([self.weight, self.weight.flip(0)]).t()

    model, x = Twice(), torch.randn(4, 512)
    # Linear layers of few rows sum in another order than eager's, to which this compares.
    options = {"fold_weights": "cache", "disable": ("prepack-linears",), "linear": "inductor"}
    compiled = torch.compile(model, backend="fixpass", options=options)
    for seed in range(4):
        saved(tmp_path, seed, 1, model)
        reloaded(model, tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


def test_what_is_kept_keeps_no_model(tmp_path):
    model = model_of()
    saved(tmp_path, 1)
    for _ in range(2):
        reloaded(model, tmp_path)
    assert _CACHE.get(model) is not None
    weak = weakref.ref(model)
    del model
    gc.collect()
    assert weak() is None
