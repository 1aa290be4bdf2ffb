"""A stand-in for the parts of SGLang 0.5.23 that are hooked: their names, signatures and habits.

`install(monkeypatch)` puts its modules into sys.modules for one test. The real ones are tested in
tests/engines, in an environment of their own.
"""

import importlib
import pkgutil
import sys
from contextlib import contextmanager
from enum import Enum
from functools import wraps
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from helpers.standins import aiter_add, aiter_layer_norm, aiter_rms_norm

MODULES = (
    "sglang",
    "sglang.srt",
    "sglang.srt.plugins",
    "sglang.srt.plugins.hook_registry",
    "sglang.srt.layers",
    "sglang.srt.layers.layernorm",
    "sglang.srt.models",
    "sglang.srt.models.utils",
    "sglang.srt.model_loader",
    "sglang.srt.model_loader.loader",
    "sglang.multimodal_gen",
    "sglang.multimodal_gen.runtime",
    "sglang.multimodal_gen.runtime.platforms",
    "sglang.multimodal_gen.runtime.platforms.plugins",
    "sglang.multimodal_gen.runtime.layers",
    "sglang.multimodal_gen.runtime.layers.layernorm",
    "sglang.multimodal_gen.runtime.loader",
    "sglang.multimodal_gen.runtime.loader.fsdp_load",
    "sglang.multimodal_gen.runtime.pipelines_core",
    "sglang.multimodal_gen.runtime.pipelines_core.stages",
    "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising",
    "sglang.multimodal_gen.runtime.utils",
    "sglang.multimodal_gen.runtime.utils.torch_compile",
)


class HookType(Enum):
    AFTER = "after"
    AROUND = "around"


class HookRegistry:
    """Hooks by target, applied once; what cannot be applied is left out without a word."""

    _hooks: dict = {}  # noqa: RUF012
    _patched: set = set()  # noqa: RUF012

    @classmethod
    def register(cls, target, hook, hook_type, *, source=None):
        source = source or SimpleNamespace(plugin_name="fixpass")
        cls._hooks.setdefault(target, []).append((hook_type, hook, source))

    @classmethod
    def apply_hooks(cls):
        for target, hooks in list(cls._hooks.items()):
            path, _, name = target.rpartition(".")
            try:
                owner = pkgutil.resolve_name(path)
                found = getattr(owner, name)
            except (ImportError, AttributeError):
                continue
            is_static = isinstance(owner, type) and isinstance(vars(owner)[name], staticmethod)
            for hook_type, hook, _ in hooks:
                found = (
                    _around(found, hook) if hook_type is HookType.AROUND else _after(found, hook)
                )
            setattr(owner, name, staticmethod(found) if is_static else found)
            cls._patched.add(target)


def _around(original, hook):
    @wraps(original)
    def wrapper(*args, **kwargs):
        return hook(original, *args, **kwargs)

    return wrapper


def _after(original, hook):
    @wraps(original)
    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        changed = hook(result, *args, **kwargs)
        return result if changed is None else changed

    return wrapper


def install(monkeypatch, version="0.5.23"):
    """Put the stand-in into sys.modules and return a look-up of its modules."""
    made = {}
    for name in MODULES:
        made[name] = ModuleType(name)
        made[name].__path__ = []
        monkeypatch.setitem(sys.modules, name, made[name])
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made[parent], last, made[name])
    made["sglang"].__version__ = version
    _fill_registries(made)
    _fill_norms(made["sglang.srt.layers.layernorm"])
    _fill_models(made)
    _fill_loader(made["sglang.srt.model_loader.loader"])
    _fill_diffusion(made)
    return importlib.import_module


def _fill_registries(made):
    serving = made["sglang.srt.plugins.hook_registry"]
    serving.HookType = HookType
    serving.HookRegistry = type("HookRegistry", (HookRegistry,), {"_hooks": {}, "_patched": set()})
    diffusion = made["sglang.multimodal_gen.runtime.platforms.plugins"]
    diffusion.HookType = HookType
    # A subclass that has its hooks for itself and inherits the rest.
    diffusion.HookRegistry = type(
        "HookRegistry", (serving.HookRegistry,), {"_hooks": {}, "_patched": set()}
    )


