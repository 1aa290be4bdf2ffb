"""Which modules are units: conditions on names and classes, and who decides."""

import diffusers
import pytest
import torch
from torch import nn

from fixpass import FixpassError
from fixpass import sharding as s
from helpers import sharded_models, sharding_page

# The names of a Gemma2 and of a diffusion model, and what the conditions say to them.
CASES = {
    "is_layer": ("model.layers.3", "model.layers.3.mlp"),
    "is_block": ("blocks.0", "blocks.0.attn"),
    "is_t5_block": ("encoder.block.1", "encoder.block.1.layer.0"),
    "is_transformer_block": ("transformer_blocks.5", "single_transformer_blocks.5"),
    "is_double_block": ("double_blocks.0", "double_blocks"),
    "is_single_block": ("single_blocks.11", "single_blocks.x"),
    "is_refiner_block": ("txt_in.refiner_blocks.0", "refiner_blocks.0.norm1"),
    "is_blocks_or_double_blocks": ("double_blocks.0", "single_blocks.0"),
    "is_blocks_or_transformer_blocks": ("transformer_blocks.0", "layers.0"),
    "is_zimage_layer": ("context_refiner.0", "blocks.0"),
    "is_embed_tokens": ("model.embed_tokens", "model.embed_tokens_extra"),
    "is_embeddings": ("text_model.embeddings", "text_model.embeddings.position"),
    "is_shared": ("shared", "not_shared"),
    "is_final_norm": ("model.norm", "model.layers.0.input_layernorm"),
    "is_final_layer_norm": ("text_model.final_layer_norm", "layers.0.final_layer_norm"),
    "is_txt_in": ("txt_in", "txt_in.proj"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_condition_holds_for_its_modules_and_nothing_deeper(name):
    condition, module = s.CONDITIONS[name], nn.Identity()
    matched, other = CASES[name]
    assert condition(matched, module)
    assert not condition(other, module)


def test_entries_are_numbered_children_of_the_container_itself():
    is_entry, module = s.entry_of("layers"), nn.Identity()
    assert is_entry("model.layers.0", module)
    for name in ("layers", "layers.0.norm", "layers.0.mlp.0", "0", "", "sublayers.0", "layers.a"):
        assert not is_entry(name, module)
    assert s.entry_of("a", "b")("b.1", module)


@pytest.mark.parametrize("container", ["layers", "noise_refiner", "context_refiner"])
def test_numbered_children_at_any_depth_are_within_a_container(container):
    holds, module = s.CONDITIONS["is_zimage_layer"], nn.Identity()
    for below in ("0", "0.mlp.0", "12.attention.to_out.0"):
        assert holds(f"{container}.{below}", module)
        assert holds(f"model.{container}.{below}", module)
        assert not holds(f"transformer_blocks.{below}", module)
        assert not holds(f"sub{container}.{below}", module)
    for below in ("0.mlp", "attention"):
        assert not holds(f"{container}.{below}", module)


def test_former_names_are_the_same_conditions_and_warn():
    for name, condition in s.CONDITIONS.items():
        with pytest.warns(
            DeprecationWarning, match=f"use fixpass.sharding.CONDITIONS\\['{name}'\\]"
        ):
            assert getattr(s, name) is condition
    with pytest.warns(DeprecationWarning, match="ENCODERS"):
        assert s.ENCODERS["t5"] == s.T5_ENCODER
    with pytest.warns(DeprecationWarning, match="entry_of"):
        assert s.is_module_list_entry("blocks.1", "blocks")
    with pytest.warns(DeprecationWarning, match="entry_of"):
        assert not s.is_module_list_entry_in("blocks.1.norm", ("a", "blocks"))
    with pytest.raises(AttributeError, match="no attribute 'is_nothing'"):
        s.is_nothing  # noqa: B018


@pytest.mark.parametrize("name", sharded_models.SPECS)
def test_a_real_class_resolves_to_its_rule_and_units(name):
    spec, model = sharded_models.SPECS[name], sharded_models.build(name)
    conditions, rule = s.resolve_shard_conditions(model)
    assert (rule, len(s.shard_units(model, conditions))) == (spec.rule, spec.units)


def test_gemma2_has_one_final_norm_and_not_every_norm():
    model = sharded_models.build("Gemma2Model")
    units = s.shard_units(model, s.ENCODERS["text"])
    assert units == ("embed_tokens", "layers.0", "layers.1", "norm")


def test_t5_and_clip_encoders_resolve_with_their_conditions():
    t5 = s.shard_units(sharded_models.build("T5EncoderModel"), s.ENCODERS["t5"])
    # The embedding is tied to one outside `shared`, and stays with the root.
    assert t5 == ("encoder.block.0", "encoder.block.1", "encoder.final_layer_norm")
    clip = s.shard_units(sharded_models.build("CLIPTextModel"), s.ENCODERS["clip"])
    assert [name.rpartition(".")[2] for name in clip] == ["embeddings", "0", "1"]


def test_explicit_conditions_come_first_and_none_means_fallback():
    model = sharded_models.build("LlamaModel")
    given = (s.named("embed_tokens"),)
    assert s.resolve_shard_conditions(model, given) == (given, "explicit")
    for empty in (None, [], ()):
        assert s.resolve_shard_conditions(model, empty)[1] == "block-class"


def test_the_class_is_found_behind_wrappers():
    model = torch.compile(sharded_models.build("LlamaModel"), backend="eager")
    conditions, rule = s.resolve_shard_conditions(model)
    assert rule == "block-class"
    assert s.shard_units(model, conditions) == ("_orig_mod.layers.0", "_orig_mod.layers.1")


def test_conditions_compose():
    model = sharded_models.build("Qwen3Model")
    condition = s.any_of(s.class_named({"Qwen3MLP"}), s.named("norm"))
    assert s.shard_units(model, (condition,)) == ("layers.0.mlp", "layers.1.mlp", "norm")


def test_an_embedding_that_the_head_is_tied_to_stays_with_the_root():
    model = sharded_models.build("Qwen3ForCausalLM")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert s.shard_units(model, (s.entry_of("layers"), s.named("embed_tokens"))) == (
        "model.layers.0",
        "model.layers.1",
    )


def test_nothing_matched_is_an_error_that_lists_the_containers():
    model = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    conditions, rule = s.resolve_shard_conditions(model)
    assert rule == "common-numbered-block"
    with pytest.raises(FixpassError, match=r"AutoencoderKLWan.*encoder\.down_blocks \(\d+\)"):
        s.shard_units(model, conditions)


def test_the_table_of_the_docs_is_what_the_models_resolve_to():
    page = sharding_page.PAGE.read_text()
    assert sharding_page.table() in page, "run `make sharding-page`"
