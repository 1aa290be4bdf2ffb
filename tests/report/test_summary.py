"""The first sentence of a report: figures that are counted, in units."""

import pytest
import torch
from torch import nn

import fixpass
from fixpass import Remark
from fixpass.passes.base import Choice
from fixpass.report.summary import readable, summary
from fixpass.testing import assert_fired, bf16
from helpers.rotary_spellings import neox


def chosen(*choices, bytes_saved=0):
    return [
        Remark("p", "applied", f"n_{i}", "text", bytes_saved=bytes_saved, choice=choice)
        for i, choice in enumerate(choices)
    ]


@pytest.mark.parametrize(
    ("remarks", "expected"),
    [
        (chosen(), ""),
        (chosen(Choice("skinny_linear")), ""),
        (
            chosen(Choice("inductor", 1, 1)),
            "On t: 1 norm over dense tensors; the norm takes 1 launch.",
        ),
        (
            chosen(Choice("inductor", 1, 2, True), bytes_saved=1280),
            "On t: 1 of 1 norm reads a strided layout without a copy; the norm takes 1 launch "
            "instead of 2; 1,280 bytes not moved.",
        ),
        (
            chosen(Choice("a", 1, 2, True), Choice("a", 1, 2, True), Choice("both", -1)),
            "On t: 2 of 2 norms read a strided layout without a copy; the norms take 1 launch "
            "instead of 4.",
        ),
        (
            chosen(Choice("a", 2, 2, True, ("x",)), Choice("a", 1, 1)),
            "On t: 0 of 2 norms read a strided layout without a copy, 1 through a copy; "
            "the norms take 3 launches.",
        ),
    ],
)
def test_the_sentence_counts_norms_launches_and_bytes(remarks, expected):
    assert summary(remarks, "t") == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (9_999, "9,999 bytes"),
        (65_536, "65.5 kB"),
        (2_752_512, "2.8 MB"),
        (5 * 10**12, "5,000.0 GB"),
    ],
)
def test_bytes_have_a_unit(num_bytes, expected):
    assert readable(num_bytes) == expected


class PackedQk(nn.Module):
    """Norms of q and k, slices of one packed tensor, and one norm of a dense tensor."""

    def __init__(self):
        super().__init__()
        self.norm, self.q_norm, self.k_norm = (
            nn.RMSNorm(size, dtype=torch.bfloat16) for size in (192, 16, 16)
        )

    def forward(self, qkv):
        heads = self.norm(qkv).sin().clone().unflatten(-1, (-1, 16))
        return self.q_norm(heads[:, :4]), self.k_norm(heads[:, 4:8])


@torch.no_grad()
def test_the_figures_are_those_of_the_graph():
    """The first kernel of `aiter` order copies q and k; ours reads them, both in one launch."""
    options = {"norm_kernels": ("aiter_rms_norm", "strided_rms_norm", "strided_qk_norm")}
    report = fixpass.explain(PackedQk(), bf16(5, 192), target="rocm:gfx942", options=options)
    copies = sum(2 * 5 * heads * 16 * 2 for heads in (4, 4))
    assert report.summary == (
        "On rocm:gfx942: 2 of 3 norms read a strided layout without a copy; the norms take "
        f"2 launches instead of 5; {copies:,} bytes not moved."
    )
    assert str(report).splitlines()[1] == report.summary


class RotatedQk(PackedQk):
    """The norms of q and k, and their rotations."""

    def forward(self, qkv, cos, sin):
        heads = qkv.unflatten(-1, (-1, 16))
        q, k = self.q_norm(heads[:, :4]), self.k_norm(heads[:, 4:8])
        return neox(q, cos[:, None], sin[:, None]), neox(k, cos[:, None], sin[:, None])


@torch.no_grad()
def test_one_kernel_for_q_and_k_counts_as_two_norms_and_is_found_at_both():
    inputs = bf16(5, 192), bf16(5, 16), bf16(5, 16)
    report = fixpass.explain(RotatedQk(), *inputs, target="cuda:sm_90")
    assert report.summary == (
        "On cuda:sm_90: 2 of 2 norms read a strided layout without a copy; the norms take "
        "1 launch instead of 2."
    )
    assert_fired(report, {"?_norm": "strided_qk_norm_rope"})
