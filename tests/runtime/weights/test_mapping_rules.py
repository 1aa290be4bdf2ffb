"""Rules of a mapping: experts stacked in the file, transposed tensors, one value for all slots."""

import pytest
import torch
from safetensors.torch import save_file

from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.load import load
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.mapping_rules import (
    GATED_EXPERTS,
    QKV,
    ExpertPart,
    Experts,
    Stacked,
    TensorParallel,
)
from fixpass.runtime.weights.parameter_layout import logical, set_layout
from helpers.checkpoints import holder


def loaded(model, stored, mapping, source, folder):
    """The model's parameters after a load from memory or from a file."""
    if source == "file":
        save_file(stored, folder / "model.safetensors")
        stored = folder
    load(model, stored, mapping=mapping, progress=False)
    return dict(model.named_parameters())


@pytest.fixture(params=["memory", "file"])
def source(request):
    return request.param


EXPERTS = Experts((ExpertPart("weight", "{leaf}", "w1"),))


def test_a_stacked_tensor_is_split_by_index(source, tmp_path):
    model = holder(experts__0__weight=(4, 6), experts__1__weight=(4, 6))
    x = torch.randn(2, 4, 6)
    mapping = Mapping(experts=(EXPERTS,))
    got = loaded(model, {"experts.weight": x}, mapping, source, tmp_path)
    assert torch.equal(got["experts.0.weight"], x[0])
    assert torch.equal(got["experts.1.weight"], x[1])


@pytest.mark.parametrize("transposed", [False, True])
def test_gate_and_up_of_a_stacked_tensor_go_to_each_expert(transposed, source, tmp_path):
    names = {
        f"mlp__experts__{i}__{part}_proj__weight": (4, 6)
        for i in range(3)
        for part in ("gate", "up")
    }
    model = holder(**names)
    x = torch.randn(3, 8, 6)
    stored = {"mlp.experts.gate_up_proj": x.mT.contiguous() if transposed else x}
    mapping = Mapping(experts=(GATED_EXPERTS,), transposed=("*gate_up_proj",) * transposed)
    got = loaded(model, stored, mapping, source, tmp_path)
    for i in range(3):
        assert torch.equal(got[f"mlp.experts.{i}.gate_proj.weight"], x[i, :4])
        assert torch.equal(got[f"mlp.experts.{i}.up_proj.weight"], x[i, 4:])


def test_a_rank_takes_its_experts_of_a_stacked_tensor(source, tmp_path):
    model = holder(experts__0__weight=(4, 6), experts__1__weight=(4, 6))
    x = torch.randn(6, 4, 6)
    mapping = Mapping(experts=(Experts(EXPERTS.parts, first=2, count=2),))
    got = loaded(model, {"experts.weight": x}, mapping, source, tmp_path)
    assert torch.equal(got["experts.0.weight"], x[2])
    assert torch.equal(got["experts.1.weight"], x[3])


def test_an_expert_of_a_stacked_tensor_that_no_parameter_takes_is_unexpected():
    model = holder(experts__0__weight=(4, 6))
    stored = {"experts.weight": torch.ones(2, 4, 6)}
    with pytest.raises(CheckpointError, match=r"unexpected: experts.weight\[1\]"):
        load(model, stored, mapping=Mapping(experts=(EXPERTS,)), progress=False)


def test_a_parameter_with_a_loader_of_its_own_gets_its_expert():
    model = holder(experts__0__weight=(4, 6), experts__1__weight=(4, 6))
    for param in model.parameters():
        param.weight_loader = lambda param, tensor, name, shard_id, expert_id: param.copy_(tensor)
    x = torch.randn(2, 6, 4)
    mapping = Mapping(experts=(EXPERTS,), transposed=("experts.weight",))
    load(model, {"experts.weight": x}, mapping=mapping, progress=False)
    assert [p.tolist() for p in model.parameters()] == x.mT.tolist()


@pytest.mark.parametrize("layout", [None, "aiter_16x16"])
def test_a_square_tensor_is_transposed_where_the_mapping_says_so(layout, source, tmp_path):
    model = holder(a=(32, 32), b=(32, 32))
    if layout:
        set_layout(model.a, layout)
    stored = {"a": torch.randn(32, 32), "b": torch.randn(32, 32)}
    loaded(model, stored, Mapping(transposed=("a",)), source, tmp_path)
    assert torch.equal(logical(model.a), stored["a"].t())
    assert torch.equal(model.b, stored["b"])


def test_the_parts_of_a_stack_and_the_slice_of_a_rank_may_be_transposed(source, tmp_path):
    model = holder(qkv_proj__weight=(6, 8), o_proj__weight=(8, 3))
    parts = {f"{part}_proj.weight": torch.randn(8, 2) for part in "qkv"}
    out = torch.randn(6, 8)
    parallel = TensorParallel(1, 2, (("o_proj.weight", 1),))
    mapping = Mapping(stacked=(QKV,), transposed=("*_proj.weight",), tensor_parallel=parallel)
    got = loaded(model, parts | {"o_proj.weight": out}, mapping, source, tmp_path)
    assert torch.equal(got["qkv_proj.weight"], torch.cat([p.t() for p in parts.values()]))
    assert torch.equal(got["o_proj.weight"], out.t()[:, 3:])


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_of_a_fused_checkpoint_fills_all_slots(shape, source, tmp_path):
    model = holder(qkv_proj__input_scale=(3,))
    stored = {"qkv_proj.input_scale": torch.full(shape, 0.5)}
    mapping = Mapping(stacked=(QKV,), broadcast=("*.input_scale",))
    got = loaded(model, stored, mapping, source, tmp_path)
    assert got["qkv_proj.input_scale"].tolist() == [0.5] * 3


def test_without_the_rule_one_scale_does_not_fill_three_slots():
    model = holder(qkv_proj__input_scale=(3,))
    stored = {"qkv_proj.input_scale": torch.ones(())}
    with pytest.raises(CheckpointError, match=r"does not fit into 'qkv_proj.input_scale'"):
        load(model, stored, mapping=Mapping(stacked=(QKV,)), progress=False)


def test_the_scale_of_each_expert_fills_both_of_its_slots(source, tmp_path):
    model = holder(experts__w13_scale=(2, 2))
    stored = {f"experts.{i}.w13.scale": torch.tensor(float(i)) for i in range(2)}
    experts = Experts((ExpertPart("w13", "w13_{leaf}", "w13"),))
    mapping = Mapping(experts=(experts,), broadcast=("*w13_scale",))
    got = loaded(model, stored, mapping, source, tmp_path)
    assert got["experts.w13_scale"].tolist() == [[0, 0], [1, 1]]


def test_the_scales_of_parts_still_go_to_their_slots_with_a_broadcast():
    model = holder(qkv_proj__input_scale=(3,))
    stored = {f"{part}_proj.input_scale": torch.tensor(float(i)) for i, part in enumerate("qkv")}
    mapping = Mapping(stacked=(Stacked("qkv_proj", QKV.parts),), broadcast=("*scale",))
    load(model, stored, mapping=mapping, progress=False)
    assert model.qkv_proj.input_scale.tolist() == [0, 1, 2]
