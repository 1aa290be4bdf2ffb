"""A checkpoint that does not fit is an error that says what and where, and the model is as before."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fixpass.weights import GATE_UP, GATED_EXPERTS, QKV, Mapping, load
from helpers.checkpoints import assert_refused, model_of, two


def test_a_wrong_shape_is_refused_with_both_layouts():
    stored = {"b": torch.ones(2), "a": torch.ones(3, 4)}
    assert_refused(
        two(), stored, "'a' (f32[3, 4] in a state dict) does not fit into 'a', f32[4, 3]"
    )


@pytest.mark.parametrize("shape", [(), (12,), (1, 4, 3), (4, 4), (4, 0)])
def test_no_shape_is_bent_to_fit(shape):
    assert_refused(two(), {"b": torch.ones(2), "a": torch.ones(shape)}, "does not fit")


def test_all_faults_are_listed_together_and_many_are_counted():
    model = model_of(**{f"w{i}": torch.zeros(2) for i in range(30)})
    stored = {f"w{i}": torch.zeros(3) for i in range(30)}
    said = assert_refused(model, stored, "'w0' (f32[3]")
    assert said.splitlines()[-1] == "and 20 more"


def test_another_float_dtype_is_refused_without_a_cast():
    stored = {"b": torch.ones(2), "a": torch.ones(4, 3, dtype=torch.bfloat16)}
    assert_refused(two(), stored, "cast=True rounds to the parameter's dtype")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("scale", [{}, {"a_scale": torch.ones(1)}])
def test_a_float_parameter_takes_no_quantised_values(dtype, cast, scale):
    stored = {"b": torch.ones(2), "a": torch.ones(4, 3).to(dtype), **scale}
    assert_refused(two(), stored, "mean nothing without their scale", cast=cast)


def test_integers_and_floats_are_not_each_others():
    stored = {"b": torch.ones(2), "a": torch.ones(4, 3, dtype=torch.int64)}
    assert_refused(two(), stored, "one is not the other's dtype", cast=True)


def test_a_truncated_shard_changes_nothing(tmp_path):
    save_file({"b": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(4, 3)}, tmp_path / "2.safetensors")
    os.truncate(tmp_path / "2.safetensors", 70)
    assert_refused(two(), tmp_path, "2.safetensors: not a valid safetensors file")


def test_a_missing_shard_changes_nothing(tmp_path):
    save_file({"b": torch.ones(2)}, tmp_path / "1.safetensors")
    places = {"weight_map": {"b": "1.safetensors", "a": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(places))
    assert_refused(two(), tmp_path, "names 2.safetensors and there is no such file")


def gated():
    model = nn.Module()
    model.experts = model_of(gate_up_proj=torch.zeros(3, 4, 2), down_proj=torch.zeros(3, 2, 2))
    return model


def stored_experts(indices):
    parts = ("gate_proj", "up_proj", "down_proj")
    return {f"experts.{e}.{p}.weight": torch.full((2, 2), e + 1.0) for e in indices for p in parts}


EXPERTS = Mapping(experts=(GATED_EXPERTS,))


def test_an_expert_that_is_missing_is_named():
    said = assert_refused(gated(), stored_experts([0, 2]), "missing:", mapping=EXPERTS)
    assert "experts.down_proj (nothing is stored for expert 1)" in said
    assert "experts.gate_up_proj (nothing is stored for expert 1, part 0 of 2 and 1 more)" in said


def test_an_expert_renamed_past_the_end_is_refused():
    said = "is expert 10 and 'experts.down_proj' has 3 experts"
    assert_refused(gated(), stored_experts([0, 10, 2]), said, mapping=EXPERTS)


def test_an_expert_stored_under_two_names_is_refused():
    stored = stored_experts(range(3)) | {"experts.01.down_proj.weight": torch.ones(2, 2)}
    said = "are for the same place of 'experts.down_proj'"
    assert_refused(gated(), stored, said, mapping=EXPERTS)


def test_a_half_of_an_expert_that_is_missing_is_named():
    stored = stored_experts(range(3))
    del stored["experts.1.up_proj.weight"]
    assert_refused(gated(), stored, "expert 1, part 1 of 2", mapping=EXPERTS)


def test_what_is_there_of_a_stack_is_loaded_at_the_lowest_level_only():
    model = model_of(gate_up_proj=torch.zeros(4, 2))
    stored, mapping = {"up_proj": torch.ones(2, 2)}, Mapping(stacked=(GATE_UP,))
    assert_refused(model, stored, "part 0 of 2", mapping=mapping)
    load(model, stored, mapping=mapping, strict="none")
    assert model.gate_up_proj.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_a_part_whose_place_nobody_knows_is_reported_and_not_guessed():
    model, mapping = model_of(qkv_proj=torch.zeros(8, 2)), Mapping(stacked=(QKV,))
    stored = {"q_proj": torch.ones(4, 2), "v_proj": torch.ones(2, 2)}
    report = load(model, stored, mapping=mapping, strict="none")
    assert model.qkv_proj[:4].eq(1).all()
    assert model.qkv_proj[4:].eq(0).all()
    assert [skipped.name for skipped in report.skipped] == ["v_proj"]


def test_parts_that_do_not_fill_a_stack_are_refused():
    model, mapping = model_of(qkv_proj=torch.zeros(9, 2)), Mapping(stacked=(QKV,))
    stored = {f"{name}_proj": torch.ones(2, 2) for name in "qkv"}
    assert_refused(model, stored, "part 0 of 3 along dim 0 into 'qkv_proj'", mapping=mapping)
