"""Reloads from iterators: like the last they are copied as they come, unlike it planned again."""

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import CheckpointError, UpdateError
from fixpass.runtime.weights import files
from fixpass.runtime.weights.lock import version
from helpers.reloading import holds, model_of, named, reloaded, stacked

pytestmark = pytest.mark.parametrize("mode", ["buffered", "double_buffer", "undo_log"])


def values(seed):
    torch.manual_seed(seed)
    return {n: torch.randn(v.shape).to(v.dtype) for n, v in model_of().state_dict().items()}


def in_one_buffer(state):
    """The tensors, each over the memory of the one before."""
    memory = torch.empty(max(value.nbytes for value in state.values()), dtype=torch.uint8)
    for name, value in state.items():
        view = memory[: value.nbytes].view(value.dtype).view(value.shape)
        yield name, view.copy_(value)
    memory.fill_(0)


def column_major(state):
    return ((n, v.t().contiguous().t() if v.dim() == 2 else v) for n, v in state.items())


def negated(state):
    return ((n, torch._neg_view(-v) if v.is_floating_point() else v) for n, v in state.items())


def listed(state):
    return list(state.items())


@pytest.mark.parametrize("give", [in_one_buffer, column_major, negated, listed])
def test_what_is_like_the_last_is_not_planned_again(plans, give, mode):
    model, reports = model_of(), []
    ids = {name: id(value) for name, value in named(model)}
    for number in range(1, 5):
        state = values(number)
        reports.append(reloaded(model, give(state), mode))
        assert holds(model, state)
        assert version(model) == reports[-1].version == number
    assert ids == {name: id(value) for name, value in named(model)}
    assert len(plans) == 1
    assert reports[0].load.loaded == reports[-1].load.loaded


def test_an_iterator_may_follow_a_state_dict_and_be_followed_by_one(plans, mode):
    model = model_of()
    for number, give in enumerate((dict, in_one_buffer, dict, in_one_buffer)):
        state = values(number)
        reloaded(model, give(state), mode)
        assert holds(model, state)
    assert len(plans) == (1 if mode == "buffered" else 4), "elsewhere it goes through a file"


def test_tensors_that_are_cut_up_go_where_they_went(plans, monkeypatch, mode):
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    model, mapping = stacked(64)
    for seed in range(4):
        torch.manual_seed(seed)
        parts = {f"{name}.weight": torch.randn(64, 64) for name in ("v", "q", "k")}
        if seed == 3:
            parts["q.weight"] = parts.pop("q.weight")
        reloaded(model, in_one_buffer(parts), mode, mapping=mapping)
        whole = torch.cat([parts[f"{name}.weight"] for name in "qkv"])
        assert torch.equal(model["qkv"].weight, whole)
    assert len(plans) == 2, "another order is another plan, and what was copied first is given it"


def renamed(items, at):
    name, value = items[at]
    return [*items[:at], *items[at + 1 :], (name, value)]


def of_another_class(items, at):
    name, value = items[at]
    return [*items[:at], (name, nn.Buffer(value)), *items[at + 1 :]]


@pytest.mark.parametrize("change", [renamed, of_another_class])
@pytest.mark.parametrize("at", [0, 1, 7, 12])
def test_what_is_unlike_from_some_tensor_on_is_planned_again_from_the_first(
    plans, change, at, mode
):
    model = model_of()
    for seed in (1, 2):
        reloaded(model, in_one_buffer(values(seed)), mode)
    assert len(plans) == 1
    state = values(3)
    reloaded(model, in_one_buffer(dict(change(listed(state), at))), mode)
    assert holds(model, state)
    assert version(model) == 3


@pytest.mark.parametrize("at", [0, 1, 7, 12])
@pytest.mark.parametrize("fault", ["shape", "missing", "unexpected", "dtype", "freed", "dies"])
def test_what_does_not_fit_is_refused_and_the_weights_are_those_of_before(fault, at, mode):
    model, before = model_of(), values(2)
    for state in (values(1), before):
        reloaded(model, in_one_buffer(state), mode)

    def bad():
        for index, (name, value) in enumerate(values(3).items()):
            if index != at:
                yield name, value
            elif fault == "shape":
                yield name, torch.cat([value.view(-1), value.view(-1)])
            elif fault == "unexpected":
                yield name, value
                yield "other", value
            elif fault == "dtype":
                yield name, value.to(torch.float64)
            elif fault == "freed":
                value.untyped_storage().resize_(0)
                yield name, value
            elif fault == "dies":
                raise ConnectionError("the trainer is gone")

    with pytest.raises(ConnectionError if fault == "dies" else (CheckpointError, RuntimeError)):
        reloaded(model, bad(), mode)
    assert holds(model, before)
    assert version(model) == 2
    state = values(4)
    reloaded(model, in_one_buffer(state), mode)
    assert holds(model, state)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.randn(3, 7),
        torch.ones(0, 4, dtype=torch.int8),
        torch.ones(0, 4, device="meta"),
        torch.ones(2, 4, device="meta"),
    ],
)
def test_in_place_of_an_empty_tensor_nothing_else_is_taken(wrong, mode):
    model = nn.ParameterDict({"a": torch.zeros(2, 2), "z": torch.zeros(0, 4)})
    model.requires_grad_(False)
    for value in (1.0, 2.0):
        items = [("a", torch.full((2, 2), value)), ("z", torch.zeros(0, 4))]
        reloaded(model, iter(items), mode)
    with pytest.raises(CheckpointError):
        reloaded(model, iter([("a", torch.zeros(2, 2)), ("z", wrong)]), mode)
    assert (model["a"] == 2.0).all()


