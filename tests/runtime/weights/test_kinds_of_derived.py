"""Tensors that follow from weights, as engines make them, one test for each kind that is reported.

Each is found before it does harm, by a census, an audit or an update that refuses, and has the
right value right after an update.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fixpass.integrations.sglang.engine_parameters import keeping, restore
from fixpass.runtime.errors import UpdateError
from fixpass.weights import audit, census, derive, load, reload

HEADS, NOPE, VALUES, RANK = 2, 3, 5, 8


def linear(rows, columns):
    return nn.Linear(columns, rows, bias=False)


def scalar(value):
    return nn.Parameter(torch.tensor(value), requires_grad=False)


def new_weights(model):
    """Other values for all parameters and buffers that a checkpoint has."""
    torch.manual_seed(1)
    return {
        name: torch.randn(t.shape) if t.is_floating_point() else torch.randperm(len(t))
        for name, t in model.state_dict().items()
    }


def exposed(model):
    return {entry.names[0]: str(entry.relation) for entry in census(model).exposed}


def assert_refused(model, name):
    """An update that would leave the tensor stale is refused, and changes nothing."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UpdateError) as error:
        reload(model, new_weights(model), progress=False, on_stale="raise")
    assert name in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def reloaded(model):
    """The weights that were given, after a reload that would refuse to leave anything stale."""
    new = new_weights(model)
    reload(model, new, progress=False, on_stale="raise")
    return new


class Attention(nn.Module):
    """MLA: the matrices of its keys and values are kept apart, turned for batched products."""

    def __init__(self):
        super().__init__()
        self.kv_b_proj = linear(HEADS * (NOPE + VALUES), RANK)
        self.W_UK_T, self.W_UV = keys(self.kv_b_proj.weight), values(self.kv_b_proj.weight)


def keys(weight):
    return split(weight)[0].permute(1, 2, 0).contiguous()


def values(weight):
    return split(weight)[1].transpose(0, 1).contiguous()


def split(weight):
    return weight.detach().t().view(RANK, HEADS, NOPE + VALUES).split([NOPE, VALUES], dim=-1)


def test_mla_w_uv_and_w_uk_t():
    model = nn.Sequential(Attention())
    relation = "a slice of 0.kv_b_proj.weight"
    assert exposed(model) == {"0.W_UK_T": relation, "0.W_UV": relation}
    assert_refused(model, "0.W_UV")
    addresses = model[0].W_UV.data_ptr(), model[0].W_UK_T.data_ptr()
    derive(model[0], "W_UV", values, of=["kv_b_proj.weight"])
    derive(model[0], "W_UK_T", keys, of=["kv_b_proj.weight"])
    weight = reloaded(model)["0.kv_b_proj.weight"]
    for head in range(HEADS):
        rows = weight[head * (NOPE + VALUES) :][: NOPE + VALUES]
        assert torch.equal(model[0].W_UK_T[head], rows[:NOPE])
        assert torch.equal(model[0].W_UV[head], rows[NOPE:].t())
    assert (model[0].W_UV.data_ptr(), model[0].W_UK_T.data_ptr()) == addresses


def test_a_scale_on_a_config_object():
    model = nn.Module()
    model.scale = scalar(0.3)
    model.config = SimpleNamespace(scale=model.scale.detach().clone(), number=model.scale.item())
    relation = "a copy of scale"
    assert exposed(model) == {"config.scale": relation, "config.number": relation}
    assert_refused(model, "config.number")
    derive(model, "config.scale", lambda scale: scale, of=["scale"])
    derive(model, "config.number", lambda scale: scale.item(), of=["scale"])
    wanted = reloaded(model)["scale"]
    assert torch.equal(model.config.scale, wanted)
    assert model.config.number == wanted.item()


def test_memoised_permutation_indices():
    model = nn.Module()
    model.register_buffer("g_idx", torch.tensor([2, 0, 1, 1, 3]))
    model.method = SimpleNamespace(indices={("w13", torch.Size([5])): model.g_idx.argsort()})
    name = "method.indices[('w13', torch.Size([5]))]"
    assert exposed(model) == {name: "the sorting order of g_idx"}
    assert_refused(model, name)
    derive(model, name, torch.argsort, of=["g_idx"])
    new = reloaded(model)["g_idx"]
    (indices,) = model.method.indices.values()
    assert new[indices].tolist() == sorted(new.tolist())


def test_a_rotary_cache_that_is_a_non_persistent_buffer():
    model = nn.Module()
    model.register_buffer("inv_freq", torch.rand(4))
    model.register_buffer("cos_sin", torch.empty(6, 8), persistent=False)

    def angles(inv_freq):
        outer = torch.arange(6.0)[:, None] * inv_freq
        return torch.cat([outer.cos(), outer.sin()], dim=-1)

    def process(model):
        model.cos_sin.copy_(angles(model.inv_freq))

    found = census(model, process=process)
    assert [entry.names[0] for entry in found.exposed] == ["cos_sin"]
    assert str(found.exposed[0].relation).endswith("process of inv_freq")
    assert_refused(model, "cos_sin")
    derive(model, "cos_sin", angles, of=["inv_freq"])
    new = reloaded(model)["inv_freq"]
    for position in range(6):
        assert torch.equal(model.cos_sin[position, :4], (position * new).cos())
        assert torch.equal(model.cos_sin[position, 4:], (position * new).sin())


