"""The gated norm, interpreted: values and memory accesses over many layouts.

x holds small integers. Gates in front of the norm are numbers whose activation is exact, so squares
add up exactly in any order, and values are compared bit by bit. The interpreter's exponential is
NumPy's, which differs from PyTorch's in the last bit: the reference takes NumPy's here too.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

from fixpass.runtime import gated_norm
from fixpass.runtime.gated_norm import Gating
from fixpass.runtime.kernels.gated_rms_norm import gated_rms_norm
from fixpass.testing.kernel_memory import trace_memory
from helpers.accuracy import ulps
from helpers.row_layouts import EVERY, OTHER_STRIDE, READ_ONLY, Make

HIDDEN_SIZES = (1, 17, 80, 127, 128, 256, 1024, 5000, 5120, 7168)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = ("silu", "sigmoid")
EPS = 1e-6
# silu gives 24, 32, 0 and 0 for these, and sigmoid 1, 1, 0.5 and 0.
EXACT = torch.tensor([24.0, 32.0, 0.0, -200.0])


@dataclass(frozen=True)
class Case:
    activation: str
    gate_first: bool
    layout: Make
    dtype: torch.dtype
    hidden_size: int

    def __str__(self) -> str:
        place = "first" if self.gate_first else "last"
        dtype = str(self.dtype).removeprefix("torch.")
        size = self.hidden_size
        return f"{self.activation}-{place}-{self.layout.__name__}-{dtype}-{size}"

    @property
    def number(self) -> int:
        return crc32(str(self).encode())

    def pick(self, divisor, *choices):
        return choices[self.number // divisor % len(choices)]


def cases() -> Iterator[Case]:
    for activation in ACTIVATIONS:
        for gate_first in (False, True):
            for layout in EVERY:
                for hidden_size in HIDDEN_SIZES:
                    for dtype in DTYPES:
                        yield Case(activation, gate_first, layout, dtype, hidden_size)


EVERY_CASE = list(cases())
SHORT = [case for case in EVERY_CASE if case.hidden_size in (80, 128, 256)][::19]


def filled(like: Tensor, values: Tensor) -> Tensor:
    """Random picks of `values` in the layout of `like`."""
    count = like.untyped_storage().nbytes() // like.element_size()
    picked = values[torch.randint(len(values), (count,))].to(like.dtype)
    return picked.as_strided(like.shape, like.stride(), like.storage_offset())


def gate_of(case: Case, x: Tensor) -> Tensor:
    """In the layout of x, contiguous, or behind each row of x as in a packed projection."""
    dtype = case.pick(11, case.dtype, torch.float32)
    gate = torch.randn(*x.shape[:-1], 2 * x.shape[-1]).to(dtype)[..., x.shape[-1] :]
    gate = case.pick(3, case.layout(case.hidden_size, dtype), gate, gate.contiguous())
    return filled(gate, EXACT) if case.gate_first else gate


def gating_of(case: Case) -> Gating:
    divides = case.hidden_size % 16 == 0
    return Gating(
        case.activation,
        case.gate_first,
        group_size=case.pick(2, 0, case.hidden_size // case.pick(5, 2, 4)) if divides else 0,
        gate_dtype=case.pick(7, None, None, case.dtype),
        normed_dtype=case.pick(13, None, torch.float32),
    )


RULES = (
    {},
    {"norm_dtype": torch.bfloat16},
    {"weight_offset": 1.0, "weight_dtype": torch.float32},
)


@pytest.fixture
def exponential_of_numpy(monkeypatch):
    def one_plus_exponential(gate):
        with np.errstate(over="ignore"):
            return 1 + torch.from_numpy(np.exp(-gate.float().numpy()))

    silu = lambda gate: (gate / one_plus_exponential(gate)).to(gate.dtype)  # noqa: E731
    sigmoid = lambda gate: (1 / one_plus_exponential(gate)).to(gate.dtype)  # noqa: E731
    monkeypatch.setitem(gated_norm.ACTIVATIONS, "silu", silu)
    monkeypatch.setitem(gated_norm.ACTIVATIONS, "sigmoid", sigmoid)


def assert_proved(case: Case) -> None:
    torch.manual_seed(case.number)
    x = filled(case.layout(case.hidden_size, case.dtype), torch.arange(-8, 9))
    gate, gating = gate_of(case, x), gating_of(case)
    weight = torch.randn(2 * case.hidden_size).to(case.pick(17, case.dtype, torch.float32))
    weight = case.pick(19, weight[: case.hidden_size], weight[::2], None)
    rule = case.pick(23, *RULES)
    out = torch.empty(x.shape, dtype=case.pick(29, case.dtype, torch.float32))
    if case.layout not in READ_ONLY and case.pick(31, True, False):
        out = case.layout(case.hidden_size, case.dtype)
    steps = {**asdict(gating), **rule, "out_dtype": out.dtype}
    want = gated_norm.gated_rms_norm(x, gate, weight, EPS, **steps)
    report = trace_memory(gated_rms_norm, x, gate, weight, EPS, out=out, gating=gating, **rule)
    assert report.faults == ()
    assert torch.equal(out, want)
    if x.numel() and case.layout not in OTHER_STRIDE:
        assert report.moved(("x", "gate"), ("out",)) == 1.0


def test_the_probe_is_large_enough():
    assert len(EVERY_CASE) >= 2000
    assert {case.layout for case in SHORT} == set(EVERY)
    kinds = {(case.activation, case.gate_first, case.dtype) for case in EVERY_CASE}
    assert {(case.activation, case.gate_first, case.dtype) for case in SHORT} == kinds


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_layouts(case, exponential_of_numpy):
    assert_proved(case)


@pytest.mark.full
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_every_layout(case, exponential_of_numpy):
    assert_proved(case)


@pytest.mark.parametrize("gate_first", [False, True], ids=["norm first", "gate first"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_are_those_of_float64(activation, gate_first):
    x, gate, weight = torch.randn(7, 256), torch.randn(7, 256), torch.randn(256)
    scale = torch.sigmoid(gate.double()) * (gate.double() if activation == "silu" else 1)
    rows = (x * scale if gate_first else x).double().view(7, 4, 64)
    y = (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + EPS)).view(7, 256) * weight
    want = (y if gate_first else y * scale).float()
    out = torch.empty(7, 256)
    gating = Gating(activation, gate_first, group_size=64)
    trace_memory(gated_rms_norm, x, gate, weight, EPS, out=out, gating=gating)
    assert ulps(out, want) <= 8


def test_a_gate_inside_a_packed_projection_is_read_where_it_lies():
    """As Qwen3-Next packs it: x in front, z of 4 heads behind; result over x, in place."""
    packed = torch.randn(5, 3 * 512).to(torch.bfloat16)
    x, gate = (packed[:, start : start + 512].unflatten(1, (4, 128)) for start in (0, 1024))
    weight, gating = torch.randn(128).to(torch.bfloat16), Gating("silu")
    want = gated_norm.gated_rms_norm(x, gate, weight, EPS, activation="silu")
    rest = packed[:, 512:].clone()
    report = trace_memory(gated_rms_norm, x, gate, weight, EPS, out=x, gating=gating)
    assert report.faults == ()
    assert [name for name, _ in report.launches] == ["gated_norm_kernel"]
    assert report.moved(("x", "gate"), ("out",)) == 1.0
    assert ulps(x, want) <= 1
    assert torch.equal(packed[:, 512:], rest)


def test_a_gate_of_minus_infinity_closes_and_of_infinity_opens():
    gate = torch.tensor([[-torch.inf, torch.inf, 0.0, -200.0]])
    out = torch.empty(1, 4)
    trace_memory(
        gated_rms_norm, torch.ones(1, 4), gate, None, 0.0, out=out, gating=Gating("sigmoid")
    )
    assert out.tolist() == [[0.0, 1.0, 0.5, 0.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": torch.empty(3, 64)}, r"gate f32\[3, 64\]: shape differs from x f32\[3, 128\]"),
        ({"gate": torch.empty(3, 128).double()}, r"gate f64\[3, 128\]: want float16"),
        ({"weight": torch.empty(64)}, r"weight f32\[64\]: want \[128\]"),
        ({"gating": Gating("gelu")}, r"activation 'gelu' is none of \['silu', 'sigmoid'\]"),
        ({"gating": Gating("silu", group_size=96)}, "group_size 96 does not divide 128"),
        ({"gating": Gating("silu", gate_dtype=torch.float64)}, "gate_dtype torch.float64: want"),
    ],
    ids=["shape", "dtype", "weight", "activation", "group", "rounding"],
)
def test_operands_that_the_kernel_cannot_take_are_named(changes, message):
    x = torch.randn(3, 128)
    given = {"gate": torch.randn(3, 128), "weight": None, "gating": Gating("silu")} | changes
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(
            x, given["gate"], given["weight"], EPS, out=torch.empty(3, 128), gating=given["gating"]
        )


def test_an_output_may_not_lie_partly_over_the_gate():
    packed = torch.randn(3, 256)
    gate, out = packed[:, :128], packed[:, 64:192]
    with pytest.raises(ValueError, match=r"out .* lies partly over gate"):
        gated_rms_norm(torch.randn(3, 128), gate, None, EPS, out=out, gating=Gating("silu"))
