"""SGLang itself on CPU: weights are loaded again and again, and a tiny Llama is served."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from sglang.srt.model_loader import loader

from fixpass.integrations.sglang import serving as integration
from fixpass.weights import census

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]
HERE = Path(__file__).resolve().parent
FP8 = torch.float8_e4m3fn


def linear(strategy, static=False):
    """A linear layer of compressed tensors in FP8, as a model has it."""
    from compressed_tensors.quantization import QuantizationArgs
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsLinearMethod,
    )
    from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8

    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy)
    layer = torch.nn.Module()
    layer.scheme = CompressedTensorsW8A8Fp8(args, static)
    layer.quant_method = CompressedTensorsLinearMethod(None)
    layer.quant_method.create_weights(
        layer, 64, [16, 16], 64, 32, torch.bfloat16, weight_loader=load_into
    )
    return layer


def load_into(param, values):
    assert param.data.shape == values.shape, (param.data.shape, values.shape)
    param.data.copy_(values)


def fp8(seed):
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)).to(FP8)


def checkpoint(strategy, seed):
    scales = {"channel": (32, 1), "tensor": (2,)}[strategy]
    values = {"weight": fp8(seed), "weight_scale": torch.rand(scales) + seed + 1}
    if strategy == "tensor":
        # One scale in the file, as fused checkpoints have it: nothing is quantised again.
        values["weight_scale"][1] = torch.finfo(torch.float32).min
    return values


def load(model, values):
    for name, value in values.items():
        param = getattr(model.layer, name)
        param.weight_loader(param, value)


def bytes_of(x):
    return x.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_compressed_tensors_in_fp8_lose_their_loader_without_fixpass(strategy):
    model = torch.nn.Module()
    model.layer = linear(strategy)
    load(model, checkpoint(strategy, 0))
    loader.DefaultModelLoader.postprocess_weights(model, torch.device("cpu"))
    with pytest.raises(AttributeError, match="weight_loader"):
        load(model, checkpoint(strategy, 1))


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_compressed_tensors_in_fp8_are_loaded_three_times_with_fixpass(fixpass_on, strategy):
    fixpass_on()
    model = torch.nn.Module()
    model.layer = linear(strategy)
    first, cls = model.layer.weight, type(model.layer.weight)
    cpu = torch.device("cpu")
    for seed in range(3):
        values = checkpoint(strategy, seed)
        loader.DefaultModelLoader.restore_weights_before_loading(model, cpu)
        assert model.layer.weight.shape == (32, 64)
        load(model, values)
        loader.DefaultModelLoader.postprocess_weights(model, cpu)
        weight = model.layer.weight
        assert weight is first
        assert type(weight) is cls
        assert (weight.input_dim, weight.output_dim) == (1, 0)
        assert weight.weight_loader is load_into
        assert weight.stride() == (1, 64)
        assert torch.equal(bytes_of(weight.data.t()), bytes_of(values["weight"]))
        scale = values["weight_scale"]
        want = scale.max() if strategy == "tensor" else scale
        assert torch.equal(model.layer.weight_scale, want)


def test_a_second_load_is_what_a_fresh_layer_computes(fixpass_on):
    fixpass_on()
    cpu = torch.device("cpu")
    models = []
    for seeds in ((0, 1), (1,)):
        model = torch.nn.Module()
        model.layer = linear("channel")
        for seed in seeds:
            torch.manual_seed(seed)
            loader.DefaultModelLoader.restore_weights_before_loading(model, cpu)
            load(model, checkpoint("channel", seed))
            loader.DefaultModelLoader.postprocess_weights(model, cpu)
        models.append(model.layer)
    again, fresh = (layer.weight.float() * layer.weight_scale.t() for layer in models)
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_a_census_finds_nothing_stale_after_a_second_load_but_a_copy_of_ours(fixpass_on, strategy):
    fixpass_on()
    cpu, model, found = torch.device("cpu"), torch.nn.Module(), []
    model.layer = linear(strategy)
    for seed in range(2):
        loader.DefaultModelLoader.restore_weights_before_loading(model, cpu)
        load(model, checkpoint(strategy, seed))
        loader.DefaultModelLoader.postprocess_weights(model, cpu)
        if seed == 0:
            model.kept = model.layer.weight_scale.detach().clone()
        found.append(census(model))
    assert [entry.names for entry in found[1].stale_since(found[0])] == [("kept",)]


def test_an_empty_update_changes_nothing(fixpass_on):
    fixpass_on()
    model = torch.nn.Module()
    model.layer = linear("channel")
    cpu = torch.device("cpu")
    load(model, checkpoint("channel", 0))
    loader.DefaultModelLoader.postprocess_weights(model, cpu)
    want = bytes_of(model.layer.weight.data).clone()
    loader.DefaultModelLoader.restore_weights_before_loading(model, cpu)
    loader.DefaultModelLoader.postprocess_weights(model, cpu)
    assert torch.equal(bytes_of(model.layer.weight.data), want)


def shuffle(x, layout=(16, 16)):
    """What aiter's `shuffle_weight` does to a weight of one byte an element."""
    grid = x.view(x.shape[0] // 16, 16, x.shape[1] // 32, 2, 16)
    return grid.permute(0, 2, 3, 1, 4).contiguous().view(x.shape)


def test_a_weight_that_aiter_shuffles_is_loaded_three_times_and_updated_with_nothing(
    fixpass_on, monkeypatch
):
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_fp8 as scheme,
    )

    monkeypatch.setattr(scheme, "_use_aiter", True)
    monkeypatch.setattr(scheme, "shuffle_weight", shuffle, raising=False)
    fixpass_on()
    model, cpu = torch.nn.Module(), torch.device("cpu")
    model.layer = linear("channel")
    first = model.layer.weight
    places = set()
    for seed in (0, 1, None, 2):
        loader.DefaultModelLoader.restore_weights_before_loading(model, cpu)
        if seed is not None:
            values = checkpoint("channel", seed)
            load(model, values)
        loader.DefaultModelLoader.postprocess_weights(model, cpu)
        assert model.layer.weight is first
        want = shuffle(values["weight"])
        assert torch.equal(bytes_of(model.layer.weight.data), bytes_of(want))
        places.add(model.layer.weight.data_ptr())
    assert len(places) == 1


