"""Updates of weights: whole or not at all, in every mode, for every kind of parameter."""

import threading
import time

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import CheckpointError, FixpassError, UpdateError, VersionError
from fixpass.runtime.weights.lock import lock_of, version
from fixpass.runtime.weights.parameter_layout import layout_of
from fixpass.runtime.weights.rebind import pack
from fixpass.runtime.weights.update import update
from fixpass.runtime.weights.weight_version import write_key
from helpers.folding import aiter
from helpers.updating import MODES, holds, model_of, values


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def identity(model):
    return {
        name: (id(p), type(p), dict(vars(p)), p.requires_grad, p.shape, p.stride(), p.dtype)
        for name, p in model.named_parameters()
    }


def pointers(model):
    return [p.data_ptr() for p in model.parameters()]


def give(tx, wanted, way):
    if way == "load":
        for name, value in wanted.items():
            tx.load(name, value)
    elif way == "load_state_dict":
        tx.load_state_dict(wanted)
    else:
        tx.load_weights((name, value) for name, value in wanted.items())


@pytest.mark.parametrize("way", ["load", "load_state_dict", "load_weights"])
def test_all_weights_are_new_after_an_update_and_nothing_else_is(mode, way):
    model = model_of()
    before, addresses = identity(model), pointers(model)
    for seed in (1, 2, 3):
        with update(model, mode) as tx:
            give(tx, values(seed), way)
        assert holds(model, values(seed))
        assert torch.equal(model.shuffled.weight, aiter(values(seed)["shuffled.weight"]))
        assert identity(model) == before
        assert (pointers(model) == addresses) is (mode != "double_buffer" or seed == 2)
        assert version(model) == tx.report.version == seed
    whole = torch.cat([model.q.weight, model.k.weight])
    assert (
        model.q.weight.untyped_storage().data_ptr() == model.k.weight.untyped_storage().data_ptr()
    )
    assert torch.equal(pack([model.q.weight, model.k.weight]), whole)


def test_an_exception_in_the_body_leaves_the_old_weights(mode):
    model = model_of()
    before, addresses = identity(model), pointers(model)

    def dying():
        yield from list(values(1).items())[:4]
        raise ConnectionError("the sender is gone")

    with pytest.raises(ConnectionError), update(model, mode) as tx:
        tx.load_weights(dying())
    assert holds(model, values(0))
    assert (identity(model), pointers(model), version(model)) == (before, addresses, 0)
    with update(model, mode) as tx:
        tx.load_state_dict(values(1))
    assert holds(model, values(1))


