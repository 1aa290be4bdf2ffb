"""A checkpoint comes into a model by name, by stack and by expert, and the report says all of it."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fixpass.weights import (
    FUSED_EXPERTS,
    GATE_UP,
    GATED_EXPERTS,
    QKV,
    Experts,
    Mapping,
    load,
)
from helpers.checkpoints import assert_loaded, holder, mlp, zeroed


@pytest.fixture(params=["file", "glob", "dcp", "torch", "state dict", "iterator"])
def checkpoint(request, tmp_path):
    state = mlp().state_dict()
    match request.param:
        case "file":
            save_file(state, tmp_path / "w.safetensors")
            return tmp_path / "w.safetensors"
        case "glob":
            save_file(state, tmp_path / "w.safetensors")
            return str(tmp_path / "*.safetensors")
        case "dcp":
            dcp.save(state, checkpoint_id=tmp_path / "d", no_dist=True)
            return tmp_path / "d"
        case "torch":
            torch.save(state, tmp_path / "w.pt")
            return tmp_path / "w.pt"
        case "state dict":
            return state
        case "iterator":
            return iter(state.items())


def test_every_kind_of_checkpoint_loads_into_the_same_memory(checkpoint):
    wanted = mlp()
    model = zeroed(wanted)
    model[0].weight.mark = "kept"
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    report = load(model, checkpoint)
    assert_loaded(model, wanted)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert model[0].weight.mark == "kept"
    assert sorted(report.loaded) == sorted(wanted.state_dict())
    assert report.num_bytes == sum(t.nbytes for t in wanted.state_dict().values())
    assert report.seconds > 0


def test_names_are_those_without_wrappers():
    wanted = mlp()
    model = zeroed(wanted)
    model[0] = checkpoint_wrapper(model[0])
    load(torch.compile(model, backend="eager"), wanted.state_dict())
    assert torch.equal(model[0]._checkpoint_wrapped_module.weight, wanted[0].weight)


def test_q_k_and_v_of_unequal_sizes_stand_in_their_order():
    model = holder(attn__qkv_proj__weight=(8, 3))
    q, k, v = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2, 3)
    stored = {"attn.v_proj.weight": v, "attn.q_proj.weight": q, "attn.k_proj.weight": k}
    load(model, stored, mapping=Mapping(stacked=(QKV,)))
    assert torch.equal(model.attn.qkv_proj.weight, torch.cat([q, k, v]))


def test_a_stack_that_the_model_has_not_is_loaded_part_by_part():
    model = holder(attn__q_proj__weight=(4, 3))
    q = torch.randn(4, 3)
    load(model, {"attn.q_proj.weight": q}, mapping=Mapping(stacked=(QKV,)))
    assert torch.equal(model.attn.q_proj.weight, q)


def test_a_scale_of_each_part_goes_to_its_element():
    model = holder(mlp__gate_up_proj__weight_scale=(2,))
    stored = {"mlp.up_proj.weight_scale": torch.tensor(5.0)}
    stored["mlp.gate_proj.weight_scale"] = torch.tensor([3.0])
    load(model, stored, mapping=Mapping(stacked=(GATE_UP,)))
    assert model.mlp.gate_up_proj.weight_scale.tolist() == [3.0, 5.0]


def experts(count=12, size=3):
    torch.manual_seed(1)
    return {
        f"mlp.experts.{e}.{part}.weight": torch.randn(size, size)
        for e in range(count)
        for part in ("gate_proj", "up_proj", "down_proj")
    }


def test_experts_go_by_index_and_not_by_the_order_in_which_they_come():
    model = holder(mlp__experts__gate_up_proj=(12, 6, 3), mlp__experts__down_proj=(12, 3, 3))
    stored = experts()
    backwards = dict(sorted(stored.items(), reverse=True))
    load(model, backwards, mapping=Mapping(experts=(GATED_EXPERTS,)))
    for e in range(12):
        gate, up, down = (
            stored[f"mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")
        )
        assert torch.equal(model.mlp.experts.gate_up_proj[e], torch.cat([gate, up]))
        assert torch.equal(model.mlp.experts.down_proj[e], down)


def test_a_rank_takes_its_experts_and_skips_those_of_others():
    model = holder(mlp__experts__gate_up_proj=(4, 6, 3), mlp__experts__down_proj=(4, 3, 3))
    stored = experts()
    mine = Experts(GATED_EXPERTS.parts, first=4, count=4)
    report = load(model, stored, mapping=Mapping(experts=(mine,)))
    assert torch.equal(model.mlp.experts.down_proj[1], stored["mlp.experts.5.down_proj.weight"])
    assert {s.why for s in report.skipped} == {"another rank holds this expert"}
    assert len(report.skipped) == 8 * 3


def test_scales_of_experts_go_to_one_element_each():
    model = holder(experts__w13_input_scale=(2, 2), experts__w2_input_scale=(2,))
    stored = {
        f"experts.{e}.{part}.input_scale": torch.tensor(10.0 * e + i)
        for e in range(2)
        for i, part in enumerate(("gate_proj", "up_proj", "down_proj"))
    }
    load(model, stored, mapping=Mapping(experts=(FUSED_EXPERTS,)))
    assert model.experts.w13_input_scale.tolist() == [[0, 1], [10, 11]]
    assert model.experts.w2_input_scale.tolist() == [2, 12]


def test_an_expert_scale_without_a_target_is_skipped_and_recorded():
    model = holder(mlp__experts__down_proj=(1, 3, 3), mlp__experts__gate_up_proj=(1, 6, 3))
    stored = experts(1) | {"mlp.experts.0.down_proj.input_scale": torch.ones(())}
    said = "scales that no parameter takes: mlp.experts.0.down_proj.input_scale"
    with pytest.warns(UserWarning, match=said):
        (skipped,) = load(model, stored, mapping=Mapping(experts=(GATED_EXPERTS,))).skipped
    assert (skipped.mapped, skipped.branch) == ("mlp.experts.down_proj_input_scale", "expert")
    assert "mlp.experts.0.down_proj.input_scale -> mlp.experts.down_proj_input_scale" in str(
        skipped
    )


def test_a_scale_of_a_plain_module_without_a_target_is_skipped_too():
    wanted = mlp()
    stored = wanted.state_dict() | {"0.weight_scale": torch.ones(1)}
    with pytest.warns(UserWarning, match="scales that no parameter takes: 0.weight_scale"):
        (skipped,) = load(zeroed(wanted), stored).skipped
    assert (skipped.mapped, skipped.branch) == ("0.weight_scale", "scale")
