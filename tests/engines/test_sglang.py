"""SGLang itself on CPU: the hooks are in place, its norms and its reloads come out right.

Kernels of aiter are stand-ins that check their contract, under the names by which SGLang has them:
without fixpass they are given what the real ones would read out of bounds.
"""

import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": f"{HERE / 'sglang_stubs'}:{HERE}"}
# Before SGLang is imported, here and in its workers.
os.environ.update(ENVIRONMENT)
sys.path[:0] = ENVIRONMENT["PYTHONPATH"].split(":")

importlib.import_module("sglang_start")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sglang
    from sglang.srt.layers import layernorm
    from sglang.srt.model_loader import loader
    from sglang.srt.plugins import hook_registry

import tiny  # noqa: E402
from standins import LayoutFault, aiter_add, aiter_layer_norm, aiter_rms_norm  # noqa: E402

from fixpass.integrations import sglang as integration  # noqa: E402
from fixpass.integrations.sglang_hooks import is_in_place, resolved  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]
FP8 = torch.float8_e4m3fn


def bf16(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def on_rocm(monkeypatch):
    """SGLang's layers as they are on ROCm with aiter, its kernels being stand-ins.

    Functions of their own, since SGLang puts a hook wherever the hooked object is imported.
    """
    monkeypatch.setattr(layernorm, "_use_aiter", True)
    monkeypatch.setattr(layernorm, "_has_vllm_rms_norm", True)
    monkeypatch.setattr(layernorm, "_has_aiter_layer_norm", True)
    monkeypatch.setattr(layernorm, "rms_norm", lambda *args: aiter_rms_norm(*args), raising=False)
    monkeypatch.setattr(
        layernorm, "fused_add_rms_norm", lambda *args: aiter_add(*args), raising=False
    )
    monkeypatch.setattr(
        layernorm, "layer_norm", lambda *args: aiter_layer_norm(*args), raising=False
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


@pytest.fixture
def fixpass_on(monkeypatch):
    """What `load_plugins` does with our entry point, undone afterwards."""
    held = {}
    for hook in integration.serving_hooks():
        path, _, name = hook.target.rpartition(".")
        try:
            owner = resolved(path)
            held[hook.target] = (owner, name, vars(owner)[name])
        except (KeyError, AttributeError):
            continue

    def switch():
        monkeypatch.setenv("FIXPASS", "1")
        registry = hook_registry.HookRegistry
        registry.reset()
        integration.plugin()
        registry.apply_hooks()
        return registry

    yield switch
    hook_registry.HookRegistry.reset()
    for owner, name, raw in held.values():
        setattr(owner, name, raw)


def norm(hidden=128):
    module = layernorm.RMSNorm(hidden).bfloat16()
    module.weight.data = bf16(hidden, seed=9)
    return module


def test_every_hook_is_in_place(on_rocm, fixpass_on):
    registry = fixpass_on()
    targets = {hook.target for hook in integration.serving_hooks()}
    assert targets <= registry._patched
    assert len(targets) == 6
    for target, hooks in registry._hooks.items():
        for _, run, _ in hooks:
            assert is_in_place(integration.Hook(target, "AROUND", run))


def test_without_aiter_there_is_nothing_to_guard(fixpass_on):
    assert fixpass_on()._patched == {
        f"{integration.LOADER}.device_loading_context",
        f"{integration.LOADER}.DefaultModelLoader.restore_weights_before_loading",
    }


def strided_heads():
    """q and k of a packed projection: (tokens, heads, 128)."""
    packed = bf16(5, 3072)
    return packed[:, :2048].view(5, 16, 128), packed[:, 2048:2560].view(5, 4, 128)


FAULTS = {
    "2-D x, 3-D residual": lambda: (bf16(6, 128), bf16(2, 3, 128, seed=1)),
    "an empty batch": lambda: (bf16(2, 0, 128), None),
    "an empty batch with a residual": lambda: (bf16(2, 0, 128), bf16(2, 0, 128)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_aiter_path_faults_without_fixpass_and_is_right_with_it(on_rocm, fixpass_on, name):
    x, residual = FAULTS[name]()
    rms = norm()
    with pytest.raises(LayoutFault):
        rms.forward_aiter(x, residual)
    fixpass_on()
    got = rms.forward_aiter(x, residual)
    out, total = got if residual is not None else (got, None)
    want_total = x if residual is None else x + residual.reshape(x.shape)
    assert out.shape == x.shape
    assert torch.equal(out.reshape(-1, 128), expected(want_total.reshape(-1, 128), rms))
    if residual is not None:
        assert total.shape == residual.shape
        assert torch.equal(total.reshape(x.shape), want_total)


def expected(rows, rms):
    return aiter_rms_norm(rows, rms.weight, rms.variance_epsilon) if rows.numel() else rows


def test_strided_q_and_k_are_normalised_through_the_aiter_path(on_rocm, fixpass_on):
    """SGLang 0.5.23 copies them itself, and is right without us too; it stays right."""
    rms = norm()
    fixpass_on()
    for x in strided_heads():
        got = rms.forward_aiter(x)
        assert got.shape == x.shape
        assert torch.equal(got.reshape(-1, 128), expected(x.reshape(-1, 128), rms))


def test_strided_q_and_k_reach_the_kernel_as_they_are_called_directly(on_rocm, fixpass_on):
    """As models call the kernel by itself, and as SGLang did before it copied."""
    q, _ = strided_heads()
    rms = norm()
    with pytest.raises(LayoutFault):
        layernorm.rms_norm(q, rms.weight, 1e-6)
    fixpass_on()
    got = layernorm.rms_norm(q, rms.weight, 1e-6)
    assert torch.equal(got.reshape(-1, 128), aiter_rms_norm(q.reshape(-1, 128), rms.weight, 1e-6))


def test_a_padded_norm_of_3_d_input_keeps_its_shape(on_rocm, fixpass_on):
    rms = norm()
    rms.x_pad_to_multiple = 256

    def padded(x, weight, eps, residual, multiple):
        out = torch.nn.functional.pad(aiter_rms_norm(x, weight, eps), (0, multiple - x.shape[-1]))
        return out if residual is None else (out, x + residual)

    rms._fused_pad_kernel = padded
    x = bf16(2, 3, 128)
    assert rms.forward_aiter(x).shape == (6, 256)
    fixpass_on()
    assert rms.forward_aiter(x).shape == (2, 3, 256)


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
    assert hooked(log) == [[]] * 2
    found, log = serve(folders, FIXPASS="1")
    assert found == [want, other]
    assert want != other
    # On CPU there is no aiter to guard; the weights are kept at the first load and at the update.
    assert hooked(log) == [sorted(hook.target for hook in integration.serving_hooks()[-2:])] * 2
    for folder, tokens in zip(folders, found, strict=True):
        assert tokens == greedy(folder)


def hooked(log):
    """The hooks that the worker had at each load."""
    lines = [line for line in log.splitlines() if line.startswith("HOOKED ")]
    return [json.loads(line.removeprefix("HOOKED ")) for line in lines]


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


def test_an_unsupported_version_is_said_once_and_hooks_nothing(monkeypatch, fixpass_on):
    said = []
    monkeypatch.setattr(integration, "say_once", said.append)
    monkeypatch.setattr(sglang, "__version__", "0.7.1")
    assert not fixpass_on()._hooks
    (text,) = said
    assert text == "fixpass works with SGLang 0.5, and this is 0.7.1: SGLang runs without fixpass"


def test_the_environment_is_the_one_that_the_page_names():
    assert sglang.__version__ == "0.5.23"
    assert os.environ.get("FIXPASS") in (None, "1")
