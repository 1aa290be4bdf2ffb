"""The machine code of the rotated norms of q and k on four targets; nothing is run.

Rows of 16-bit values are read and written 128 bits at a time, and so are the tables. A table with
half as many columns as GPT-J pairs are wide is read in the layout of its own columns.
"""

import pytest
import torch

from benchmarks.machine_code import DOCUMENTED_TARGETS, compile_launch, gpu_target
from fixpass.runtime.kernels.launch import rounding
from fixpass.runtime.kernels.qk_norm_rope import plan_qk_norm_rope, rotation_constants, spread
from fixpass.runtime.rotary_norm import Rotation

BF16, F32 = torch.bfloat16, torch.float32
# The tables' dtype, the size of a head, its rotated values, GPT-J pairs, full tables, and whether
# a normalised row holds all heads.
KINDS = [
    (BF16, 128, 128, False, True, False),
    (BF16, 128, 128, True, True, False),
    (BF16, 128, 128, True, False, False),
    (F32, 128, 128, False, False, False),
    (BF16, 128, 64, False, True, False),
    (BF16, 256, 64, False, True, False),
    (BF16, 80, 32, False, True, False),
    (BF16, 64, 64, False, True, False),
    (F32, 256, 256, True, False, False),
    (F32, 128, 128, False, True, True),
]
SHORT = [("cuda:sm_90", KINDS[0]), ("rocm:gfx942", KINDS[4]), ("rocm:gfx950", KINDS[1])]


def empty(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(target_name, kind):
    """32 heads of q and 8 of k, of 4,096 packed tokens."""
    dtype, head, rotary_dim, interleaved, full, several = kind
    target = gpu_target(target_name)
    qkv = empty((4096, 48 * head + 8), BF16)
    q, k = qkv[:, : 32 * head], qkv[:, 32 * head : 40 * head]
    cos = empty((4096, rotary_dim if full else rotary_dim // 2), dtype)
    if not several:
        q, k, cos = q.unflatten(1, (32, head)), k.unflatten(1, (8, head)), cos[:, None]
    rotation = Rotation(rotary_dim, head if several else 0, interleaved)
    sides = {
        name: (x, empty(x.shape[-1:], BF16), empty(x.shape, BF16))
        for name, x in (("q", q), ("k", k))
    }
    tables = {name: spread(x, cos, cos) for name, (x, _, _) in sides.items()}
    constants = {
        **rounding(sides["q"][1], None, 0.0, BF16, None),
        **rotation_constants(rotation, BF16, cos),
    }
    lanes = target.warp_size
    launch = plan_qk_norm_rope(sides, tables, 1e-6, constants, rotation, lanes=lanes)
    return compile_launch(launch, target)


def assert_wide(target_name, kind):
    code = compiled(target_name, kind)
    assert code.spills == 0
    # A quarter of a wide head is rotated: wider loads would take more rows and more registers.
    assert code.narrowest() == (64 if kind[1:3] == (256, 64) else 128)


@pytest.mark.parametrize(("target", "kind"), SHORT, ids=str)
def test_machine_code(target, kind):
    assert_wide(target, kind)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("target", DOCUMENTED_TARGETS)
def test_machine_code_of_every_kind(target, kind):
    assert_wide(target, kind)
