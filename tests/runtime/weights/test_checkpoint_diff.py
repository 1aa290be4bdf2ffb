"""Two checkpoints under two mappings; and a model written under the names of a checkpoint."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixpass.cli import main
from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.checkpoint_diff import diff, stored_tensors
from fixpass.runtime.weights.load import load
from fixpass.runtime.weights.mapping import Mapping
from fixpass.runtime.weights.mapping_rules import (
    FUSED_EXPERTS,
    GATED_EXPERTS,
    QKV,
    ExpertPart,
    Experts,
    Rename,
    TensorParallel,
)
from fixpass.runtime.weights.parameter_layout import set_layout
from helpers.checkpoints import holder

TRAINER = {
    "q_proj.weight": torch.randn(8, 4),
    "k_proj.weight": torch.randn(2, 4),
    "v_proj.weight": torch.randn(2, 4),
    **{f"experts.{i}.gate_proj.weight": torch.randn(3, 4) for i in range(2)},
    **{f"experts.{i}.up_proj.weight": torch.randn(3, 4) for i in range(2)},
    "old.norm": torch.randn(4),
}
FROM_TRAINER = Mapping((Rename("old.", ""),), stacked=(QKV,), experts=(FUSED_EXPERTS,))


def engine():
    return {
        "qkv_proj.weight": torch.cat([TRAINER[f"{part}_proj.weight"] for part in "qkv"]),
        "experts.w13_weight": torch.stack(
            [
                torch.cat([TRAINER[f"experts.{i}.{part}_proj.weight"] for part in ("gate", "up")])
                for i in range(2)
            ]
        ),
        "norm": TRAINER["old.norm"].clone(),
    }


@pytest.mark.parametrize("sampled", [False, True])
def test_a_trainer_and_an_engine_have_the_same_weights_under_their_mappings(sampled, tmp_path):
    save_file(TRAINER, tmp_path / "trainer.safetensors")
    found = diff(
        tmp_path / "trainer.safetensors", engine(), (FROM_TRAINER, Mapping()), sampled=sampled
    )
    assert found.is_equal
    assert set(found.equal) == set(engine())


def test_a_difference_is_named_counted_and_measured():
    other = engine()
    other["qkv_proj.weight"][9, 1] += 0.5
    other["norm"] = other["norm"].bfloat16()
    del other["experts.w13_weight"]
    other["extra"] = torch.ones(1)
    found = diff(TRAINER, other, (FROM_TRAINER, Mapping()))
    by_name = {item.name: item.text for item in found.different}
    assert by_name["qkv_proj.weight"].startswith("1 of 48 values, by up to 0.5 ")
    assert by_name["norm"].startswith("torch.float32 and torch.bfloat16; ")
    assert (found.only_first, found.only_second) == (("experts.w13_weight",), ("extra",))
    assert not found.is_equal


def test_shapes_nan_and_missing_parts_are_differences():
    one, other = (
        {"a": torch.ones(4), "b": torch.ones(2, 3)},
        {"a": torch.ones(4), "b": torch.ones(3, 2)},
    )
    other["a"][2] = torch.nan
    texts = {item.name: item.text for item in diff(one, other).different}
    assert texts == {
        "a": "1 of 4 values, by up to inf where the largest is 1",
        "b": "f32[2, 3] and f32[3, 2]",
    }
    lacking = {name: tensor for name, tensor in TRAINER.items() if "k_proj" not in name}
    (item,) = diff(lacking, engine(), (FROM_TRAINER, Mapping())).different
    assert "nothing is stored for" in str(item)


def test_a_sample_does_not_read_everything():
    one = {"w": torch.zeros(1 << 16)}
    other = {"w": one["w"].clone()}
    other["w"][10000] = 1
    assert diff(one, other, sampled=True).is_equal
    other["w"][-1] = 1
    assert not diff(one, other, sampled=True).is_equal


def test_the_command_line_compares_two_files(tmp_path, capsys):
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"w": torch.full((4,), value)}, tmp_path / f"{name}.safetensors")
    words = ["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main(words) == 1
    assert "different: w: 4 of 4 values, by up to 1" in capsys.readouterr().out
    assert main([*words[:2], words[1], "--sampled"]) == 0
    assert "equal in the sampled values: 1" in capsys.readouterr().out


def engine_model():
    return holder(
        qkv_proj__weight=(12, 4), experts__w13_weight=(2, 6, 4), norm=(4,), rest__weight=(3, 3)
    )


def test_a_model_is_saved_under_the_names_that_it_was_loaded_from(tmp_path):
    model = engine_model()
    model.experts.w13_weight.data = torch.zeros(2, 6, 4)
    set_layout(model.experts.w13_weight, "up_gate")
    load(model, TRAINER, mapping=FROM_TRAINER, strict="none", progress=False)
    names = {name: torch.zeros_like(tensor) for name, tensor in TRAINER.items()}
    save_file(dict(stored_tensors(model, names, FROM_TRAINER)), tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    assert saved.keys() == TRAINER.keys()
    for name, tensor in TRAINER.items():
        assert torch.equal(saved[name], tensor)


def test_transposed_and_stacked_tensors_are_saved_as_they_were_stored():
    names = {
        f"experts__{i}__{part}_proj__weight": (3, 4) for i in (0, 1) for part in ("gate", "up")
    }
    model = holder(**names, o__weight=(4, 4), scale=(3,))
    stored = {
        "experts.gate_up_proj": torch.randn(2, 6, 4),
        "o.weight": torch.randn(4, 4),
        "scale": torch.tensor(0.5),
    }
    mapping = Mapping(experts=(GATED_EXPERTS,), transposed=("o.*",), broadcast=("scale",))
    load(model, stored, mapping=mapping, progress=False)
    saved = dict(stored_tensors(model, stored, mapping))
    assert all(torch.equal(saved[name], tensor) for name, tensor in stored.items())


def test_a_rank_that_holds_parts_cannot_save_a_whole_checkpoint():
    stored = {"w": torch.ones(4, 4)}
    parallel = Mapping(tensor_parallel=TensorParallel(0, 2, (("w", 0),)))
    with pytest.raises(CheckpointError, match="a rank holds parts"):
        dict(stored_tensors(holder(w=(2, 4)), stored, parallel))
    experts = Experts((ExpertPart("weight", "{leaf}", "w1"),), first=0, count=1)
    model = holder(experts__0__weight=(4, 4))
    with pytest.raises(CheckpointError, match=r"only parts of experts\.weight"):
        dict(
            stored_tensors(
                model, {"experts.weight": torch.ones(2, 4, 4)}, Mapping(experts=(experts,))
            )
        )