@pytest.mark.parametrize("name", [None, 3, ""])
def test_what_comes_after_the_last_is_not_dropped(name, mode):
    model = model_of()
    for seed in (1, 2):
        reloaded(model, in_one_buffer(values(seed)), mode)
    extra = [(name, torch.tensor(1, dtype=torch.uint8)), ("other", torch.zeros(1))]
    with pytest.raises(CheckpointError):
        reloaded(model, iter([*listed(values(3)), *extra]), mode)
    assert holds(model, values(2))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_conjugated_values_are_loaded_as_their_values(dtype, mode):
    model = nn.ParameterDict({"w": torch.zeros(4, 4, dtype=dtype)}).requires_grad_(False)
    for number in range(4):
        value = torch.randn(4, 4, dtype=dtype).conj()
        reloaded(model, iter([("w", value)]) if number < 2 else {"w": value}, mode)
        assert torch.equal(model["w"], value)


def test_one_element_has_any_stride(mode):
    model = nn.Linear(1, 1).requires_grad_(False)
    for number in range(3):
        weight = torch.full((1, 2), float(number))[:, ::2]
        reloaded(model, iter([("weight", weight), ("bias", torch.ones(2)[::2])]), mode)
        assert (model.weight == number).all()


def test_one_that_ends_early_or_goes_on_is_like_no_other(mode):
    model = model_of()
    for seed in (1, 2):
        reloaded(model, in_one_buffer(values(seed)), mode)
    before, items = values(2), listed(values(3))
    for wrong in (items[:-1], [*items, ("other", torch.zeros(1))], []):
        with pytest.raises(CheckpointError):
            reloaded(model, iter(wrong), mode)
        assert holds(model, before)


def test_a_model_that_changes_while_tensors_come_is_refused(plans, mode):
    model = model_of()
    for seed in (1, 2):
        reloaded(model, in_one_buffer(values(seed)), mode)
    state = values(3)

    def meanwhile():
        yield from in_one_buffer(state)
        model[1].down.weight = nn.Parameter(torch.zeros(64, 32), requires_grad=False)

    with pytest.raises(UpdateError, match=r"1\.down\.weight: another object is in its place"):
        reloaded(model, meanwhile(), mode)
    assert version(model) == 2
    assert not model[1].down.weight.any()
    reloaded(model, in_one_buffer(state), mode)
    assert holds(model, state)
    assert len(plans) == 1, "the new parameter is like the one before"


def test_a_tensor_that_nothing_takes_is_taken_when_something_does(plans, mode):
    """Of tied weights a checkpoint may have both; which is skipped may change."""
    model = model_of()
    model[1].up.weight = model[0].up.weight
    state = {}
    for seed in (1, 2, 3):
        state = values(seed)
        state["1.up.weight"] = state["0.up.weight"].clone()
        reloaded(model, in_one_buffer(state), mode)
        assert torch.equal(model[0].up.weight, state["0.up.weight"])
    assert len(plans) == 1
    before = model[0].up.weight.clone()
    with pytest.raises(
        CheckpointError, match="are for one tied parameter, and their values differ"
    ):
        reloaded(model, in_one_buffer(values(4)), mode)
    assert torch.equal(model[0].up.weight, before)
    model[1].up.weight = nn.Parameter(torch.zeros(32, 64), requires_grad=False)
    state = values(4)
    reloaded(model, in_one_buffer(state), mode)
    assert holds(model, state)
    assert len(plans) == 2


def test_checks_for_nan_are_planned_each_time(plans, mode):
    model = model_of()
    for seed in range(3):
        state = values(seed)
        reloaded(model, in_one_buffer(state), mode, finite=True)
        assert holds(model, state)
    assert len(plans) == 3
