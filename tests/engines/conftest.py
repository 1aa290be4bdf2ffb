"""Tests of an engine are collected where that engine is installed: FIXPASS_TEST_ENGINE names it.

What SGLang lacks on CPU is put in place here, before a test imports it.
"""

import importlib
import os
import sys
import warnings
from pathlib import Path

import pytest

ENGINE = os.environ.get("FIXPASS_TEST_ENGINE", "")

collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if not ENGINE or not path.name.startswith(f"test_{ENGINE}")
]

if ENGINE == "sglang":
    HERE = Path(__file__).resolve().parent
    # For its workers, and then for this process, which has started without them.
    os.environ["PYTHONPATH"] = f"{HERE / 'sglang_stubs'}:{HERE}"
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    sys.path[:0] = os.environ["PYTHONPATH"].split(":")
    importlib.import_module("sglang_start")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("sglang.srt.layers.layernorm")
        importlib.import_module("sglang.srt.model_loader.loader")


@pytest.fixture(scope="session")
def engines(tmp_path_factory):
    """Engines of vLLM, each run once."""
    from vllm_engines import Engines

    return Engines(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def fixpass_on(monkeypatch):
    """What SGLang's `load_plugins` does with our entry point, undone afterwards."""
    from sglang.srt.plugins.hook_registry import HookRegistry, _propagate_patch

    from fixpass.integrations.sglang import serving as integration
    from fixpass.integrations.sglang.hooks import resolved

    held = []
    for hook in integration.serving_hooks():
        path, _, name = hook.target.rpartition(".")
        owner = resolved(path)
        if name in vars(owner):
            held.append((owner, name, vars(owner)[name]))

    def switch():
        monkeypatch.setenv("FIXPASS", "1")
        HookRegistry.reset()
        integration.plugin()
        HookRegistry.apply_hooks()
        return HookRegistry

    yield switch
    HookRegistry.reset()
    for owner, name, raw in held:
        hooked = getattr(owner, name)
        setattr(owner, name, raw)
        # The registry has put the hook into modules that had imported the function, too.
        _propagate_patch(hooked, getattr(owner, name), owner)


@pytest.fixture
def on_rocm(monkeypatch):
    """SGLang's layers as they are on ROCm with aiter, its kernels being stand-ins.

    Functions of their own, since SGLang puts a hook wherever the hooked object is imported.
    """
    import torch
    from sglang.srt.layers import layernorm
    from sglang.srt.models import utils

    from helpers.standins import aiter_add, aiter_layer_norm, aiter_rms_norm

    kernels = {
        "rms_norm": lambda *args: aiter_rms_norm(*args),
        "fused_add_rms_norm": lambda *args: aiter_add(*args),
        "layer_norm": lambda *args: aiter_layer_norm(*args),
    }
    for name, kernel in kernels.items():
        monkeypatch.setattr(layernorm, name, kernel, raising=False)
    for flag in ("_use_aiter", "_has_vllm_rms_norm", "_has_aiter_layer_norm"):
        monkeypatch.setattr(layernorm, flag, True)
    monkeypatch.setattr(utils, "_is_cpu", False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
