"""Updates of weights: whole or not at all, in every mode, for every kind of parameter."""

import threading

import pytest
import torch
from folding import aiter
from torch import nn

from fixpass.runtime.checkpoint.mapping import Mapping
from fixpass.runtime.checkpoint.presets import FUSED_EXPERTS
from fixpass.runtime.errors import CheckpointError, FixpassError, UpdateError, VersionError
from fixpass.runtime.weights.alias import pack
from fixpass.runtime.weights.digest import digest
from fixpass.runtime.weights.fold import layout_of, logical
from fixpass.runtime.weights.gate import gate_of
from fixpass.runtime.weights.protect import fold_model
from fixpass.runtime.weights.transaction import update
from fixpass.runtime.weights.versions import version

MODES = ("staged", "journal", "double")


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def model_of(seed=0, folded=True):
    """Plain, shuffled, transposed, packed and tied parameters, and a buffer."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.plain = nn.Linear(64, 32)
    model.shuffled = nn.Linear(64, 32)
    model.turned = nn.Linear(64, 32)
    model.tied = nn.Linear(64, 32, bias=False)
    model.tied.weight = model.plain.weight
    model.q, model.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)
    model.register_buffer("steps", torch.tensor(seed))
    for name, param in model.named_parameters():
        param.mark = name
    if folded:
        fold_model(model, {"shuffled.weight": "aiter_16x16", "turned.weight": "transposed"})
        pack([model.q.weight, model.k.weight])
    return model


def values(seed):
    return {
        name: value.clone() for name, value in model_of(seed, folded=False).state_dict().items()
    }


def holds(model, wanted):
    state = model.state_dict()
    return state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in wanted)


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
        assert (pointers(model) == addresses) is (mode != "double" or seed == 2)
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


def test_an_error_about_a_folded_parameter_names_both_layouts():
    model = model_of()
    with pytest.raises(CheckpointError) as caught, update(model) as tx:
        tx.load_state_dict(values(1) | {"shuffled.weight": torch.ones(32, 32)})
    assert caught.value.__notes__ == ["'shuffled.weight' is folded into aiter_16x16"]


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


def test_a_partial_update_leaves_the_rest(mode):
    model = model_of()
    new = {"turned.weight": values(1)["turned.weight"], "q.weight": values(1)["q.weight"]}
    with update(model, mode, scope="parameters") as tx:
        tx.load_state_dict(new)
    assert holds(model, values(0) | new)
    with pytest.raises(CheckpointError, match="missing"), update(model, mode) as tx:
        tx.load_state_dict(new)


def test_a_delta_of_another_base_is_refused(mode):
    model = model_of()
    with update(model, mode, version=10) as tx:
        tx.load_state_dict(values(1))
    with (
        pytest.raises(VersionError, match="changes 9, and the weights are 10"),
        update(model, base=9),
    ):
        pass
    with (
        pytest.raises(VersionError, match="version 10 does not follow version 10"),
        update(model, version=10),
    ):
        pass
    with update(model, mode, base=10, version=11, scope="parameters") as tx:
        tx.load("q.weight", values(2)["q.weight"])
    assert version(model) == 11
    base = digest(model)
    with update(model, mode, base=base, scope="parameters") as tx:
        tx.load("k.weight", values(2)["k.weight"])
    with pytest.raises(VersionError, match="and the weights are"), update(model, base=base):
        pass


def test_a_digest_is_of_logical_values():
    assert digest(model_of()) == digest(model_of(folded=False)) != digest(model_of(1))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w13 = nn.Parameter(torch.zeros(4, 64, 32))
        self.w2 = nn.Parameter(torch.zeros(4, 32, 32))


def test_parts_are_placed_by_their_start_and_counted(mode):
    model = Experts()
    fold_model(model, {"w13": "aiter_16x16"})
    whole = torch.randn(4, 64, 32)
    with update(model, mode, scope="parts") as tx:
        for expert in (2, 0):
            tx.load("w13", whole[expert], start=(expert,))
    assert torch.equal(logical(model.w13)[[0, 2]], whole[[0, 2]])
    assert not logical(model.w13)[[1, 3]].any()
    assert tx.report.covered == {"w13": (16384, 32768)}
    with (
        pytest.raises(CheckpointError, match=r"not covered: w13 \(8,192 of 32,768 bytes\)"),
        update(model, mode, scope="parameters") as tx,
    ):
        tx.load("w13", whole[1], start=(1,))
    with (  # noqa: PT012
        pytest.raises(CheckpointError, match="two parts of 'w13' overlap"),
        update(model, mode, scope="parts") as tx,
    ):
        tx.load("w13", whole[1], start=(1,))
        tx.load("w13", whole[1, 5:], start=(1, 5))
    with (
        pytest.raises(
            CheckpointError, match=r"at \[4, 0, 0\] is not within 'w13', f32\[4, 64, 32\]"
        ),
        update(model, mode, scope="parts") as tx,
    ):
        tx.load("w13", whole[1], start=(4,))
    with update(model, mode, scope="parameters") as tx:
        for row in range(0, 64, 8):
            tx.load("w13", whole[:, row : row + 8], start=(0, row))
    assert torch.equal(logical(model.w13), whole)


FUSED = Mapping(experts=(FUSED_EXPERTS,))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.w13_weight = nn.Parameter(torch.zeros(4, 64, 32))
        self.experts.w2_weight = nn.Parameter(torch.zeros(4, 32, 32))


def expert_tensors():
    torch.manual_seed(0)
    return {
        f"experts.{i}.{part}_proj.weight": torch.randn(32, 32)
        for i in range(4)
        for part in ("gate", "up", "down")
    }


def test_experts_go_by_their_index_whatever_the_order(mode):
    model, stored = Mixture(), expert_tensors()
    fold_model(model, {"experts.w13_weight": "aiter_16x16"})
    with update(model, mode, mapping=FUSED) as tx:
        tx.load_state_dict(dict(reversed(stored.items())))
    w13 = logical(model.experts.w13_weight)
    for i in range(4):
        assert torch.equal(w13[i, :32], stored[f"experts.{i}.gate_proj.weight"])
        assert torch.equal(w13[i, 32:], stored[f"experts.{i}.up_proj.weight"])
        assert torch.equal(model.experts.w2_weight[i], stored[f"experts.{i}.down_proj.weight"])
    renamed = {name.replace("experts.1.", "experts.10."): t for name, t in stored.items()}
    with (
        pytest.raises(CheckpointError, match=r"expert 10 and .* has 4 experts"),
        update(model, mode, mapping=FUSED) as tx,
    ):
        tx.load_state_dict(renamed)
    gone = {name: t for name, t in stored.items() if ".1." not in name}
    with (
        pytest.raises(CheckpointError, match="nothing is stored for expert 1"),
        update(model, mode, mapping=FUSED, scope="parameters") as tx,
    ):
        tx.load_state_dict(gone)


class Rows(nn.Module):
    """A parameter with a loader of an engine: narrows its own rows out of the stored tensor."""

    def __init__(self, rank=1):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 64), requires_grad=False)
        self.weight.output_dim = 0
        self.weight.weight_loader = self.weight_loader
        self.rank = rank

    def weight_loader(self, param, loaded):
        part = loaded.narrow(param.output_dim, 32 * self.rank, 32)
        assert param.shape == part.shape
        param.data.copy_(part)


def test_a_loader_of_a_parameters_own_is_used_and_may_fail(mode):
    model, whole = Rows(), torch.randn(64, 64)
    fold_model(model, {"weight": "aiter_16x16"})
    for _ in range(2):
        with update(model, mode) as tx:
            tx.load("weight", whole)
        assert torch.equal(model.weight, aiter(whole[32:]))
    model.rank = 7
    with (
        pytest.raises(CheckpointError, match="weight_loader of 'weight' did not take"),
        update(model, mode) as tx,
    ):
        tx.load("weight", whole)
    assert torch.equal(model.weight, aiter(whole[32:]))


def test_calls_are_held_back_and_see_one_version(mode):
    model, seen = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)), []
    stop = threading.Event()

    def call():
        gate = gate_of(model)
        while not stop.is_set():
            with gate.reading() as number:
                seen.append((number, *(p.mean().item() for p in model.parameters())))

    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.0)
    threads = [threading.Thread(target=call, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 30):
            with update(model, mode) as tx:
                fresh = torch.full((8, 8), float(number))
                tx.load_state_dict(dict.fromkeys(model.state_dict(), fresh))
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert {item for item in seen if item[0] != item[1] or item[1] != item[2]} == set()
    assert len({item[0] for item in seen}) > 1


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


def test_memory_that_others_share_is_not_doubled():
    model = nn.Linear(2, 2).share_memory()
    with pytest.raises(UpdateError, match="shared memory"), update(model, "double") as tx:
        tx.load_state_dict(model.state_dict())
