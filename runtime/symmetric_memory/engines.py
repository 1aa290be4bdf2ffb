"""Process groups that serving engines know by names of their own, such as vLLM's "tp:0".

An engine that is not loaded is not imported. Nothing is changed in the engines.
"""

import sys

from torch.distributed import ProcessGroup

from fixpass.runtime.symmetric_memory.policy import Role

# Both keep weak references to their coordinators in a dictionary of this module.
MODULES = ("vllm.distributed.parallel_state", "sglang.srt.distributed.parallel_state")
ATTENTION_TP = ("attention_tp", "attn_tp")


def engine_group(name: str) -> ProcessGroup | None:
    """The device group of the engine's coordinator of that name, or None."""
    for module_name in MODULES:
        module = sys.modules.get(module_name)
        reference = module._groups.get(name) if module is not None else None
        coordinator = reference() if reference is not None else None
        if coordinator is not None:
            group: ProcessGroup = coordinator.device_group
            return group
    return None


def role_in_engine(name: str) -> Role:
    """What an engine's group is for, by its name."""
    return "attn_tp" if name.startswith(ATTENTION_TP) else "tp"
