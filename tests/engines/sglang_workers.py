"""What ranks do in tests of SGLang's diffusion side."""

import importlib
import os
import warnings


def shard(switch):
    """Shard a small model with SGLang's own function; the loaders that are left, and its output."""
    importlib.import_module("sglang_start")
    os.environ["FIXPASS"] = switch
    warnings.simplefilter("ignore")
    import torch
    from sglang.multimodal_gen.runtime.loader import fsdp_load
    from sglang.multimodal_gen.runtime.platforms import plugins
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh

    plugins.apply_plugin_hooks()
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    model.forward = lambda x: model.blocks[1](model.blocks[0](x))
    for param in model.parameters():
        param.weight_loader = "theirs"
    x = torch.randn(4, 8)
    want = model.forward(x)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    fsdp_load.shard_model(model, cpu_offload=False, mp_policy=_policy(), mesh=mesh)
    loaders = [getattr(param, "weight_loader", None) for param in model.parameters()]
    units = [name for name, module in model.named_modules() if _is_unit(module)]
    close = torch.allclose(model.blocks[1](model.blocks[0](x)), want)
    return loaders, units, close, sorted(plugins.HookRegistry._patched)


def _policy():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy()


def _is_unit(module):
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
