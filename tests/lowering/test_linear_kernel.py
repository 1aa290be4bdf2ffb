"""The contract of skinny_linear: every constraint stops what it should, and none adds a guard."""

import pytest
import torch
from torch import nn
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fixpass.lowering import inductor_linear
from fixpass.lowering.layout import Layout
from fixpass.lowering.linear_kernel import SKINNY_LINEAR
from fixpass.lowering.site import Site
from fixpass.runtime import linear, providers

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def layer(**changed):
    """A layer that the kernel takes, with some operands changed."""
    shapes = {"x": (6, 128), "weight": (128, 7), "bias": (7,)}
    layouts = {name: Layout.contiguous(shape, BF16) for name, shape in shapes.items()}
    return Site("linear", layouts | changed, "cpu")


def test_each_constraint_broken_in_turn_is_the_one_named():
    assert SKINNY_LINEAR.check(layer())
    named = set()
    for changed in (
        {"x": Layout.contiguous((2, 3, 128), BF16)},
        {"x": Layout.contiguous((17, 128), BF16)},
        {"x": Layout.contiguous((6, 128), F64)},
        {"weight": Layout.contiguous((2, 128, 7), BF16)},
        {"weight": Layout.contiguous((128, 7), F32)},
        {"bias": Layout.contiguous((1, 7), BF16)},
        {"bias": Layout.contiguous((7,), F32)},
        *({"weight": Layout((128, 7), s, BF16)} for s in ((14, 2), (3, 1), (0, 1), (1, 100))),
    ):
        verdict = SKINNY_LINEAR.check(layer(**changed))
        assert not verdict
        assert str(verdict.constraint) in str(verdict)
        named.add(verdict.constraint)
    assert named == set(SKINNY_LINEAR.contract.constraints)


def test_rows_and_columns_of_any_pitch_are_taken():
    for stride in ((7, 1), (9, 1), (1, 128), (1, 131)):
        assert SKINNY_LINEAR.check(layer(weight=Layout((128, 7), stride, BF16)))


def test_unknown_rows_are_taken_and_an_unknown_pitch_is_not_proved():
    env = ShapeEnv()
    rows, pitch = env.create_unbacked_symint(), env.create_unbacked_symint()
    assert SKINNY_LINEAR.check(layer(x=Layout((rows, 128), (pitch, 1), BF16)))
    verdict = SKINNY_LINEAR.check(layer(weight=Layout((128, 7), (pitch, 1), BF16)))
    assert verdict.answer is None
    assert env.guards == []


def test_the_row_names_a_function():
    assert callable(providers.load(SKINNY_LINEAR.callable))


@torch.no_grad()
@pytest.mark.inductor
def test_inductor_gives_the_kernel_a_buffer_and_a_cached_graph_finds_it():
    torch._dynamo.reset()
    layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8, bias=False))
    compiled = torch.compile(layers, backend="fixpass", dynamic=True)
    for rows in (3, 40):
        x = torch.randn(rows, 8)
        (result, code) = run_and_get_code(compiled, x)
        torch.testing.assert_close(result, layers(x))
        if code:
            assert code[0].count(f"extern_kernels.{inductor_linear.NAME}(") == 2
    # As in a process that has compiled nothing.
    inductor_linear.register_linear.cache_clear()
    inductor_linear.register_linear()
    assert getattr(extern_kernels, inductor_linear.NAME) is not linear.direct_call()
    torch.testing.assert_close(compiled(x), layers(x))
    assert getattr(extern_kernels, inductor_linear.NAME) is linear.direct_call()
