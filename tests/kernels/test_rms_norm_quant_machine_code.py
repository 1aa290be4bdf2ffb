"""The machine code of the norm with quantised output on four targets; nothing is run.

Rows of 16-bit values are read 128 bits at a time. A thread holds 8 or more neighbouring values, and
8 codes are 64 bits: codes are written 64 bits at a time. A scale is 32 bits.
"""

import pytest
import torch

from benchmarks.machine_code import compile_launch, gpu_target
from fixpass.runtime.kernels.launch import HIP_FORMATS, quantization_constants, rounding
from fixpass.runtime.kernels.rms_norm_quant import plan_norm_quant
from fixpass.runtime.quantized_norm import Quantization

E4M3FN, E4M3FNUZ, INT8 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8
NATIVE = {"cuda:sm_90": E4M3FN, "cuda:sm_100": E4M3FN} | {
    f"rocm:{name}": dtype for name, (dtype,) in HIP_FORMATS.items()
}
SHORT = [
    ("cuda:sm_90", E4M3FN, "token", 4096, True),
    ("cuda:sm_100", E4M3FN, "group", 5120, False),
    ("rocm:gfx942", E4M3FNUZ, "static", 128, False),
    ("rocm:gfx942", E4M3FN, "token", 4096, False),
    ("rocm:gfx950", E4M3FN, "group", 8192, True),
    ("rocm:gfx950", INT8, "token", 4096, False),
]
EVERY = [
    (target, dtype, kind, size, adds)
    for target in NATIVE
    for dtype in (E4M3FN, E4M3FNUZ, INT8)
    for kind in ("static", "token", "group")
    for size in (128, 1024, 4096, 5120, 8192)
    for adds in (False, True)
]


def empty(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(target_name, dtype, kind, size, adds):
    target = gpu_target(target_name)
    x = empty((4096, 3 * size + 8), torch.bfloat16)[:, :size]
    rows = {"x": x, "out": empty(x.shape, torch.uint8)}
    if adds:
        rows |= {name: empty(x.shape, x.dtype) for name in ("residual", "sum_out")}
    if kind != "static":
        rows["scales"] = empty((4096, size // 128 if kind == "group" else 1), torch.float32)
    scale = empty((), torch.float32) if kind == "static" else None
    group = 128 if kind == "group" else 0
    steps = Quantization(dtype, -127.0, 127.0, "divide", group_size=group, limit=127.0)
    weight = empty((size,), torch.bfloat16)
    constants = {
        **rounding(weight, None, 0.0, None, None),
        **quantization_constants(steps, x.dtype, (NATIVE[target_name],)),
    }
    launch = plan_norm_quant(rows, weight, None, scale, 1e-6, constants, lanes=target.warp_size)
    return compile_launch(launch, target)


def assert_wide(target_name, dtype, kind, size, adds):
    code = compiled(target_name, dtype, kind, size, adds)
    assert code.spills == 0
    assert set(code.loads) == ({32, 128} if kind == "static" else {128})
    wanted = {64} | ({128} if adds else set()) | (set() if kind == "static" else {32})
    assert set(code.stores) == wanted


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_machine_code(case):
    assert_wide(*case)


@pytest.mark.full
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_machine_code_of_every_kind(case):
    assert_wide(*case)
