"""Real models, sharded on two gloo ranks and loaded from a checkpoint on disk, give what they gave."""

import pytest
import torch
from safetensors.torch import save_file

from helpers import attribute_workers, sharded_models
from helpers import sharding_workers as workers
from helpers.ranks import Ranks

# One of each kind here, all of them in `make test-full`.
QUICK = (
    "SanaTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "T5EncoderModel",
    "Qwen3ForCausalLM",
    "NemotronHForCausalLM",
)


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("unpacked")
    save_file(workers.unpacked(workers.model_of()), path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.full)
        for name in sharded_models.SPECS
    ],
)
def test_a_real_model_is_sharded_and_loaded_and_gives_the_same_output(two, name, tmp_path):
    spec = sharded_models.SPECS[name]
    sharded_models.build(name).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    runs = name in sharded_models.INPUTS or name in sharded_models.TRANSFORMERS
    for result in two.run(workers.load_sharded, name, tmp_path):
        assert result == {
            "rule": spec.rule,
            "units": spec.units,
            "lost": [],
            "unsharded": [],
            "wrong": [],
            "skipped": 0,
            "equal": True if runs else None,
        }


def test_a_tensor_parallel_loader_runs_on_a_weight_that_is_sharded_already(two):
    assert two.run(workers.own_loaders_on_shards) == [(False, True)] * 2


def test_parameters_that_a_forward_left_gathered_are_loaded_too(two, folder):
    assert two.run(workers.load_after_a_forward, folder) == [(True, True)] * 2


def test_a_state_dict_of_shards_is_loaded_shard_by_shard(two):
    for equal, refused in two.run(workers.load_of_a_sharded_state_dict):
        assert equal
        assert "of which this rank holds another part than it needs" in refused
        assert "give its full_tensor()" in refused


def test_a_dcp_folder_of_two_ranks_is_loaded_on_one_and_on_two(two, tmp_path):
    assert two.run(workers.load_of_a_dcp_folder, tmp_path / "dcp") == [(True, True)] * 2


def test_norms_keep_their_dtype_beside_blocks_in_bfloat16(two):
    (kept, seen, dtype), _ = two.run(workers.mixed_precision)
    assert kept == ("blocks.0.norm", "blocks.1.norm", "norm")
    assert seen["blocks.0.norm"][0] == torch.float32
    assert seen["blocks.0.up"] == (torch.bfloat16, torch.bfloat16)
    assert dtype == torch.float32


def test_a_method_besides_forward_gathers_parameters(two):
    assert two.run(workers.other_methods) == [True, True]


def test_tensor_parallelism_on_another_mesh_dimension(folder):
    with Ranks(4) as four:
        for units, lost, wrong, difference in four.run(
            workers.load_on_two_dimensions, folder, 2, 2
        ):
            assert units == ("blocks.0", "blocks.1")
            assert (lost, wrong) == ([], [])
            assert difference < 1e-6


def to_bfloat16(model):
    model.to(torch.bfloat16)


def to_double_and_back(model):
    model.double().float()


@pytest.mark.parametrize("convert", [to_bfloat16, to_double_and_back])
def test_attributes_stay_through_conversions_of_a_sharded_model(two, convert):
    dtype = torch.bfloat16 if convert is to_bfloat16 else torch.float32
    for lost, later, changed, now in two.run(
        attribute_workers.attributes_through_conversions, convert
    ):
        assert lost == ["norm.weight"]  # its mark was changed, and stays changed
        assert (later, changed) == ("set after sharding", "changed after sharding")
        assert now == dtype


@pytest.mark.parametrize("shards", [False, True])
def test_loaders_that_were_set_before_tensor_parallelism_are_called(shards):
    with Ranks(4) as four:
        for called, wrong, lost in four.run(
            attribute_workers.loaders_before_tensor_parallelism, shards
        ):
            assert called == ["attribute"] * 2 + ["property"] * 2
            assert (wrong, lost) == ([], [])


@pytest.mark.inductor
@pytest.mark.parametrize("kind", ["fsdp", "tensor-parallel"])
def test_a_sharded_model_compiles_with_fixpass(two, kind):
    for difference, reports in two.run(workers.compiled, kind):
        assert difference < 1e-5
        assert reports > 0
