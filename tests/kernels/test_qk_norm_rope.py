"""The rotated norms of q and k, interpreted: values and memory accesses.

q and k hold small integers, whose squares add up exactly in any order. So the results of the kernel
are compared with those of the reference bit by bit.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from zlib import crc32

import pytest
import torch
from torch import Tensor

from fixpass.runtime import rotary_norm, strided
from fixpass.runtime.kernels.qk_norm_rope import qk_norm_rope
from fixpass.runtime.rotary_norm import Rotation
from fixpass.testing.kernel_memory import trace_memory
from helpers.row_layouts import EVERY, OTHER_STRIDE, Make

# The size of a head and how many of its values are rotated.
HEADS = ((128, 128), (128, 64), (256, 64), (80, 80), (80, 32), (96, 24), (64, 64), (2, 2))
TABLES = ("full", "half", "of each token", "strided")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    layout: Make
    head: int
    rotary_dim: int
    table: str
    interleaved: bool
    several: bool
    """A normalised row holds two heads, and k's rows hold one."""

    def __str__(self) -> str:
        order = "gptj" if self.interleaved else "neox"
        heads = "-heads" if self.several else ""
        name = self.layout.__name__
        return f"{name}-{self.head}-{self.rotary_dim}-{self.table}-{order}{heads}"

    @property
    def number(self) -> int:
        return crc32(str(self).encode())

    def one_of(self, values, divisor: int):
        return values[self.number // divisor % len(values)]


def cases() -> Iterator[Case]:
    for layout in EVERY:
        for head, rotary_dim in HEADS:
            for table in TABLES:
                for interleaved in (False, True):
                    for several in (False, True):
                        yield Case(layout, head, rotary_dim, table, interleaved, several)


EVERY_CASE = list(cases())
SHORT = EVERY_CASE[::67]


def integers(x: Tensor) -> Tensor:
    """Integers from -8 to 8 in the layout of x."""
    count = x.untyped_storage().nbytes() // x.element_size()
    values = torch.randint(-8, 9, (count,)).to(x.dtype)
    return values.as_strided(x.shape, x.stride(), x.storage_offset())


def tables(case: Case, rows: torch.Size) -> tuple[Tensor, Tensor]:
    """cos and sin: for each row, or one row for the last leading dimension; k takes its first."""
    width = case.rotary_dim if case.number % 2 else case.rotary_dim // 2
    width = {"full": case.rotary_dim, "half": case.rotary_dim // 2}.get(case.table, width)
    dtype = case.one_of(DTYPES, 11)
    leads = (1,) * len(rows)
    if case.table == "of each token" and rows:
        leads = (*rows[:-1], 1) if len(rows) > 1 else (1,)
    if case.table == "strided":
        wide = torch.randn(2, *leads, 2 * width + 1).to(dtype)[..., ::2][..., :width]
        return wide[0], wide[1]
    return torch.randn(*leads, width).to(dtype), torch.randn(*leads, width).to(dtype)


def operands(case: Case):
    dtype = case.one_of(DTYPES, 3)
    q = integers(case.layout(case.head * (1 + case.several), dtype))
    k = integers(case.layout(case.head, dtype))
    if q.dim() > 2:
        k = k[..., :1, :]
    weights = [torch.randn(x.shape[-1]).to(dtype) if case.number % 5 else None for x in (q, k)]
    return (q, k, *weights, *tables(case, q.shape[:-1]), EPS)


def assert_proved(case: Case) -> None:
    torch.manual_seed(case.number)
    given = operands(case)
    rotation = Rotation(
        case.rotary_dim,
        case.head if case.several else 0,
        case.interleaved,
        case.one_of((None, torch.float32), 13),
        case.one_of((None, torch.float32), 17),
    )
    rule = case.one_of(({}, {"norm_dtype": given[0].dtype}, {"weight_offset": 1.0}), 7)
    wants = rotary_norm.qk_norm_rope(*given, **asdict(rotation), **rule)
    got = [torch.empty_like(want) for want in wants]
    report = trace_memory(
        qk_norm_rope, *given, q_out=got[0], k_out=got[1], rotation=rotation, **rule
    )
    assert report.faults == ()
    assert all(torch.equal(mine, want) for mine, want in zip(got, wants, strict=True))
    if given[0].numel() and case.layout not in OTHER_STRIDE:
        assert report.moved(("q", "k"), ("q_out", "k_out")) == 1.0


def test_the_probe_is_large_enough():
    assert len(EVERY_CASE) >= 2000
    assert {case.layout for case in SHORT} == set(EVERY)
    assert {case.table for case in SHORT} == set(TABLES)
    assert {(case.interleaved, case.several) for case in SHORT} == {
        (a, b) for a in (False, True) for b in (False, True)
    }


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_layouts(case):
    assert_proved(case)


@pytest.mark.full
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_every_layout(case):
    assert_proved(case)


def packed():
    """q, k, their weights, cos and sin of two tokens, views of one projection."""
    qkv = torch.randint(-8, 9, (2, 6 * 128)).to(torch.bfloat16)
    q, k = qkv[:, :512].unflatten(1, (4, 128)), qkv[:, 512:640].unflatten(1, (1, 128))
    weight = torch.randn(128).to(torch.bfloat16)
    return [q, k, weight, weight, torch.randn(2, 1, 128), torch.randn(2, 1, 128)]


def test_q_and_k_may_be_rotated_in_place():
    given = packed()
    wants = rotary_norm.qk_norm_rope(*given, EPS, rotary_dim=128)
    report = trace_memory(
        qk_norm_rope, *given, EPS, q_out=given[0], k_out=given[1], rotation=Rotation(128)
    )
    assert report.faults == ()
    assert all(map(torch.equal, given[:2], wants))


def test_one_launch_takes_q_and_k_and_a_second_call_plans_nothing():
    given, rotation = packed(), Rotation(128)
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[:2]]
    for _ in range(2):
        report = trace_memory(
            qk_norm_rope, *given, EPS, q_out=outs[0], k_out=outs[1], rotation=rotation
        )
        assert [name for name, _ in report.launches] == ["qk_norm_rope_kernel"]
        wants = rotary_norm.qk_norm_rope(*given, EPS, rotary_dim=128)
        assert all(map(torch.equal, outs, wants))
        given = packed()


@pytest.mark.parametrize(
    ("place", "value", "rotation", "message"),
    [
        (0, torch.empty(2, 4, 128), Rotation(128), r"k bf16.*: hidden size and dtype differ"),
        (4, torch.empty(2, 1, 96), Rotation(128), r"cos f32\[2, 1, 96\]: want 128 or 64 columns"),
        (5, torch.empty(2, 1, 64), Rotation(128), r"sin f32\[2, 1, 64\]: does not broadcast"),
        (5, torch.empty(2, 1, 128).half(), Rotation(128), "the dtype of cos"),
        (4, torch.empty(3, 1, 128), Rotation(128), r"cos .*: does not broadcast to q"),
        (4, torch.empty(2, 1, 128), Rotation(130), "rotary_dim 130: want an even number of at"),
        (4, torch.empty(2, 1, 128), Rotation(127), "rotary_dim 127: want an even number of at"),
        (4, torch.empty(2, 1, 128), Rotation(96, 96), "of at most 96, the size of a head, which"),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)
def test_operands_that_the_kernel_cannot_take_are_named(place, value, rotation, message):
    given = packed()
    given[place] = value
    outs = [torch.empty(x.shape, dtype=x.dtype) for x in given[:2]]
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(*given, EPS, q_out=outs[0], k_out=outs[1], rotation=rotation)


def test_a_result_may_not_lie_over_a_table():
    given = packed()
    table = torch.empty(2, 4, 128)
    given[4] = table[:, :1]
    with pytest.raises(ValueError, match=r"q_out .*: lies over cos"):
        qk_norm_rope(*given, EPS, q_out=table, k_out=torch.empty(2, 1, 128), rotation=Rotation(128))


def test_a_call_by_the_kernels_name_gives_what_the_reference_gives():
    given, steps = packed(), {"rotary_dim": 64, "norm_dtype": torch.bfloat16, "order": [1, 0, 2]}
    given[4:] = [table[..., :32] for table in given[4:]]
    found = []
    report = trace_memory(
        lambda *a, **k: found.extend(strided.qk_norm_rope(*a, **k)), *given, EPS, **steps
    )
    wants = rotary_norm.qk_norm_rope(*given, EPS, **steps)
    assert [kernel for kernel, _ in report.launches] == ["qk_norm_rope_kernel"]
    assert all(map(torch.equal, found, wants))
    assert all(x.permute(1, 0, 2).is_contiguous() for x in (*found, *wants))
