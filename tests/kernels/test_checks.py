"""What the kernels refuse, and that they say so before any launch."""

import pytest
import torch

from fixpass.runtime.kernels.add_rms_norm import add_rms_norm
from fixpass.runtime.kernels.qk_norm import qk_norm
from fixpass.runtime.kernels.rms_norm import layer_norm, rms_norm


def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


def norm(kernel=rms_norm, x=None, weight=None, out=None, **options):
    x = bf16(4, 64) if x is None else x
    kernel(x, weight, 1e-6, out=torch.empty_like(x) if out is None else out, **options)


def add(x=None, residual=None, out=None, sum_out=None, **options):
    x = bf16(4, 64) if x is None else x
    residual = bf16(4, 64) if residual is None else residual
    out = torch.empty_like(x) if out is None else out
    sum_out = torch.empty_like(x) if sum_out is None else sum_out
    add_rms_norm(x, residual, None, 1e-6, out=out, sum_out=sum_out, **options)


def qk(q=None, k=None, q_weight=None, k_weight=None, **outs):
    q, k = bf16(2, 4, 64) if q is None else q, bf16(2, 1, 64) if k is None else k
    outs = {"q_out": torch.empty_like(q), "k_out": torch.empty_like(k), **outs}
    qk_norm(q, k, q_weight, k_weight, 1e-6, **outs)


X = bf16(4, 64)
PACKED = bf16(2, 6, 64)
ON_META = torch.empty(64, dtype=torch.bfloat16, device="meta")
REFUSED = {
    "weight_size": (lambda: norm(weight=bf16(63)), "weight bf16[63]: want [64]"),
    "weight_rank": (lambda: norm(weight=bf16(1, 64)), "weight bf16[1, 64]: want [64]"),
    "weight_device": (lambda: norm(weight=ON_META), "weight bf16[64] is on meta"),
    "weight_dtype": (lambda: norm(weight=torch.ones(64, dtype=torch.int32)), "weight int32[64]"),
    "bias_size": (lambda: norm(layer_norm, bias=bf16(1)), "bias bf16[1]: want [64]"),
    "integers": (lambda: norm(x=torch.ones(4, 64, dtype=torch.int64)), "x int64[4, 64]: want"),
    "doubles": (lambda: norm(x=torch.ones(4, 64, dtype=torch.float64)), "x f64[4, 64]: want"),
    "scalar": (lambda: norm(x=bf16()), "x bf16[]: has no hidden"),
    "hidden_size": (lambda: norm(x=bf16(2, 40000)), "x bf16[2, 40000]: hidden size over 32768"),
    "out_shape": (lambda: norm(out=bf16(64, 4)), "out bf16[64, 4]: shape differs"),
    "out_integer": (lambda: norm(out=torch.ones(4, 64, dtype=torch.int8)), "out int8[4, 64]"),
    "out_expanded": (
        lambda: norm(x=bf16(1, 64).expand(4, 64), out=bf16(1, 64).expand(4, 64)),
        "out bf16[4, 64][0, 1]: several indices",
    ),
    "out_over_x": (lambda: norm(x=PACKED[0], out=PACKED.view(-1, 64)[1:7]), "lies partly over x"),
    "norm_dtype": (lambda: norm(norm_dtype=torch.int8), "norm_dtype torch.int8"),
    "residual_shape": (lambda: add(residual=bf16(64)), "residual bf16[64]: shape differs"),
    "residual_integer": (lambda: add(residual=X.to(torch.int32)), "residual int32[4, 64]"),
    "sum_dtype": (lambda: add(sum_out=X.float()), "sum_out f32[4, 64]: x + residual is"),
    "sum_expanded": (lambda: add(sum_out=bf16(1, 64).expand(4, 64)), "sum_out bf16[4, 64][0, 1]"),
    "sum_is_out": (lambda: add(out=X, sum_out=X), "shares elements with sum_out"),
    "k_hidden": (lambda: qk(k=bf16(2, 1, 32)), "k bf16[2, 1, 32]: hidden size and dtype"),
    "k_weight": (lambda: qk(q_weight=bf16(64)), "both or neither"),
    "k_out_over_q": (
        lambda: qk(q=PACKED[:, :4], k_out=PACKED[:, 3:4]),
        "k_out bf16[2, 1, 64][384, 64, 1]: shares elements with q",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_named_before_any_launch(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        call()
    assert message in str(error.value)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (3, 0, 64)])
def test_nothing_to_do_launches_nothing(shape):
    x = bf16(*shape)  # a launch would raise: no device, and not interpreted
    norm(x=x)
    norm(layer_norm, x=x)
    add(x=x, residual=x.clone())
    qk(q=x[None], k=x[None])
