"""The machine code of the gated norm on four targets; nothing is run.

Rows of 16-bit values are read and written 128 bits at a time, and so is a weight in float32.
"""

import pytest
import torch

from benchmarks.machine_code import DOCUMENTED_TARGETS, compile_launch, gpu_target
from fixpass.runtime.gated_norm import Gating
from fixpass.runtime.kernels.gated_rms_norm import gated_rows, gating_constants, plan_gated_norm
from fixpass.runtime.kernels.launch import rounding

KINDS = ("heads", "row", "groups")
SHORT = list(zip(DOCUMENTED_TARGETS, (*KINDS, "heads"), strict=True))
EVERY = [(target, kind) for target in DOCUMENTED_TARGETS for kind in KINDS]


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(target_name, kind):
    """heads: Qwen3-Next's 32 heads of 128 in a packed projection; row, groups: Mamba-2's."""
    target = gpu_target(target_name)
    if kind == "heads":
        gate = empty(4096, 12288)[:, 8192:].unflatten(1, (32, 128))
        gating = Gating("silu")
    else:
        gate = empty(4096, 18560)[:, :8192]
        gating = Gating("silu", gate_first=True, group_size=1024 if kind == "groups" else 0)
    x, weight = empty(*gate.shape), empty(gate.shape[-1], dtype=torch.float32)
    constants = {
        **rounding(weight, None, 0.0, torch.bfloat16, None),
        **gating_constants(gating, x.dtype),
    }
    rows = gated_rows(x, gate, weight, empty(*x.shape), gating.group_size)
    return compile_launch(plan_gated_norm(rows, 1e-6, constants, lanes=target.warp_size), target)


def assert_wide(target_name, kind):
    code = compiled(target_name, kind)
    assert code.spills == 0
    assert set(code.loads) == set(code.stores) == {128}


@pytest.mark.parametrize(("target_name", "kind"), SHORT)
def test_machine_code(target_name, kind):
    assert_wide(target_name, kind)


@pytest.mark.full
@pytest.mark.parametrize(("target_name", "kind"), EVERY)
def test_machine_code_of_every_kind(target_name, kind):
    assert_wide(target_name, kind)