def serve(folders, **environment):
    """Tokens of SGLang's CPU engine for each checkpoint, and what it logged."""
    inherited = {name: value for name, value in os.environ.items() if name != "FIXPASS"}
    environment = {**inherited, **environment}
    command = [sys.executable, str(HERE / "sglang_serve.py"), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("TOKENS ")), done.stderr + done.stdout


def test_a_tiny_llama_is_served_and_updated_with_the_plugin_on(tmp_path):
    folders = [tiny.write("llama", tmp_path / str(seed), seed=seed) for seed in range(2)]
    (want, other), log = serve(folders)
    assert said(log, "HOOKED") == [[]] * 2
    found, log = serve(folders, FIXPASS="1")
    assert found == [want, other]
    assert want != other
    # On CPU there is no aiter to guard; the weights are kept at the first load and at the update.
    hooks = sorted(hook.target for hook in integration.serving_hooks()[-2:])
    assert said(log, "HOOKED") == [hooks] * 2
    # The test's own copy of a weight, and nothing of SGLang's.
    assert said(log, "STALE") == [[], [["kept"]]]
    for folder, tokens in zip(folders, found, strict=True):
        assert tokens == greedy(folder)


def said(log, what):
    """What the worker said about each load: its hooks, or what the load left stale."""
    lines = [line for line in log.splitlines() if line.startswith(f"{what} ")]
    return [json.loads(line.removeprefix(f"{what} ")) for line in lines]


def greedy(folder):
    """What transformers makes of the same prompts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for prompt in tiny.prompts(8, 24):
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        found.append(out[0, len(prompt) :].tolist())
    return found
