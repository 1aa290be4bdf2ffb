"""The checkpoint doctor: loads that failed elsewhere, made small from their names and shapes."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fixpass.cli import main
from fixpass.runtime.weights.doctor import check
from fixpass.runtime.weights.load import load
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.mapping_rules import (
    FUSED_EXPERTS,
    GATE_UP,
    MIXTRAL_EXPERTS,
    QKV,
    ExpertPart,
    Experts,
    Stage,
)
from helpers.checkpoints import holder

FP8 = torch.float8_e4m3fn


def meta(**shapes):
    return holder(**shapes).to("meta")


def stored(*names, shape=(), dtype=torch.float32):
    return {name: torch.ones(shape).to(dtype) for name in names}


def tied(extra=0.0, **stored):
    model = meta(embed__weight=(8, 4))
    model.lm_head = nn.Module()
    model.lm_head.weight = model.embed.weight
    weight = torch.arange(32.0).view(8, 4)
    return model, {"embed.weight": weight, "lm_head.weight": weight + extra, **stored}


MOE = Experts((ExpertPart("w1", "w13", "w1", (0, 2)), ExpertPart("w3", "w13", "w3", (1, 2))))
# (report, model, stored tensors, mapping, faults, a text of the diagnosis)
FAILED = {
    "sglang#24434": (
        meta(experts__w2_weight=(1, 4, 4)),
        stored("experts.0.down_proj.weight", shape=(4, 4))
        | stored("experts.0.down_proj.input_scale"),
        Mapping(experts=(FUSED_EXPERTS,)),
        [],
        "skipped (expert: the model has no such parameter): experts.0.down_proj.input_scale",
    ),
    "vllm#34293": (
        meta(self_attn__qkv_proj__weight=(12, 4), self_attn__attn__k_scale=()),
        stored(*(f"self_attn.{p}_proj.weight" for p in "qkv"), shape=(4, 4))
        | stored("self_attn.k_proj.k_scale"),
        Mapping(stacked=(QKV,)),
        ["nothing is stored for self_attn.attn.k_scale"],
        "Rename('.k_proj.k_scale', '.attn.k_scale', 'suffix')",
    ),
    "sglang#29151": (
        meta(qkv_proj__input_scale=(3,)),
        stored("qkv_proj.input_scale"),
        Mapping(stacked=(QKV,)),
        ["'qkv_proj.input_scale' (f32[] in a state dict) does not fit into"],
        "Mapping(broadcast=('qkv_proj.input_scale',))",
    ),
    "transformers#47031": (
        meta(experts__gate_up_proj=(2, 64, 64)),
        stored("experts.gate_up_proj", shape=(2, 64, 64)),
        Mapping(),
        [],
        "square, so that the shape does not show whether they are stored transposed, which "
        "Mapping(transposed=...) says: experts.gate_up_proj",
    ),
    "transformers#43201": (
        meta(experts__down=(8, 32, 12)),
        stored("experts.down", shape=(8, 12, 32)),
        Mapping(),
        ["'experts.down' (f32[8, 12, 32] in a state dict) does not fit"],
        "stored transposed? Mapping(transposed=('experts.down',))",
    ),
    "Megatron-LM#5844": (
        meta(experts__w13=(4, 6, 4)),
        stored(*(f"experts.{i}.w1.weight" for i in range(4)), shape=(3, 4)),
        Mapping(experts=(MOE,)),
        ["'experts.w13' is filled in part"],
        "",
    ),
    "Megatron-LM#5844, reverse": (
        meta(experts__0__w1__weight=(3, 4), experts__0__w3__weight=(3, 4)),
        stored("experts.w13", shape=(1, 6, 4)),
        Mapping(experts=(MOE,)),
        [],
        "",
    ),
    "sglang#26745": (
        meta(visual__a__weight=(4,), visual__b__weight=(4,), norm__weight=(4,)),
        stored("norm.weight", shape=(4,)),
        Mapping(),
        ["nothing is stored for visual.* (2 parameters)"],
        "",
    ),
    "vllm#53950": (
        meta(layers__0__mlp__down_proj__weight=(4, 4)),
        stored("layers.0.mlp.down_proj.weight", shape=(4, 4), dtype=FP8)
        | stored("layers.0.mlp.down_proj.weight_scale"),
        Mapping(),
        ["the checkpoint is quantised"],
        "and the model is plain: layers.0.mlp.down_proj.weight",
    ),
    "auto-round#2370": (
        meta(attn__attn__k_scale=(), attn__qkv__weight=(4, 4)),
        stored("attn.k_scale") | stored("attn.qkv.weight", shape=(4, 4)),
        Mapping(),
        ["nothing is stored for attn.attn.k_scale"],
        "Rename('attn.k_scale', 'attn.attn.k_scale')",
    ),
    "vllm#49420": (
        meta(fc__weight=(4, 4), fc__weight_scale=()),
        stored("fc.weight", shape=(4, 4)) | stored("fc.weight_quantizer.scale"),
        Mapping(),
        ["nothing is stored for fc.weight_scale"],
        "Rename('.weight_quantizer.scale', '.weight_scale', 'suffix')",
    ),
    "vllm-gaudi#1763": (
        *tied(**{"lm_head.weight_scale": torch.ones(())}),
        Mapping(),
        [],
        "skipped (tied: tied to embed.weight, which is loaded): lm_head.weight",
    ),
    "vllm#6758": (
        *tied(extra=1.0),
        Mapping(),
        ["are for one tied parameter, and their values differ"],
        "",
    ),
    "mlx-lm#1298": (*tied(), Mapping(), [], "tied to embed.weight, which is loaded"),
    "transformers#46402": (
        meta(detector__vision__weight=(5, 3)),
        stored("detector.vision_encoder.weight", shape=(5, 3)),
        Mapping(),
        [
            "nothing is stored for detector.vision.weight",
            "no parameter takes detector.vision_encoder.weight",
        ],
        "Rename('.vision_encoder.', '.vision.', 'inside')",
    ),
    **{
        name: (
            meta(fc__weight=(4,)),
            stored("fc.weight", shape=(4,)) | stored(name),
            Mapping(stacked=(QKV, GATE_UP)),
            [],
            f"(scale: the model has no such parameter): {name}",
        )
        for name in (
            "indexer.wq_b.weight_scale",
            "shared_experts.gate_up_proj.input_scale",
            "experts.w2_weight_scale",
            "mlp.down_proj.weight_scale",
            "self_attn.k_scale",
        )
    },
    "vllm#20202": (
        meta(experts__down_proj=(1, 4, 3)),
        stored("experts.0.w1.weight", "experts.0.w3.weight", shape=(3, 4))
        | stored("experts.0.w2.weight", shape=(4, 3)),
        Mapping(experts=(MIXTRAL_EXPERTS,)),
        [],
        "skipped (expert: the model has no such parameter): experts.0.w1.weight, "
        "experts.0.w3.weight",
    ),
    "vllm-ascend#12838": (
        meta(layers__0__qkv_proj__weight=(12, 4)),
        stored(*(f"layers.{i}.{p}_proj.weight" for i in (0, 1) for p in "qkv"), shape=(4, 4)),
        Mapping(stacked=(QKV,), stage=Stage(range(1))),
        [],
        "skipped (stage: another pipeline stage holds it): layers.1.q_proj.weight, "
        "layers.1.k_proj.weight, layers.1.v_proj.weight",
    ),
    "vllm#31849": (
        tied()[0],
        stored("embed.weight", shape=(8, 4)),
        Mapping(),
        [],
        "",
    ),
    "slime#1673": (
        meta(language_model__model__layers__0__weight=(4, 3), visual__weight=(4,)),
        stored("model.language_model.layers.0.weight", shape=(4, 3))
        | stored("visual.weight", shape=(4,)),
        Mapping(),
        [
            "nothing is stored for language_model.model.layers.0.weight",
            "no parameter takes model.language_model.layers.0.weight",
        ],
        "Rename('model.language_model.', 'language_model.model.')",
    ),
    "ao#2936": (
        meta(w=(4, 4)),
        stored("w:_weight_qdata", shape=(4, 4), dtype=torch.int8) | stored("w:_weight_scale"),
        Mapping(),
        ["nothing is stored for w", "no parameter takes w:_weight_qdata"],
        "quantised (torchao)",
    ),
}


@pytest.mark.parametrize("report", FAILED)
def test_a_load_that_failed_elsewhere_gets_the_right_diagnosis(report):
    model, tensors, mapping, faults, text = FAILED[report]
    found = check(tensors, model, mapping)
    assert len(found.faults) == len(faults)
    for fault, said in zip(found.faults, faults, strict=True):
        assert said in fault
    assert text in str(found)


@pytest.mark.filterwarnings("ignore:scales")
@pytest.mark.parametrize("report", FAILED)
def test_the_doctor_and_the_load_agree(report):
    model, tensors, mapping, faults, _ = FAILED[report]
    real = copy.deepcopy(model).to_empty(device="cpu")
    if "lm_head" in model._modules:
        real.lm_head.weight = real.embed.weight
    if not faults:
        load(real, tensors, mapping=mapping, progress=False)
        return
    with pytest.raises(ValueError, match=r".+"):
        load(real, tensors, mapping=mapping, progress=False)


def test_all_faults_come_at_once_and_alike_names_are_one_line():
    model = meta(**{f"layers__{i}__{name}__weight": (4, 3) for i in range(30) for name in "abc"})
    tensors = stored(*(f"layers.{i}.a.weight" for i in range(30)), shape=(4, 5))
    tensors |= stored(*(f"layers.{i}.b.weight" for i in range(30)), shape=(4, 3), dtype=torch.int32)
    found = check(tensors, model)
    assert len(found.faults) == 3
    assert found.faults[0].endswith("and 29 more like it")
    assert "one is not the other's dtype" in found.faults[1]
    assert found.faults[2] == "nothing is stored for layers.*.c.weight (30)"


def test_a_rename_leaves_tensors_alone_that_have_their_parameter():
    model = meta(a__up__weight=(4,), b__up__scale=(), c__down__weight=(4,))
    tensors = stored("a.up.weight", "c.up.weight", shape=(4,)) | stored("b.up.scale")
    (hint,) = [note for note in check(tensors, model).notes if "Rename" in note]
    assert "'c.up.weight' looks like 'c.down.weight'" in hint
    assert hint.endswith("Rename('c.up.weight', 'c.down.weight')?")


def test_the_memory_of_each_mode_is_said():
    note = check(stored("w", shape=(256,)), meta(w=(256,))).notes[-1]
    assert "besides the 1,024 bytes of the model" in note
    assert "buffered 1,024 bytes" in note


MODEL = """
import torch
from torch import nn
from fixpass.weights import Mapping, Rename

def model():
    assert torch.empty(1).is_meta
    return nn.Linear(3, 5, bias=False)

def mapping():
    return Mapping(renames=(Rename("old.", ""),))

def number():
    return 1
"""


def test_the_command_line_checks_a_file_against_a_meta_model(tmp_path, capsys):
    (tmp_path / "checked_model.py").write_text(MODEL)
    save_file({"old.weight": torch.ones(5, 3)}, tmp_path / "w.safetensors")
    words = ["check", str(tmp_path / "w.safetensors"), f"{tmp_path}/checked_model.py:model"]
    assert main(words) == 1
    assert "Rename('old.', '')" in capsys.readouterr().out
    assert main([*words, "--mapping", f"{tmp_path}/checked_model.py:mapping"]) == 0
    assert "1 stored tensors: no faults" in capsys.readouterr().out
    assert main([*words, "--mapping", f"{tmp_path}/checked_model.py:number"]) == 2
    assert "not a Mapping" in capsys.readouterr().err
