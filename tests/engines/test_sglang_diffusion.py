"""SGLang's diffusion side on CPU: sharded on two ranks, its look-up of keywords, what it compiles."""

import importlib
import os
import warnings

import pytest
import sglang_workers

from fixpass.integrations.sglang import diffusion as integration
from helpers.ranks import Ranks

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]
PLUGINS = "sglang.multimodal_gen.runtime.platforms.plugins"


@pytest.fixture(scope="module")
def registry():
    """The diffusion side's hooks, applied as in its workers."""
    os.environ["FIXPASS"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plugins = importlib.import_module(PLUGINS)
        plugins.apply_plugin_hooks()
    yield plugins.HookRegistry
    del os.environ["FIXPASS"]


def test_every_hook_that_cpu_uses_is_in_place(registry):
    assert registry._patched == {hook.target for hook in integration.diffusion_hooks()[-3:]}


def test_a_step_gets_the_keywords_that_it_really_takes(registry):
    from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage

    def strict(sample, eta=1):
        return sample

    def step(sample, **kwargs):
        return strict(sample, **kwargs)

    stage = object.__new__(DenoisingStage)
    assert stage.prepare_extra_func_kwargs(step, {"eta": 1, "unknown": 2}) == {"eta": 1}


def test_what_it_compiles_is_compiled_with_fixpass(registry):
    from sglang.multimodal_gen.runtime.utils.torch_compile import resolve_torch_compile_kwargs

    kwargs, _ = resolve_torch_compile_kwargs("SGLANG_TORCH_COMPILE_MODE", default="default")
    assert kwargs["backend"] == "fixpass"


@pytest.mark.parametrize("switch", ["", "1"])
def test_a_sharded_model_keeps_the_loaders_of_its_parameters_with_fixpass(switch):
    with Ranks(2, seconds=400) as ranks:
        results = ranks.run(sglang_workers.shard, switch)
    for loaders, units, close, patched in results:
        assert loaders == (["theirs"] * 4 if switch else [None] * 4)
        assert units == ["", "blocks.0", "blocks.1"]
        assert close
        assert len(patched) == (3 if switch else 0)
