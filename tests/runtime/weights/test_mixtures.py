"""Mixtures of experts of transformers, from checkpoints with scales that the models do not have."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixpass import FixpassError
from fixpass.weights import Mapping, load
from helpers import sharded_models

NAMES = [name for name in sharded_models.SPECS if name.startswith(sharded_models.MIXTURES)]
SCALES = ("input_scale", "weight_scale", "weight_scale_2")


def saved(name, folder, *, scales):
    """A checkpoint on disk as transformers writes it, with NVFP4-style scales beside each expert."""
    sharded_models.build(name).save_pretrained(folder, max_shard_size="20KB")
    added = 0
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        experts = [key for key in tensors if "expert" in key or "_linear" in key]
        for key in experts if scales else ():
            for scale in SCALES:
                tensors[key.replace(".weight", f".{scale}")] = torch.full((1,), 0.5)
                added += 1
        save_file(tensors, file)
    index = folder / "model.safetensors.index.json"
    places = {key: file.name for file in folder.glob("*.safetensors") for key in load_file(file)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return added


@pytest.mark.parametrize("name", NAMES)
def test_extra_scales_are_skipped_with_a_record_and_change_no_output(name, tmp_path):
    with_scales, without = tmp_path / "with", tmp_path / "without"
    added = saved(name, with_scales, scales=True)
    saved(name, without, scales=False)
    mapping = sharded_models.SPECS[name].mapping
    outputs, skipped = [], ()
    for folder in (without, with_scales):
        model = sharded_models.build(name, seed=1)
        said = pytest.warns(UserWarning, match="scales that no parameter takes: ")
        with said if folder == with_scales else contextlib.nullcontext():
            report = load(model, folder, mapping=mapping)
        outputs.append(sharded_models.forward(name, model))
        skipped = report.skipped
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0], sharded_models.forward(name, sharded_models.build(name)))
    assert added >= 6
    assert len(skipped) == added
    assert {record.branch for record in skipped} <= {"expert", "scale"}
    assert all(record.mapped.endswith(SCALES) for record in skipped)


def test_the_mapped_name_of_an_expert_scale_is_on_the_report(tmp_path):
    saved("MixtralForCausalLM", tmp_path, scales=True)
    model = sharded_models.build("MixtralForCausalLM", seed=1)
    mapping = sharded_models.SPECS["MixtralForCausalLM"].mapping
    with pytest.warns(UserWarning, match="scales that no parameter takes: "):
        report = load(model, tmp_path, mapping=mapping)
    found = {record.name: record for record in report.skipped}
    record = found["model.layers.0.block_sparse_moe.experts.3.w2.input_scale"]
    assert record.branch == "expert"
    assert record.mapped == "model.layers.0.mlp.experts.down_proj_input_scale"


def test_without_the_mapping_of_experts_nothing_is_guessed(tmp_path):
    saved("OlmoeForCausalLM", tmp_path, scales=False)
    model = sharded_models.build("OlmoeForCausalLM", seed=1)
    before = {name: param.clone() for name, param in model.named_parameters()}
    with pytest.raises(FixpassError, match="unexpected: model"):
        load(model, tmp_path, mapping=Mapping())
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_a_scale_that_the_model_has_and_the_checkpoint_has_not_is_an_error(tmp_path):
    saved("OlmoeForCausalLM", tmp_path, scales=False)
    model = sharded_models.build("OlmoeForCausalLM", seed=1)
    experts = model.model.layers[1].mlp.experts
    experts.down_proj_input_scale = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    mapping = sharded_models.SPECS["OlmoeForCausalLM"].mapping
    with pytest.raises(FixpassError, match=r"missing: .*\.1\.mlp\.experts\.down_proj_input_scale"):
        load(model, tmp_path, mapping=mapping)
    with pytest.warns(UserWarning, match="scales that were not loaded: .*down_proj_input_scale"):
        load(model, tmp_path, mapping=mapping, strict="none")
    saved("OlmoeForCausalLM", tmp_path, scales=True)
    with pytest.warns(UserWarning, match="scales that no parameter takes: ") as caught:
        report = load(model, tmp_path, mapping=mapping)
    assert len(caught) == 1
    assert experts.down_proj_input_scale.tolist() == [0.5] * 4
    assert all("1.mlp.experts.down_proj_input_scale" not in r.mapped for r in report.skipped)
