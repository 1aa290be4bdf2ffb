"""flashinfer computes offsets in 32 bits: a call that reaches further runs the reference.

The rows lie in a sparse file of 8.6 GB, of which two pages are written.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fixpass.runtime import providers
from helpers import standins

HIDDEN, EPS = 64, 1e-6


class Ops(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def two_rows(folder, name, pitch):
    """Two rows that lie `pitch` elements apart."""
    count = pitch + HIDDEN
    storage = torch.from_file(str(folder / name), True, count, dtype=torch.bfloat16)
    rows = storage.as_strided((2, HIDDEN), (pitch, 1))
    return rows.copy_(torch.randn(2, HIDDEN))


def truth(x, weight, offset):
    h = x.double()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * (weight.double() + offset)


@pytest.mark.parametrize("far", ["nothing", "x", "residual"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rows_that_reach_2_32_elements_run_the_reference(tmp_path, far, offset):
    standins.register()
    torch.manual_seed(0)
    # The last element is at pitch + 63: 2^32 - 1, and 2^32.
    pitch = {"nothing": 2**32 - HIDDEN}.get(far, 2**32 - HIDDEN + 1)
    x = two_rows(tmp_path, "x", pitch if far != "residual" else HIDDEN)
    residual = two_rows(tmp_path, "residual", pitch if far == "residual" else HIDDEN)
    weight = torch.randn(HIDDEN).bfloat16()
    steps = {"weight_offset": offset, "weight_dtype": torch.float32}
    with Ops() as of_norm:
        y = providers.flashinfer_rms_norm(x, weight, None, EPS, **steps)
    with Ops() as of_add:
        z, total = providers.flashinfer_add_rms_norm(x, residual, weight, None, EPS, **steps)
    called = [any(name.startswith("flashinfer") for name in ops.names) for ops in (of_norm, of_add)]
    assert called == [far != "x", far == "nothing"]
    close = {"rtol": 0.01, "atol": 0.01, "check_dtype": False}
    torch.testing.assert_close(y, truth(x, weight, offset), **close)
    torch.testing.assert_close(total, x.clone() + residual.clone(), rtol=0, atol=0)
    torch.testing.assert_close(z, truth(total, weight, offset), **close)


@pytest.mark.parametrize(("rows", "called"), [(2**26, True), (2**26 + 1, False)])
def test_a_dense_result_that_reaches_2_32_elements_runs_the_reference(rows, called):
    """One row given many times: x reaches nowhere, its result does. Without memory."""
    standins.register()
    x = torch.empty(HIDDEN, dtype=torch.bfloat16, device="meta").expand(rows, HIDDEN)
    weight = torch.empty(HIDDEN, dtype=torch.bfloat16, device="meta")
    for call in (
        lambda: providers.flashinfer_rms_norm(x, weight, None, EPS),
        lambda: providers.flashinfer_add_rms_norm(x, x, weight, None, EPS)[0],
    ):
        with Ops() as ops:
            assert call().is_contiguous()
        assert any(name.startswith("flashinfer") for name in ops.names) == called