def test_k_scale_is_v_scale():
    """A checkpoint with one scale for both; the second is a copy."""
    model = nn.Module()
    model.k_scale = scalar(0.3)
    model.register_buffer("v_scale", model.k_scale.detach().clone(), persistent=False)
    model.v_scale_float = model.v_scale.item()
    assert set(exposed(model)) == {"v_scale", "v_scale_float"}
    assert_refused(model, "v_scale")
    derive(model, "v_scale", lambda scale: scale, of=["k_scale"])
    derive(model, "v_scale_float", lambda scale: scale.item(), of=["v_scale"])
    wanted = reloaded(model)["k_scale"]
    assert torch.equal(model.v_scale, wanted)
    assert model.v_scale_float == wanted.item()


def test_fnuz_halving():
    """The values of e4m3fnuz are half of those of the same bits, so each scale is doubled."""
    model = nn.Module()
    model.weight_scale = nn.Parameter(torch.rand(4), requires_grad=False)

    def double_in_place(model):
        model.weight_scale.data.mul_(2)

    assert audit(model, double_in_place).of("compounded") == ("weight_scale",)
    derive(model, "scale", lambda scale: 2 * scale, of=["weight_scale"])
    assert not audit(model, lambda model: None)
    wanted = 2 * reloaded(model)["weight_scale"]
    assert torch.equal(model.scale, wanted)


def test_cached_params_dict():
    """A dict of parameters, made before processing put another Parameter in place."""
    model = nn.Module()
    model.proj = linear(4, 6)
    model._cached_params_dict = dict(model.named_parameters())
    model.proj.weight = nn.Parameter(2 * model.proj.weight.detach() + 1)
    name = "_cached_params_dict['proj.weight']"
    assert exposed(model) == {name: "another tensor under the name of proj.weight"}
    assert_refused(model, name)
    derive(model, name, lambda weight: weight, of=["proj.weight"])
    wanted = reloaded(model)["proj.weight"]
    assert torch.equal(model._cached_params_dict["proj.weight"], wanted)
    assert torch.equal(model.proj.weight, wanted)


@pytest.mark.parametrize("mode", ["buffered", "undo_log", "double_buffer", "direct"])
def test_a_parents_view_of_a_childs_parameter(mode):
    model = nn.Module()
    model.child = linear(4, 6)
    model.weight_t = model.child.weight.data.t()
    (view,) = (entry for entry in census(model).entries if entry.names == ("weight_t",))
    assert view.shares == ("child.weight",)
    for _ in range(3):
        new = new_weights(model)
        reload(model, new, mode, progress=False, on_stale="raise")
        assert torch.equal(model.weight_t, new["child.weight"].t())
        assert model.weight_t.data_ptr() == model.child.weight.data_ptr()


def test_a_deleted_parameters_name():
    def process(model):
        turned = model.proj.weight.data.t().contiguous()
        del model.proj.weight
        model.proj.weight = turned

    lost = nn.Sequential()
    lost.proj = linear(4, 6)
    assert audit(lost, process_once(process)).of("gone") == ("proj.weight",)
    model = nn.Module()
    model.proj = linear(4, 6)
    for seed in range(3):
        restore(model)
        wanted = torch.full((4, 6), float(seed))
        load(model, {"proj.weight": wanted}, progress=False)
        with keeping(model.proj):
            process(model)
        assert torch.equal(model.proj.weight, wanted.t())


def process_once(process):
    """The processing for a model that has the parameter, as engines ask before they process."""
    return lambda model: process(model) if "weight" in model.proj._parameters else None


def test_a_tensor_in_a_closure():
    model = nn.Module()
    model.proj = linear(4, 6)

    def activation(halved):
        return lambda x: x @ halved

    model.act = activation(model.proj.weight.detach() / 2)
    assert exposed(model) == {"act<halved>": "a multiple of proj.weight"}
    assert_refused(model, "act<halved>")
    derive(model, "act<halved>", lambda weight: weight / 2, of=["proj.weight"])
    wanted = reloaded(model)["proj.weight"] / 2
    assert torch.equal(model.act(torch.eye(4)), wanted)


def test_a_tensor_in_a_dict():
    model = nn.Module()
    model.proj = linear(4, 4)
    model.tables = {"inverse": [model.proj.weight.detach().inverse()]}
    assert exposed(model) == {"tables['inverse'][0]": "the inverse of proj.weight"}
    assert_refused(model, "tables['inverse'][0]")
    derive(model, "tables['inverse'][0]", torch.linalg.inv, of=["proj.weight"])
    new = reloaded(model)["proj.weight"]
    torch.testing.assert_close(model.tables["inverse"][0] @ new, torch.eye(4), atol=1e-4, rtol=0)


@dataclass(frozen=True, slots=True)
class Absorbed:
    """The product of two weights."""

    matrix: torch.Tensor


def test_a_tensor_in_a_dataclass():
    model = nn.Module()
    model.q, model.k = linear(4, 6), linear(6, 5)
    model.absorbed = Absorbed((model.q.weight @ model.k.weight).detach())
    relation = "the matrix product of q.weight and k.weight"
    assert exposed(model) == {"absorbed.matrix": relation}
    assert_refused(model, "absorbed.matrix")
    derive(model, "absorbed.matrix", torch.matmul, of=["q.weight", "k.weight"])
    new = reloaded(model)
    wanted = torch.einsum("ij,jk->ik", new["q.weight"], new["k.weight"])
    torch.testing.assert_close(model.absorbed.matrix, wanted)
