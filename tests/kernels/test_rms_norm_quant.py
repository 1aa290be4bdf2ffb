"""The norm with quantised output, interpreted: codes, scales, sums and memory accesses.

x holds small integers, whose squares add up exactly in any order. So the codes and scales of the
kernel are compared with those of the reference bit by bit.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from zlib import crc32

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fixpass.runtime import quantized_norm
from fixpass.runtime.kernels.quantize_tile import encode
from fixpass.runtime.kernels.rms_norm_quant import rms_norm_quant
from fixpass.runtime.quantized_norm import QUANTIZED, Quantization
from fixpass.testing.kernel_memory import trace_memory
from helpers.row_layouts import EVERY, OTHER_STRIDE, Make

HIDDEN_SIZES = (1, 17, 80, 127, 128, 256, 1024, 5000, 5120, 7168)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("static", "token", "group of 128")
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0, torch.int8: 127.0}
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    kind: str
    code: torch.dtype
    layout: Make
    dtype: torch.dtype
    hidden_size: int
    adds: bool

    def __str__(self) -> str:
        names = (str(each).removeprefix("torch.") for each in (self.code, self.dtype))
        add = "-add" if self.adds else ""
        return "-".join((self.kind, *names, self.layout.__name__, str(self.hidden_size))) + add

    @property
    def number(self) -> int:
        return crc32(str(self).encode())


def cases() -> Iterator[Case]:
    for kind in KINDS:
        for hidden_size in HIDDEN_SIZES:
            if kind == "group of 128" and hidden_size % 128:
                continue
            for layout in EVERY:
                for code in QUANTIZED:
                    for adds in (False, True):
                        dtype = DTYPES[crc32(f"{hidden_size}{layout.__name__}{code}".encode()) % 3]
                        yield Case(kind, code, layout, dtype, hidden_size, adds)


EVERY_CASE = list(cases())
SHORT = [case for case in EVERY_CASE if case.hidden_size in (80, 128, 256)][::23]


def integers(x: Tensor) -> Tensor:
    """Integers from -8 to 8 in the layout of x."""
    count = x.untyped_storage().nbytes() // x.element_size()
    values = torch.randint(-8, 9, (count,)).to(x.dtype)
    return values.as_strided(x.shape, x.stride(), x.storage_offset())


def quantization(case: Case) -> Quantization:
    largest, number = LARGEST[case.code], case.number
    applies = ("divide", "reciprocal", "multiply") if case.kind == "static" else ("divide",)
    return Quantization(
        case.code,
        -128.0 if case.code == torch.int8 and number % 2 else -largest,
        largest,
        applies[number % len(applies)],
        group_size=128 if case.kind == "group of 128" else 0,
        limit=largest,
        amax_min=(0.0, 1e-4)[number // 3 % 2],
        scale_min=(0.0, 1.0 / (512 * largest))[number // 5 % 2],
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int32)


def assert_proved(case: Case) -> None:
    torch.manual_seed(case.number)
    x = integers(case.layout(case.hidden_size, case.dtype))
    residual = integers(case.layout(case.hidden_size, case.dtype)) if case.adds else None
    weight = torch.randn(case.hidden_size).to(case.dtype) if case.number % 5 else None
    bias = torch.randn(case.hidden_size).to(case.dtype) if case.number % 7 == 0 else None
    scale = torch.tensor(0.0123) if case.kind == "static" else None
    rule = {"norm_dtype": case.dtype} if case.number % 2 else {}
    steps = quantization(case)
    operands = (x, residual, weight, bias, scale, EPS)
    codes, scales, total = quantized_norm.rms_norm_quant(*operands, **asdict(steps), **rule)
    wants = {"out": codes}
    if scale is None:
        wants["scales"] = scales
    if residual is not None:
        wants["sum_out"] = total
    got = {name: torch.empty_like(want) for name, want in wants.items()}
    written = dict.fromkeys(("out", "sum_out", "scales")) | got
    report = trace_memory(rms_norm_quant, *operands, **written, quantization=steps, **rule)
    assert report.faults == ()
    # The sign of NaN, which a row of zeros gives where the scale has no minimum, is not compared.
    nan = codes.float().isnan()
    assert torch.equal(got["out"].float().isnan(), nan)
    assert torch.equal(bits(got["out"])[~nan], bits(codes)[~nan])
    assert all(torch.equal(got[name], want) for name, want in wants.items() if name != "out")
    if x.numel() and case.layout not in OTHER_STRIDE:
        reads = ("x", "residual") if case.adds else ("x",)
        assert report.moved(reads, tuple(wants)) == 1.0


def test_the_probe_is_large_enough():
    assert len(EVERY_CASE) >= 2000
    assert {case.layout for case in SHORT} == set(EVERY)
    assert {(case.kind, case.code) for case in SHORT} == {(k, c) for k in KINDS for c in QUANTIZED}


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_layouts(case):
    assert_proved(case)


@pytest.mark.full
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_every_layout(case):
    assert_proved(case)


@triton.jit
def encode_all(x_ptr, out_ptr, BLOCK: tl.constexpr, HIGH: tl.constexpr, CODE: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, encode(tl.load(x_ptr + at), -HIGH, HIGH, CODE, False))


@pytest.mark.parametrize(
    ("dtype", "code"),
    [(torch.float8_e4m3fn, tl.float8e4nv), (torch.float8_e4m3fnuz, tl.float8e4b8)],
    ids=["e4m3fn", "e4m3fnuz"],
)
def test_integer_arithmetic_encodes_float8_as_torch_does(dtype, code):
    """Every bf16 value: all ties of 3 bits of mantissa, subnormal numbers, zeros, infinities."""
    high = torch.finfo(dtype).max
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = torch.cat([x, x[: 2**15] * (1 + 2**-20), x[: 2**15] * (1 - 2**-20)])
    out = torch.empty(x.shape, dtype=torch.uint8)
    trace_memory(lambda x, out: encode_all[(64,)](x, out, 2048, high, code), x, out)
    want = x.clamp(-high, high).to(dtype)
    got = out.view(dtype)
    assert torch.equal(got.float().isnan(), x.isnan())
    assert torch.equal(out[~x.isnan()], want.view(torch.uint8)[~x.isnan()])


TOKEN = Quantization(torch.int8, -128.0, 127.0, "divide", limit=127.0)


def launch(x, steps=TOKEN, scale=None, **changes):
    groups = x.shape[-1] // steps.group_size if steps.group_size else 1
    given = {
        "out": torch.empty(x.shape, dtype=steps.quant_dtype),
        "sum_out": None,
        "scales": None if scale is not None else torch.empty(*x.shape[:-1], groups),
        "quantization": steps,
    } | changes
    rms_norm_quant(x, None, None, None, scale, EPS, **given)


def test_a_row_with_nan_has_the_scale_nan_and_the_others_their_own():
    x = torch.randn(3, 128)
    x[1, 5] = float("nan")
    scales = torch.empty(3, 1)
    trace_memory(launch, x, scales=scales)
    assert scales.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": torch.empty(3, 128)}, r"out f32\[3, 128\]: want torch.int8"),
        ({"out": torch.empty(128, dtype=torch.int8).expand(3, 128)}, "several indices name one"),
        ({"scales": torch.empty(3, 2)}, r"scales f32\[3, 2\]: want float32 of \[3, 1\]"),
        ({"scales": None}, "scale and scales: one of them"),
        ({"sum_out": torch.empty(3, 128)}, "residual and sum_out: both or neither"),
        ({"steps": replace(TOKEN, group_size=96)}, "group_size 96: want a power of two that div"),
        ({"steps": replace(TOKEN, quant_dtype=torch.int16)}, "torch.int16 is none of"),
        ({"scale": torch.empty(3, 1)}, r"scale f32\[3, 1\]: want one float32 number"),
        ({"norm_dtype": torch.float64}, "torch.float64: want float16, bfloat16 or float32"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_operands_that_the_kernel_cannot_take_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        trace_memory(launch, torch.randn(3, 128), **changes)


def test_an_output_may_not_lie_over_an_input():
    x = torch.randn(3, 128)
    out = x.view(torch.int8).view(-1)[:384].view(3, 128)
    with pytest.raises(ValueError, match=r"out .* lies partly over x f32\[3, 128\]"):
        trace_memory(launch, x, out=out)
