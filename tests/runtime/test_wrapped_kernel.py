"""How a wrapped kernel runs a plan: what it copies, what it remembers, what it gives back."""

import torch
from torch import Tensor

from fixpass.runtime import wrapped_kernel
from fixpass.runtime.opaque_norms import OpaqueNorm
from fixpass.runtime.wrapped_kernel import NOTHING, CallPlan, wrapped

CALL = OpaqueNorm(
    "mine::rms_norm", "rms_norm", "x", "eps", "after", arguments=("x", "weight", "eps")
)
INPLACE = OpaqueNorm(
    "mine::add_rms_norm",
    "add_rms_norm",
    "x",
    "eps",
    "after",
    residual="residual",
    out="x",
    total="residual",
    arguments=("x", "residual", "weight", "eps"),
)
WEIGHT = torch.ones(4)


def identity(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x


def test_a_layout_is_planned_once():
    asked = []

    def plan(operands):
        asked.append(operands["x"].stride())
        return NOTHING

    norm = wrapped(identity, CALL, plan)
    x = torch.randn(3, 4)
    for _ in range(3):
        assert norm(x, WEIGHT, 1e-6) is x
    norm(torch.randn(4, 3).t(), WEIGHT, 1e-6)
    norm(x.double(), WEIGHT, 1e-6)
    assert asked == [(4, 1), (1, 3), (4, 1)]


def test_plans_are_forgotten_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(wrapped_kernel, "MOST_PLANS", 2)
    asked = []

    def plan(operands):
        asked.append(len(operands["x"]))
        return NOTHING

    norm = wrapped(identity, CALL, plan)
    for rows in (1, 2, 3, 3, 1):
        norm(torch.randn(rows, 4), WEIGHT, 1e-6)
    assert asked == [1, 2, 3, 1]


def test_only_what_the_plan_names_is_copied():
    seen = {}

    def kernel(x, residual, weight, eps):
        seen.update(x=x, residual=residual)

    plan = CallPlan(frozenset({"x", "out"}), as_rows=True)
    x, residual = torch.randn(4, 2, 3).transpose(0, 2), torch.randn(3, 2, 4)
    wrapped(kernel, INPLACE, lambda operands: plan)(x, residual, WEIGHT, 1e-6)
    assert seen["residual"].data_ptr() == residual.data_ptr()
    assert seen["residual"].shape == seen["x"].shape == (6, 4)
    assert seen["x"].data_ptr() != x.data_ptr()


def test_a_kernel_that_returns_its_arguments_returns_the_callers():
    def kernel(x, residual, weight, eps):
        residual += x
        return x, residual

    plan = CallPlan(frozenset({"x", "residual", "out", "total"}), as_rows=True)
    x, residual = torch.ones(4, 2, 3).transpose(0, 2), torch.ones(4, 2, 3).transpose(0, 2)
    got = wrapped(kernel, INPLACE, lambda operands: plan)(x, residual, WEIGHT, 1e-6)
    assert got[0] is x
    assert got[1] is residual
    assert (residual == 2).all()


def test_rows_that_are_returned_get_the_shape_of_x():
    def padded(x, weight, eps):
        return torch.nn.functional.pad(x, (0, 2))

    norm = wrapped(padded, CALL, lambda operands: CallPlan(as_rows=True))
    assert norm(torch.randn(2, 3, 4), WEIGHT, 1e-6).shape == (2, 3, 6)
