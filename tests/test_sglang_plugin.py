"""SGLang's plugin against a stand-in of what it hooks: in place, taken back, or said why not."""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fixpass.integrations.sglang import diffusion as diffusion
from fixpass.integrations.sglang import hooks as sglang_hooks
from fixpass.integrations.sglang import serving as serving
from fixpass.integrations.sglang.hooks import Hook, is_in_place
from helpers import sglang_standin
from helpers.standins import LayoutFault, aiter_rms_norm

LAYERNORM, LOADER = serving.LAYERNORM, serving.LOADER
REGISTRY = "sglang.srt.plugins.hook_registry"
DIFFUSION = "sglang.multimodal_gen.runtime"
CPU = torch.device("cpu")


@pytest.fixture
def engine(monkeypatch):
    """The stand-in, with fixpass switched on in its environment."""
    monkeypatch.setenv("FIXPASS", "1")
    return sglang_standin.install(monkeypatch)


@pytest.fixture
def said(monkeypatch):
    """What is warned of, once each."""
    found = []
    monkeypatch.setattr(sglang_hooks.log, "warning", lambda text, *args: found.append(text % args))
    sglang_hooks.say_once.cache_clear()
    yield found
    sglang_hooks.say_once.cache_clear()


def start(engine, plugin=serving.plugin, registry=REGISTRY):
    """What SGLang does in each process: call the plugins, then apply their hooks."""
    plugin()
    found = engine(registry).HookRegistry
    found.apply_hooks()
    return found