def _fill_norms(module):
    module._use_aiter = True
    module.rms_norm = lambda *args: aiter_rms_norm(*args)
    module.fused_add_rms_norm = lambda *args: aiter_add(*args)
    module.layer_norm = lambda *args: aiter_layer_norm(*args)

    class RMSNorm(nn.Module):
        def __init__(self, hidden, pad=0):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(hidden).bfloat16(), requires_grad=False)
            self.pad = self.x_pad_to_multiple = pad
            self.variance_epsilon, self.variance_size_override = 1e-6, None
            self.cast_x_before_out_mul = False
            self._forward_method = self.forward_aiter

        def forward(self, *args):
            return self._forward_method(*args)

        def forward_aiter(self, x, residual=None, post_residual_addition=None, quant_linear=None):
            """Flattens unless x is 2-D, and knows a batch as empty by its first size alone."""
            if x.shape[0] == 0:
                return x if residual is None else (x, residual)
            shape, flat = x.shape, x.dim() != 2
            if flat:
                x = x.contiguous().reshape(-1, shape[-1])
                residual = None if residual is None else residual.contiguous().reshape(x.shape)
            if residual is None:
                out = module.rms_norm(x, self.weight, 1e-6)
                if self.pad:
                    return nn.functional.pad(out, (0, self.pad))
                return out.reshape(shape) if flat else out
            out, total = torch.empty_like(x), torch.empty_like(x)
            module.fused_add_rms_norm(out, x, residual, total, self.weight, 1e-6)
            return (out.reshape(shape), total.reshape(shape)) if flat else (out, total)

    module.RMSNorm = RMSNorm
    module.is_batch_invariant_mode_enabled = lambda: False


def _fill_models(made):
    utils = made["sglang.srt.models.utils"]

    def _reshape_for_qk_norm(x, head_dim):
        return x.reshape(-1, head_dim)

    def apply_qk_norm(q, k, q_norm, k_norm, head_dim, alt_stream=None, allow_inplace=True):
        q_by_head = q_norm(utils._reshape_for_qk_norm(q, head_dim))
        k_by_head = k_norm(utils._reshape_for_qk_norm(k, head_dim))
        return q_by_head.view(q.shape), k_by_head.view(k.shape)

    utils._reshape_for_qk_norm, utils.apply_qk_norm = _reshape_for_qk_norm, apply_qk_norm


def _fill_loader(module):
    @contextmanager
    def device_loading_context(owner, target_device):
        yield owner

    class DefaultModelLoader:
        @staticmethod
        def postprocess_weights(model, target_device):
            for owner in model.modules():
                if "quant_method" in vars(owner):
                    with module.device_loading_context(owner, target_device):
                        owner.quant_method.process_weights_after_loading(owner)

        @staticmethod
        def restore_weights_before_loading(model, target_device):
            for owner in model.modules():
                if "quant_method" in vars(owner):
                    with module.device_loading_context(owner, target_device):
                        owner.quant_method.restore_weights_before_loading(owner)

    module.device_loading_context = device_loading_context
    module.DefaultModelLoader = DefaultModelLoader


def _fill_diffusion(made):
    base = "sglang.multimodal_gen.runtime"
    made[f"{base}.layers.layernorm"].USE_AITER = False

    def shard_model(model, *, cpu_offload, reshard_after_forward=True, mp_policy=None, mesh=None,
                    fsdp_shard_conditions=None, pin_cpu_memory=True):  # fmt: skip
        raise AssertionError("SGLang's own shard_model ran")

    class DenoisingStage:
        def _get_extra_func_kwarg_names(self, func):
            raise AssertionError("SGLang's own look-up ran")

        def prepare_extra_func_kwargs(self, func, kwargs):
            takes_any, names = self._get_extra_func_kwarg_names(func)
            return kwargs if takes_any else {k: v for k, v in kwargs.items() if k in names}

    def resolve_torch_compile_kwargs(*names, config=None, default, module=None, **more):
        return {"fullgraph": False, "dynamic": None, "mode": default}, default

    made[f"{base}.loader.fsdp_load"].shard_model = shard_model
    made[f"{base}.pipelines_core.stages.denoising"].DenoisingStage = DenoisingStage
    compiling = made[f"{base}.utils.torch_compile"]
    compiling.resolve_torch_compile_kwargs = resolve_torch_compile_kwargs
