"""Tensors of every kind around a norm give what they give in eager mode.

Complex, sparse, empty, nested and wrapped ones, and weights of any stride, shape and dtype.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fixpass.testing import assert_same, bf16, f32
from helpers.compiling import compiled
from helpers.spellings import llama

# Tensors that are not dense floats


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_norm_is_left_alone(dtype):
    def fn(x, weight):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight

    def of_magnitude(x, weight):
        return x * torch.rsqrt(x.abs().pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    x = torch.randn(4, 8, dtype=dtype)
    for model in (fn, of_magnitude):
        assert_same(compiled(model), model, x, torch.randn(8, dtype=dtype))
        assert_same(compiled(model), model, x, torch.randn(8))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_operand_beside_a_norm():
    def fn(adjacency, x, weight):
        return torch.sparse.mm(adjacency, llama(x, weight))

    for layout in ("to_sparse", "to_sparse_csr"):
        adjacency = getattr(torch.eye(4), layout)()
        assert_same(compiled(fn, fullgraph=False), fn, adjacency, f32(4, 8), f32(8))


def test_integers_normalised_after_a_cast():
    def fn(x, weight):
        return llama(x.float(), weight), F.layer_norm(x.double(), (8,))

    assert_same(compiled(fn), fn, torch.randint(-9, 9, (4, 8)), f32(8))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8), (0,)])
@pytest.mark.parametrize("dynamic", [None, True])
def test_empty_tensors(shape, dynamic):
    def fn(x, weight):
        s = x + x
        return (
            llama(x, weight),
            F.rms_norm(x, x.shape[-1:], weight),
            F.layer_norm(s, x.shape[-1:], weight),
            s,
        )

    x, weight = f32(*shape), f32(shape[-1])
    assert_same(compiled(fn, dynamic), fn, x, weight)
    assert_same(
        compiled(fn, dynamic), fn, x.requires_grad_(), weight.requires_grad_(), gradients=True
    )


def test_a_tensor_without_dimensions():
    def fn(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), F.layer_norm(x[None], (1,))

    assert_same(compiled(fn), fn, f32())


class Wrapped(torch.Tensor):
    """A wrapper subclass that counts its operations; results are wrapped again."""

    count = 0

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner):
        self.inner = inner

    # AOTAutograd of torch 2.11 formats subclasses while it traces; torch's own __repr__ reads values.
    def __repr__(self):
        return f"Wrapped({tuple(self.shape)})"

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.count += 1
        args, kwargs = torch.utils._pytree.tree_map_only(
            Wrapped, lambda t: t.inner, (args, kwargs or {})
        )
        result = func(*args, **kwargs)
        return torch.utils._pytree.tree_map_only(torch.Tensor, Wrapped, result)


@pytest.mark.parametrize(
    "model", [llama, lambda x, w: F.layer_norm(x, (8,), w)], ids=["llama", "layer_norm"]
)
def test_a_wrapper_subclass_is_unwrapped_and_wrapped_again(model):
    x, weight = f32(4, 24)[:, 8:16], f32(8)
    got = compiled(model)(Wrapped(x), weight)
    assert type(got) is Wrapped
    torch.testing.assert_close(got.inner, model(x, weight))


def test_a_parameter_that_is_a_subclass():
    module = nn.Linear(8, 8, bias=False)
    module.weight = nn.Parameter(Wrapped(module.weight.detach()))

    def fn(x):
        return llama(F.linear(x, module.weight), x[0])

    x = f32(4, 8)
    torch.testing.assert_close(compiled(fn)(x).inner, fn(x).inner)


def test_a_nested_tensor():
    rows = [f32(3, 8), f32(5, 8)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)

    def fn(x):
        return F.layer_norm(x, (8,)) * 2

    got = compiled(fn)(x)
    for a, b in zip(got.unbind(), rows, strict=True):
        torch.testing.assert_close(a, fn(b))


def test_tensors_without_memory():
    x, weight = f32(4, 8).to("meta"), f32(8).to("meta")
    assert compiled(llama)(x, weight).shape == (4, 8)


def test_values_that_are_not_finite():
    x = torch.tensor([[float("nan")] * 8, [float("inf")] * 8, [1e30] * 8, [0.0] * 8])
    assert_same(compiled(llama), llama, x, f32(8))
    assert_same(compiled(llama), llama, torch.full((2, 8), 6e4, dtype=torch.float16), f32(8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    linear = nn.Linear(8, 8)

    def fn(x, weight):
        y = linear(x)
        return llama(y, weight), F.layer_norm(y, (8,), weight, weight), F.rms_norm(y, (8,), weight)

    with torch.autocast("cpu", dtype):
        assert_same(compiled(fn), fn, f32(4, 8), f32(8), rtol=1.6e-2, scaled=True)


# Weights


@pytest.mark.parametrize(
    "weight",
    [
        lambda: f32(16)[::2],
        lambda: f32(8, 3)[:, 1],
        lambda: f32(1).expand(8),
        lambda: f32(9)[1:],
        lambda: f32(1, 8),
        lambda: f32(4, 8),
        lambda: f32(1),
        lambda: f32(),
        lambda: torch.randint(1, 5, (8,)),
        lambda: torch.randn(8, dtype=torch.float64),
        lambda: torch.randn(8, dtype=torch.complex64),
    ],
    ids=[
        "every second",
        "column",
        "expanded",
        "offset",
        "(1, n)",
        "a row each",
        "(1,)",
        "()",
        "int",
        "f64",
        "complex",
    ],
)
def test_a_weight_of_any_stride_shape_and_dtype(weight):
    assert_same(compiled(llama), llama, f32(4, 8), weight())
    assert_same(compiled(llama), llama, bf16(4, 8), weight())


def test_gradients_of_a_weight_alone_and_of_an_input_alone():
    for x, weight in ((f32(4, 8), f32(8).requires_grad_()), (f32(4, 8).requires_grad_(), f32(8))):
        for fn in (
            llama,
            lambda x, w: F.layer_norm(x, (8,), w),
            lambda x, w: torch.ops.fixpass.rms_norm(x, w, None, 1e-6),
        ):
            assert_same(compiled(fn), fn, x, weight, gradients=True)


def add_norm(x, residual, weight):
    s = x + residual
    return llama(s, weight), s


def test_gradients_of_a_residual_norm_of_which_one_result_is_used():
    x, residual, weight = (t.requires_grad_() for t in (f32(4, 8), f32(4, 8), f32(8)))

    def op(i):
        return lambda x, r, w: torch.ops.fixpass.add_rms_norm(x, r, w, None, 1e-6)[i]

    for fn in (op(0), op(1), op(slice(None)), add_norm):
        assert_same(compiled(fn), fn, x, residual, weight, gradients=True)
