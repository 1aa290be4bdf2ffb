"""Folded weights in vLLM: the backend that is handed to torch.compile, and the copies of a reload.

A stand-in of vLLM's configuration and of its reload is enough; tests/engines runs the real engine.
"""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from test_vllm_plugin import configured, engine, other, said  # noqa: F401  # fixtures
from torch import nn
from torch.nn.functional import linear

from fixpass import last_reports, weights
from fixpass.integrations.vllm import engine_config as plugin
from helpers.folding import aiter

RELOAD = "vllm.model_executor.model_loader.reload"


class Tiles(nn.Module):
    """A layer whose kernel would read tiles; here the tiles are taken for a plain weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 256), requires_grad=False)

    def forward(self, x):
        return linear(x, weights.shuffle_weight(self.weight, "aiter_16x16"))


def backend_of(compilation):
    return compilation.init_backend(None, prefix="model")


@pytest.fixture
def switched_on(engine, monkeypatch):  # noqa: F811
    monkeypatch.setenv("FIXPASS", "1")
    plugin.register()
    plugin.register()
    return engine


def compiled(module, compilation):
    backend, options = backend_of(compilation), {}
    # As vLLM does: no guard is asked.
    options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    return torch.compile(module, backend=backend, options=options, fullgraph=True, dynamic=False)


@torch.no_grad()
def test_weights_are_folded_in_the_mode_that_traces_once(switched_on):
    module, x = Tiles(), torch.randn(3, 256)
    run = compiled(module, configured(switched_on))
    for value in (None, torch.randn(512, 256), torch.randn(512, 256)):
        if value is not None:
            # Of this write torch tells nobody.
            module.weight.data.copy_(value)
        torch.testing.assert_close(run(x), linear(x, aiter(module.weight)))
    *_, remark = [r for report in last_reports() for r in report.of_pass("fold-weights")]
    assert remark.text.startswith("fixpass.shuffle_weight of weight kept as f32[512, 256]")


@pytest.mark.parametrize(
    ("environ", "mode", "found"),
    [
        ({}, "DYNAMO_TRACE_ONCE", "FoldingBackend"),
        ({"FIXPASS_FOLD_WEIGHTS": "off"}, "DYNAMO_TRACE_ONCE", "str"),
        ({"FIXPASS": "0"}, "DYNAMO_TRACE_ONCE", "str"),
    ],
)
def test_the_backend_is_ours_where_weights_may_be_folded(
    switched_on, monkeypatch, environ, mode, found
):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert type(backend_of(configured(switched_on, mode=mode))).__name__ == found


def test_vllms_own_compile_mode_is_left_as_it_is(switched_on):
    compilation = configured(switched_on, mode="VLLM_COMPILE", platform="cuda")
    assert backend_of(compilation).name == "vLLM's own"


def test_another_plugins_hook_of_the_backend_is_named_and_the_rest_works(
    engine,  # noqa: F811
    said,  # noqa: F811
    monkeypatch,
):
    from vllm.config import CompilationConfig

    monkeypatch.setenv("FIXPASS", "1")
    theirs = CompilationConfig.init_backend = other(CompilationConfig.init_backend)
    plugin.register()
    plugin.register()
    assert CompilationConfig.init_backend is theirs
    (line,) = said
    assert "CompilationConfig.init_backend is other.<locals>.theirs of" in line
    assert line.endswith("not the engine's own: vLLM runs without fold-weights")
    assert configured(engine).inductor_compile_config != {}


# Reloads


def layer_and_info(module, value):
    """A layer of vLLM's in the middle of a reload: its parameters stand aside, new ones are here."""
    kept = {"weight": module.weight}
    del module.weight
    module.weight = nn.Parameter(value, requires_grad=False)
    return SimpleNamespace(kernel_tensors=(kept, {}))


def test_a_reload_copies_into_the_fold(switched_on):
    module = Tiles()
    weight = module.weight
    weights.set_layouts(module, {"weight": "aiter_16x16"})
    backend_of(configured(switched_on))
    layerwise = import_module(f"{RELOAD}.layerwise")
    for _ in range(3):
        value, version = torch.randn(512, 256), weight._version
        layerwise._copy_and_restore_kernel_tensors(module, layer_and_info(module, value))
        assert module.weight is weight
        assert torch.equal(weight, aiter(value))
        assert weight._version > version, "torch is told of it"


def test_a_reload_that_nobody_hooked_copies_over_the_fold(engine):  # noqa: F811
    module = Tiles()
    weights.set_layouts(module, {"weight": "aiter_16x16"})
    value = torch.randn(512, 256)
    layerwise = import_module(f"{RELOAD}.layerwise")
    layerwise._copy_and_restore_kernel_tensors(module, layer_and_info(module, value))
    assert torch.equal(module.weight, value)


def test_values_in_vllms_own_layout_are_copied_into_the_fold_too(switched_on):
    module = nn.ModuleDict({"folded": Tiles(), "plain": Tiles()})
    weights.set_layouts(module, {"folded.weight": "aiter_16x16"})
    backend_of(configured(switched_on))
    look_up, value = (
        import_module(f"{RELOAD}.inplace").get_parameter_for_reload,
        torch.randn(512, 256),
    )
    for name in ("folded", "plain"):
        look_up(module, f"{name}.weight").copy_(value)
    assert torch.equal(module["folded"].weight, aiter(value))
    assert torch.equal(module["plain"].weight, value)
    assert look_up(module, "plain.weight") is module["plain"].weight


def test_a_model_that_loads_into_its_parameters_loads_into_the_fold(switched_on):
    module, value = Tiles(), torch.randn(512, 256)
    weights.set_layouts(module, {"weight": "aiter_16x16"})
    backend_of(configured(switched_on))
    loader = import_module("vllm.model_executor.models.utils").AutoWeightsLoader(module)
    version = module.weight._version
    loader.load_weights([("weight", value)])
    assert torch.equal(module.weight, aiter(value))
    assert module.weight._version > version


def test_vllms_ahead_of_time_compile_is_left_as_it_is(switched_on, said, monkeypatch):  # noqa: F811
    monkeypatch.setattr("vllm.envs.VLLM_USE_AOT_COMPILE", True)
    assert backend_of(configured(switched_on)) == "inductor"
    (line,) = said
    assert line == "fixpass: VLLM_USE_AOT_COMPILE is on: vLLM runs without fold-weights"


def test_a_place_that_moved_is_named_once_and_the_others_are_hooked(switched_on, said):  # noqa: F811
    layerwise, inplace = (import_module(f"{RELOAD}.{name}") for name in ("layerwise", "inplace"))
    del layerwise._copy_and_restore_kernel_tensors
    for _ in range(2):
        backend_of(configured(switched_on))
    (line,) = said
    assert f"{RELOAD}.layerwise:_copy_and_restore_kernel_tensors is None, not a function" in line
    assert line.endswith("what it writes does not go by the records of folds")
    assert inplace.get_parameter_for_reload.__wrapped__
