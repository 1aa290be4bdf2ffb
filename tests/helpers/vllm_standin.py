"""A package `vllm` of a few lines on disk, with what fixpass's plugin touches of the real one.

Its configuration does what vLLM's does on CPU: vLLM's own compile mode, and any backend, become
Inductor in the mode that traces once. It compiles nothing and runs nothing.
"""

import importlib
import sys
from contextlib import contextmanager

from fixpass.integrations import vllm as integration

FILES = {
    "__init__": """
        __version__ = "0.32.0"
        from vllm.config.vllm import VllmConfig
    """,
    "config/__init__": "from vllm.config.vllm import CompilationConfig, CompilationMode, VllmConfig",
    "config/vllm": """
        from dataclasses import dataclass, field
        from enum import IntEnum
        from types import SimpleNamespace

        CompilationMode = IntEnum(
            "CompilationMode",
            [("NONE", 0), ("STOCK_TORCH_COMPILE", 1), ("DYNAMO_TRACE_ONCE", 2), ("VLLM_COMPILE", 3)],
        )

        @dataclass
        class CompilationConfig:
            backend: str = ""
            mode: CompilationMode | None = None
            ir_enable_torch_wrap: bool = False
            inductor_compile_config: dict = field(default_factory=dict)

            def init_backend(self, vllm_config, prefix="", is_encoder=False):
                if self.mode == CompilationMode.VLLM_COMPILE:
                    return SimpleNamespace(name="vLLM's own")
                return self.backend

        @dataclass
        class VllmConfig:
            compilation_config: CompilationConfig
            additional_config: dict = field(default_factory=dict)
            platform: str = "cpu"
            parallel_config = SimpleNamespace(world_size=2)

            def __post_init__(self):
                compilation = self.compilation_config
                compilation.backend = compilation.backend or "inductor"
                if compilation.mode is None:
                    compilation.mode = CompilationMode.VLLM_COMPILE
                if self.platform == "cpu" and compilation.mode == CompilationMode.VLLM_COMPILE:
                    compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE
                    if compilation.backend != "eager":
                        compilation.backend = "inductor"
    """,
    "compilation/__init__": "",
    "compilation/passes/__init__": "",
    "compilation/passes/inductor_pass": """
        from torch._inductor.custom_graph_pass import CustomGraphPass

        class InductorPass(CustomGraphPass):
            pass
    """,
    "platforms/__init__": """
        from types import SimpleNamespace
        current_platform = SimpleNamespace(device_type="cpu", pass_key="post_grad_custom_post_pass")
    """,
    "ir/__init__": "",
    "ir/op": """
        class IrOp:
            registry = {}
    """,
    "envs": "VLLM_USE_AOT_COMPILE = False",
    "model_executor/__init__": "",
    "model_executor/models/__init__": "",
    "model_executor/models/utils": """
        class AutoWeightsLoader:
            def __init__(self, module):
                self.module = module

            def load_weights(self, weights):
                for name, value in weights:
                    self.module.get_parameter(name).data.copy_(value)
    """,
    "model_executor/model_loader/__init__": "",
    "model_executor/model_loader/reload/__init__": "",
    "model_executor/model_loader/reload/layerwise": """
        def _copy_and_restore_kernel_tensors(layer, info):
            for held in info.kernel_tensors:
                for name, tensor in held.items():
                    tensor.data.copy_(getattr(layer, name))
            for name, param in info.kernel_tensors[0].items():
                delattr(layer, name)
                layer.register_parameter(name, param)
    """,
    "model_executor/model_loader/reload/inplace": """
        def get_parameter_for_reload(model, name):
            return model.get_parameter(name)
    """,
    "distributed/__init__": "",
    "distributed/parallel_state": "_groups = {}",
    "distributed/device_communicators/__init__": "",
    "distributed/device_communicators/cpu_communicator": """
        class _CPUSHMDistributed:
            def __init__(self, handle):
                self.handle = handle

        class CpuCommunicator:
            def __init__(self, handle):
                self.dist_module = _CPUSHMDistributed(handle)
    """,
}


def write(folder):
    """Write the package into `folder`, which is to be put on the path."""
    for name, text in FILES.items():
        path = folder / "vllm" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()
        path.write_text("\n".join(line.removeprefix(" " * 8) for line in lines) + "\n")


@contextmanager
def loaded(folder, monkeypatch):
    """The package, written to `folder` and imported; forgotten with what was made for it."""
    write(folder)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield importlib.import_module("vllm")
    for name in list(sys.modules):
        if name == "vllm" or name.startswith("vllm."):
            del sys.modules[name]
    # The modules that import vLLM are forgotten with it.
    for name in ("inductor_stages", "ir", "shm_all_reduce", "folding_backend", "live_reload"):
        sys.modules.pop(f"{integration.__name__}.{name}", None)
        vars(integration).pop(name, None)