def bf16(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


def test_every_hook_is_in_place_and_nothing_is_said(engine, said):
    registry = start(engine)
    hooks = serving.serving_hooks()
    assert registry._patched == {hook.target for hook in hooks}
    assert len(hooks) == 7
    for target, entries in registry._hooks.items():
        assert is_in_place(Hook(target, "AROUND", entries[0][1]))
    assert said == []
    # The step that applies hooks is SGLang's own again.
    assert "apply_hooks" not in vars(registry)


def test_without_the_switch_nothing_is_hooked(engine, monkeypatch):
    monkeypatch.delenv("FIXPASS")
    assert start(engine)._hooks == {}


def test_guards_can_be_left_out_alone(engine, monkeypatch):
    monkeypatch.setenv("FIXPASS_EAGER_KERNELS", "off")
    targets = start(engine)._patched
    assert targets == {
        f"{LOADER}.device_loading_context",
        f"{LOADER}.DefaultModelLoader.restore_weights_before_loading",
    }


def test_without_aiter_its_kernels_are_not_missed(engine, said):
    engine(LAYERNORM)._use_aiter = False
    assert len(start(engine)._patched) == 2
    assert said == []


@pytest.mark.parametrize(
    ("module", "name"),
    [(LAYERNORM, "fused_add_rms_norm"), (LOADER, "device_loading_context")],
)
def test_a_target_that_moved_is_named_and_the_other_hooks_stay(engine, said, module, name):
    delattr(engine(module), name)
    registry = start(engine)
    assert len(registry._patched) == 6
    (text,) = said
    assert text.startswith(f"fixpass: {module}.{name} is not where it was")
    assert text.endswith(f"SGLang runs without the hook of {module}.{name}")


def test_a_flag_that_moved_takes_the_norms_hooks_back_by_name(engine, said):
    del engine(LAYERNORM)._use_aiter
    assert len(start(engine)._patched) == 2
    assert len(said) == 5
    assert all("_use_aiter" in text for text in said)


def test_a_module_that_moved_takes_its_hooks_back(engine, said, monkeypatch):
    monkeypatch.setitem(sys.modules, LOADER, None)
    del engine("sglang.srt.model_loader").loader
    assert len(start(engine)._patched) == 5
    assert len(said) == 2


def test_another_plugin_at_the_same_place_is_said_once_and_has_it(engine, said):
    target = f"{LAYERNORM}.rms_norm"
    calls = []

    def theirs(original, *args):
        calls.append(args)
        return original(*args)

    source = SimpleNamespace(plugin_name="other")
    registry = engine(REGISTRY).HookRegistry
    serving.plugin()
    registry.register(target, theirs, sglang_standin.HookType.AROUND, source=source)
    registry.apply_hooks()
    assert said == [
        f"fixpass: another plugin (other) hooks {target} too: SGLang runs without the hook of {target}"
    ]
    assert [entry[1] for entry in registry._hooks[target]] == [theirs]
    engine(LAYERNORM).rms_norm(bf16(6, 128), bf16(128), 1e-6)
    assert len(calls) == 1


def test_a_hook_that_sglang_failed_to_apply_is_noticed(engine, said, monkeypatch):
    registry = engine(REGISTRY).HookRegistry
    monkeypatch.setattr(registry, "apply_hooks", lambda: None)
    start(engine)
    assert len(said) == 7
    assert all("is not in place: SGLang runs without it" in text for text in said)


def test_an_unsupported_version_hooks_nothing_and_says_so_once(engine, said):
    engine("sglang").__version__ = "0.7.0"
    for _ in range(2):
        assert start(engine)._hooks == {}
    assert said == [
        "fixpass: fixpass works with SGLang 0.5, and this is 0.7.0: SGLang runs without fixpass"
    ]


@pytest.mark.parametrize("plugin", [serving.plugin, diffusion.plugin])
def test_a_missing_engine_is_said_once(monkeypatch, said, plugin):
    monkeypatch.setenv("FIXPASS", "1")
    monkeypatch.setitem(sys.modules, "sglang", None)
    plugin()
    plugin()
    (text,) = said
    assert "nothing to switch fixpass on in" in text


OPERANDS = {
    "2-D x, 3-D residual": ((6, 128), (2, 3, 128)),
    "an empty batch": ((2, 0, 128), None),
    "an empty batch with a residual": ((2, 0, 128), (2, 0, 128)),
}


@pytest.mark.parametrize("shapes", OPERANDS.values(), ids=OPERANDS)
def test_the_aiter_path_faults_without_fixpass_and_is_right_with_it(engine, shapes):
    x, residual = (None if shape is None else bf16(*shape) for shape in shapes)
    norm = engine(LAYERNORM).RMSNorm(128)
    with pytest.raises(LayoutFault):
        norm.forward_aiter(x, residual)
    start(engine)
    got = norm.forward_aiter(x, residual)
    out, total = got if residual is not None else (got, x)
    summed = x if residual is None else x + residual.reshape(x.shape)
    assert out.shape == x.shape
    assert total.shape == (x if residual is None else residual).shape
    assert torch.equal(total.reshape(x.shape), summed)
    if x.numel():
        assert torch.equal(out, aiter_rms_norm(summed, norm.weight, 1e-6))


def test_strided_heads_reach_the_kernel_as_rows(engine):
    heads = bf16(5, 3072)[:, 256:1280].view(5, 8, 128)
    kernels, weight = engine(LAYERNORM), bf16(128)
    with pytest.raises(LayoutFault):
        kernels.rms_norm(heads, weight, 1e-6)
    start(engine)
    got = kernels.rms_norm(heads, weight, 1e-6)
    want = aiter_rms_norm(heads.reshape(-1, 128), weight, 1e-6)
    assert torch.equal(got.reshape(-1, 128), want)


def test_a_padded_norm_keeps_the_shape_of_its_rows(engine):
    start(engine)
    norm = engine(LAYERNORM).RMSNorm(128, pad=128)
    assert norm.forward_aiter(bf16(2, 3, 128)).shape == (2, 3, 256)


class Transposes:
    """A method of quantisation that transposes the weight, as compressed tensors does."""

    undone = 0

    def process_weights_after_loading(self, layer):
        layer.weight = nn.Parameter(layer.weight.t(), requires_grad=False)

    def restore_weights_before_loading(self, layer):
        self.undone += 1


def test_weights_are_processed_and_loaded_again_and_again(engine):
    start(engine)
    loader = engine(LOADER).DefaultModelLoader
    model = nn.Sequential(nn.Linear(4, 6, bias=False))
    model[0].weight.weight_loader = "theirs"
    model[0].quant_method = method = Transposes()
    first = model[0].weight
    for step in range(3):
        loader.restore_weights_before_loading(model, CPU)
        model[0].weight.data.copy_(torch.full((6, 4), float(step)))
        loader.postprocess_weights(model, CPU)
        assert model[0].weight is first
        assert model[0].weight.weight_loader == "theirs"
        assert model[0].weight.shape == (4, 6)
        assert (model[0].weight == step).all()
    assert method.undone == 3


def test_the_diffusion_side_has_a_registry_of_its_own(engine, said):
    registry = start(engine, diffusion.plugin, f"{DIFFUSION}.platforms.plugins")
    assert len(registry._patched) == 3
    assert engine(REGISTRY).HookRegistry._hooks == {}
    assert said == []


def test_what_the_diffusion_side_compiles_is_compiled_with_fixpass(engine):
    start(engine, diffusion.plugin, f"{DIFFUSION}.platforms.plugins")
    resolve = engine(f"{DIFFUSION}.utils.torch_compile").resolve_torch_compile_kwargs
    kwargs, mode = resolve("SGLANG_TORCH_COMPILE_MODE", default="max-autotune-no-cudagraphs")
    assert kwargs["backend"] == "fixpass"
    assert kwargs["mode"] == mode == "max-autotune-no-cudagraphs"


def test_options_of_another_platform_go_to_inductor_and_its_backend_stays():
    given = {"backend": "inductor", "options": {"max_autotune": False}}
    changed, _ = diffusion.compile_with_us((given, None))
    assert changed["options"] == {"inductor": {"max_autotune": False}}
    npu = ({"backend": "torchair"}, None)
    assert diffusion.compile_with_us(npu) is npu


def strict(sample, *, generator=None):
    return sample, generator


def passes_on(sample, **kwargs):
    return strict(sample, **kwargs)


def takes_all(sample, eta, **kwargs):
    return sample, eta, dict(kwargs)


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (strict, {"generator"}),
        (passes_on, {"generator"}),
        (functools.partial(strict, 1), {"generator"}),
        (takes_all, {"generator", "eta", "unknown"}),
    ],
)
def test_a_step_gets_the_keywords_that_it_really_takes(engine, step, kept):
    start(engine, diffusion.plugin, f"{DIFFUSION}.platforms.plugins")
    stage = engine(f"{DIFFUSION}.pipelines_core.stages.denoising").DenoisingStage()
    given = {"generator": 1, "eta": 2, "unknown": 3}
    assert set(stage.prepare_extra_func_kwargs(step, given)) == kept


def test_a_forward_behind_cache_dit_is_the_plain_one():
    module = SimpleNamespace(_original_forward=strict)
    assert diffusion.keyword_names(None, None, functools.partial(takes_all, module)) == (
        False,
        frozenset({"sample", "generator"}),
    )
