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
    from sglang.srt.plugins.hook_registry import HookRegistry

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
        setattr(owner, name, raw)