BAD = {
    "shape": (
        lambda v: v | {"shuffled.weight": torch.ones(32, 32)},
        r"does not fit into 'shuffled.weight', f32\[32, 64\]",
    ),
    "shape of a transposed": (
        lambda v: v | {"turned.weight": torch.ones(32, 32)},
        r"f32\[32, 64\]",
    ),
    "dtype": (
        lambda v: v | {"plain.bias": torch.ones(32, dtype=torch.float64)},
        "cast=True rounds",
    ),
    "fp8 without scale": (
        lambda v: v | {"plain.weight": torch.ones(32, 64).to(torch.float8_e4m3fn)},
        "mean nothing without their scale",
    ),
    "uint8": (lambda v: v | {"plain.weight": torch.ones(32, 64, dtype=torch.uint8)}, "scale"),
    "missing": (lambda v: {k: t for k, t in v.items() if k != "q.weight"}, r"missing: q.weight"),
    "empty": (lambda v: {}, "missing: .*plain.weight"),
    "unknown": (lambda v: v | {"what.weight": torch.ones(2)}, "unexpected: what.weight"),
    "meta": (lambda v: v | {"q.weight": torch.empty(8, 8, device="meta")}, "meta device"),
    "sparse": (lambda v: v | {"q.weight": torch.eye(8).to_sparse()}, "sparse"),
    "no tensor": (lambda v: v | {"q.weight": 3}, "is a int, not a tensor"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_fit_is_refused_before_a_byte_changes(mode, bad):
    change, said = BAD[bad]
    model = model_of()
    with pytest.raises(CheckpointError, match=said), update(model, mode) as tx:
        tx.load_state_dict(change(values(1)))
    assert holds(model, values(0))
    assert version(model) == 0


def test_an_error_about_a_parameter_with_a_layout_names_the_layout():
    model = model_of()
    said = r"'shuffled.weight', f32\[32, 64\] \(its layout is aiter_16x16\)"
    with pytest.raises(CheckpointError, match=said), update(model) as tx:
        tx.load_state_dict(values(1) | {"shuffled.weight": torch.ones(32, 32)})


def test_a_name_given_twice_is_refused(mode):
    model, twice = model_of(), [("q.weight", torch.ones(8, 8))] * 2
    with pytest.raises(FixpassError, match=r"'q.weight'.* twice"), update(model, mode) as tx:
        tx.load_weights(twice)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_is_refused_when_asked(mode, bad):
    model = model_of()
    new = values(1)
    new["shuffled.weight"][3, 5] = bad
    with (
        pytest.raises(UpdateError, match="would hold a NaN"),
        update(model, mode, finite=True) as tx,
    ):
        tx.load_state_dict(new)
    assert holds(model, values(0))
    with update(model, mode) as tx:
        tx.load_state_dict(new)
    assert version(model) == 1


def test_validate_says_what_the_load_would_be_and_writes_nothing(mode):
    model = model_of()
    with update(model, mode) as tx:
        tx.load_state_dict(values(1))
        assert "plain.weight" in tx.validate().loaded
        assert holds(model, values(0))
        assert version(model) == 0


def test_the_senders_buffer_may_be_used_again_in_mode_staged():
    model, buffer = nn.Linear(4, 4, bias=False), torch.ones(4, 4)
    with update(model) as tx:
        tx.load("weight", buffer)
        buffer.zero_()
    assert torch.equal(model.weight, torch.ones(4, 4))


def test_calls_are_held_back_and_see_one_version(mode):
    model, seen = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)), []
    stop = threading.Event()

    def call():
        gate = lock_of(model)
        while not stop.is_set():
            with gate.read_lock() as number:
                seen.append((number, *(p.mean().item() for p in model.parameters())))

    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.0)
    threads = [threading.Thread(target=call, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 20):
            with update(model, mode) as tx:
                fresh = torch.full((8, 8), float(number))
                tx.load_state_dict(dict.fromkeys(model.state_dict(), fresh))
            end = time.monotonic() + 5
            while (not seen or seen[-1][0] != number) and time.monotonic() < end:
                time.sleep(0.0001)
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert {item for item in seen if item[0] != item[1] or item[1] != item[2]} == set()
    assert {item[0] for item in seen} >= set(range(1, 20))


def test_a_second_update_of_the_same_model_is_refused():
    model = nn.Linear(2, 2)
    with (
        pytest.raises(UpdateError, match="another update of this model is open"),
        update(model),
        update(model),
    ):
        pass
    with update(model) as tx:
        tx.load_state_dict(model.state_dict())


def test_an_update_of_a_part_while_one_of_the_whole_is_open_is_noticed(mode):
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with (  # noqa: PT012
        pytest.raises(VersionError, match="became version 1 while an update of version 0"),
        update(model, mode) as tx,
    ):
        tx.load("0.weight", torch.ones(2, 2))
        with update(model[0]) as other:
            other.load("weight", torch.zeros(2, 2))
    assert not model[0].weight.any()


def test_a_parameter_that_was_replaced_in_between_fails_closed(mode):
    model = model_of()
    with pytest.raises(UpdateError, match=r"q.weight: address was"), update(model, mode) as tx:  # noqa: PT012
        tx.load_state_dict(values(1))
        model.q.weight.data = model.q.weight.data.clone()
    assert version(model) == 0


def test_a_packed_parameter_that_was_given_other_memory_is_brought_back(mode):
    model = model_of()
    whole = pack([model.q.weight, model.k.weight])
    model.q.weight.data = torch.zeros(8, 8)
    assert whole[:8].any()
    with update(model, mode, scope="parameters") as tx:
        tx.load("k.weight", values(1)["k.weight"])
    whole = pack([model.q.weight, model.k.weight])
    assert not whole[:8].any()
    assert torch.equal(whole[8:], values(1)["k.weight"])


@pytest.mark.parametrize(("option", "value"), [("mode", "fast"), ("scope", "all")])
def test_an_unknown_option_lists_the_known_ones(option, value):
    with (
        pytest.raises(UpdateError, match=f"{option} is one of .*, not '{value}'"),
        update(nn.Linear(2, 2), **{option: value}),
    ):
        pass


def test_layouts_outlive_updates(mode):
    model = model_of()
    with update(model, mode) as tx:
        tx.load_state_dict(values(1))
    assert layout_of(model.shuffled.weight).name == "aiter_16x16"


def test_every_write_of_an_update_changes_the_key_of_its_parameter(mode):
    model = model_of()
    before = {name: write_key(param) for name, param in model.named_parameters()}
    with update(model, mode) as tx:
        tx.load_state_dict(values(1))
    after = {name: write_key(param) for name, param in model.named_parameters()}
    assert [name for name in before if before[name] == after[name]] == []


def test_parameters_of_the_model_itself_may_be_given_to_each_other(mode):
    model = nn.ParameterDict({"a": torch.zeros(4, 4), "b": torch.ones(4, 4)})
    with update(model, mode) as tx:
        tx.load("a", model["b"])
        tx.load("b", model["a"].t())
    assert bool((model["a"] == 1).all())
    assert bool((model["b"] == 0).all())
