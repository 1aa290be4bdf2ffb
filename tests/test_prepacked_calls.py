"""Compiled layers over packed weights: every update is seen, and memory goes with the model."""

import gc
import random

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fixpass
from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights import prepack
from fixpass.runtime.weights import weight_cache as derived
from fixpass.runtime.weights.prepack import packable_dtypes
from fixpass.testing import f32
from helpers.compiling import compiled_anew as compiled
from helpers.prepacking import Joined, same
from helpers.weight_updates import COUNTED, UNCOUNTED, Folds

pytestmark = pytest.mark.skipif(
    not packable_dtypes(), reason="no oneDNN here, which packs the weights, or no x86"
)


def plain_bytes():
    """Bytes of values that are kept as they are, in all of this process."""
    stores = [store for store in list(derived._ALL) if store.function.packer is None]
    values = [entry.value for store in stores for entry in store.entries.values()]
    return sum(value.nbytes for value in values if value is not None)


@pytest.mark.parametrize(
    "update", [*COUNTED.values(), *UNCOUNTED.values()], ids=[*COUNTED, *UNCOUNTED]
)
@torch.no_grad()
def test_a_call_after_any_update_reads_the_new_weights(update):
    module, x = Folds(), f32(3, 64)
    run = compiled(module)
    for _ in range(2):
        for got, wanted in zip(run(x), module(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        with torch.enable_grad():
            update(module)
    assert "prepack-linears" in str(fixpass.last_reports()[-1])


@torch.no_grad()
def test_a_forward_derivative_is_refused_with_the_way_out():
    module, x = Joined(), f32(3, 128)
    run = compiled(module)
    run(x)
    with forward_ad.dual_level():
        with pytest.raises(WeightError, match="disable"):
            run(forward_ad.make_dual(x, torch.ones_like(x)))
        same(run, module, x)


@torch.no_grad()
def test_weights_that_change_under_another_default_device_are_seen():
    module, x = Joined(), f32(3, 128)
    torch.set_default_device("meta")
    try:
        run = compiled(module)
        run(x)
        module.gate.mul_(2)
        got = run(x)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got, module(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_packed_weight_is_held_whatever_happens_and_none_when_the_model_is_gone():
    gc.collect()
    before = len(prepack._PACKED)
    plain = plain_bytes()
    module, x = Joined(), f32(3, 128)
    run = compiled(module)
    for step in range(5):
        run(x)
        assert len(prepack._PACKED) == before + 1, step
        gc.collect()
        assert plain_bytes() == plain, "it is kept packed, and not as it is"
        module.gate.mul_(0.5)
        module.up = nn.Parameter(torch.randn(512, 128))
    run(x)
    del run, module
    torch._dynamo.reset()
    gc.collect()
    assert len(prepack._PACKED) == before


SIZE = 192  # square, so that all steps fit together, and large enough to be worth keeping


class Chain(nn.Module):
    """Random layers, one behind the other, over a few values of weights and views of them."""

    VALUES = (
        lambda a, b: torch.cat([a[:96], b[96:]]),
        lambda a, b: a.t().contiguous(),
        lambda a, b: a + b,
    )
    VIEWS = (
        lambda w: w,
        lambda w: w.t(),
        lambda w: w[:],
        lambda w: w.view(2, 96, SIZE).flatten(0, 1),
    )
    LAYERS = (
        lambda x, w, bias: torch.nn.functional.linear(x, w),
        lambda x, w, bias: torch.nn.functional.linear(x, w, bias),
        lambda x, w, bias: x @ w,
        lambda x, w, bias: torch.nn.functional.linear(x, w, x[0, 0] + bias),
        lambda x, w, bias: x + w[: x.shape[1]] * x.mean(),
    )

    def __init__(self, seed):
        super().__init__()
        chance = random.Random(seed)
        self.a, self.b = (nn.Parameter(torch.randn(SIZE, SIZE)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(SIZE))
        self.steps = [
            (
                chance.choice(self.LAYERS[: 5 if chance.random() < 0.2 else 4]),
                chance.randrange(len(self.VALUES)),
                chance.choice(self.VIEWS),
            )
            for _ in range(chance.randint(2, 6))
        ]

    def forward(self, x):
        values = [value(self.a, self.b) for value in self.VALUES]
        for layer, index, view in self.steps:
            x = layer(x, view(values[index]), self.bias)
            # Keeps values near one, whatever comes before.
            x = x / x.abs().mean()
        return x


@pytest.mark.parametrize("seed", range(24))
@torch.no_grad()
def test_random_layers_one_behind_the_other_give_what_eager_gives(seed):
    torch.manual_seed(seed)
    module, x = Chain(seed), f32(2, 3, SIZE)
    run = compiled(module)
    for update in ("copy_", "a new parameter", "numpy"):
        torch.testing.assert_close(run(x), module(x), rtol=1e-3, atol=1e-3, check_stride=True)
        {**COUNTED, **UNCOUNTED}[update](module)
        module.requires_grad_(False)
    torch.testing.assert_close(run(x), module(x), rtol=1e-3, atol=1e-3)
