"""Values derived from weights: when they are computed again, where they lie, when they go."""

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.weight_cache import CachedWeight, WeightFunction, drop_dead


def turned(weight):
    return weight.t().contiguous()


def parameter(*shape):
    return nn.Parameter(torch.randn(*(shape or (64, 32))))


def test_a_value_is_computed_once():
    weight, derived = parameter(), CachedWeight(WeightFunction("turned", turned), (1,))
    first = derived.value([None, weight])
    assert derived.value([None, weight]) is first
    assert derived.cache.refreshed == 1


def test_a_weight_that_was_written_gets_its_value_at_the_same_address():
    weight, derived = parameter(), CachedWeight(WeightFunction("turned", turned), (0,))
    first = derived.value([weight])
    with torch.no_grad():
        weight.mul_(2)
    assert derived.value([weight]).data_ptr() == first.data_ptr()
    torch.testing.assert_close(first, weight.t(), rtol=0, atol=0)


def test_a_weight_that_was_replaced_gets_a_new_value_and_calls_under_way_keep_the_old_one():
    weight, derived = parameter(), CachedWeight(WeightFunction("turned", turned), (0,))
    first = derived.value([weight])
    kept = first.clone()
    weight.data = torch.randn(64, 32)
    assert derived.value([weight]) is not first
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_a_value_goes_with_its_weights_and_their_memory_is_not_held():
    derived = CachedWeight(WeightFunction("joined", lambda a, b: torch.cat([a, b])), (0, 1))
    first, second = parameter(), parameter()
    storage = torch.multiprocessing.reductions.StorageWeakRef(first.untyped_storage())
    derived.value([first, second])
    assert derived.nbytes == 2 * first.nbytes
    del first
    assert storage.expired()
    drop_dead()
    assert derived.nbytes == 0


def test_deriving_anything_gives_back_what_nothing_needs():
    derived = CachedWeight(WeightFunction("turned", turned), (0,))
    for _ in range(5):
        derived.value([parameter()])
    weight = parameter()
    derived.value([weight])
    assert derived.nbytes == weight.nbytes


def test_wrapping_the_same_memory_again_and_again_holds_one_value():
    weight, derived = parameter(), CachedWeight(WeightFunction("turned", turned), (0,))
    for _ in range(5):
        weight = nn.Parameter(weight.data)
        derived.value([weight])
    assert derived.nbytes == weight.nbytes


def test_memory_that_was_given_back_is_not_held():
    weight, derived = parameter(), CachedWeight(WeightFunction("turned", turned), (0,))
    derived.value([weight])
    storage = torch.multiprocessing.reductions.StorageWeakRef(weight.untyped_storage())
    weight.data = torch.empty(0)
    assert storage.expired()


def test_each_set_of_weights_has_a_value():
    derived = CachedWeight(WeightFunction("turned", turned), (0,))
    weights = [parameter() for _ in range(3)]
    values = [derived.value([weight]) for weight in weights]
    for weight, value in zip(weights, values, strict=True):
        assert derived.value([weight]) is value
    assert derived.cache.refreshed == 3


def test_a_tensor_whose_writes_are_not_counted_is_computed_from_at_every_call():
    derived = CachedWeight(WeightFunction("turned", turned), (0,))
    with torch.inference_mode():
        weight = torch.randn(64, 32)
    for _ in range(2):
        torch.testing.assert_close(derived.value([weight]), weight.t())
        with torch.inference_mode():
            weight.mul_(2)
    assert derived.nbytes == 0


def test_a_value_made_in_inference_mode_is_a_plain_tensor():
    derived, weight = CachedWeight(WeightFunction("turned", turned), (0,)), parameter()
    with torch.inference_mode():
        assert not derived.value([weight]).is_inference()


def like(*shape):
    return torch.empty(shape, device="meta")


def test_a_value_of_another_shape_than_was_compiled_is_refused():
    derived = CachedWeight(WeightFunction("turned", turned, like=like(32, 64)), (0,))
    derived.value([parameter()])
    with pytest.raises(WeightError, match="turned is computed from weights and was"):
        derived.value([parameter(8, 8)])


def test_a_value_has_the_strides_that_were_compiled_for():
    derived = CachedWeight(
        WeightFunction("turned", lambda weight: weight.t().clone(), like=like(32, 64)), (0,)
    )
    weight = parameter()
    value = derived.value([weight])
    assert value.is_contiguous()
    torch.testing.assert_close(value, weight.t(), rtol=0, atol=0)


def test_graphs_that_compute_the_same_share_the_values():
    recipes = [WeightFunction("turned", turned, signature=name) for name in ("one", "one", "other")]
    first, second, third = (CachedWeight(recipe, (index,)) for index, recipe in enumerate(recipes))
    weight = parameter()
    args = [weight, weight, weight]
    assert first.value(args) is second.value(args)
    assert first.value(args) is not third.value(args)
    with torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(second.value(args), weight.t())
    assert first.value(args) is second.value(args)
    assert first.nbytes == weight.nbytes


def test_a_recipe_that_fails_leaves_the_old_value():
    fails = []

    def recipe(weight):
        if fails:
            raise RuntimeError(fails[0])
        return weight.t().contiguous()

    derived, weight = CachedWeight(WeightFunction("turned", recipe), (0,)), parameter()
    derived.value([weight])
    with torch.no_grad():
        weight.mul_(2)
    fails.append("no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        derived.value([weight])
    fails.clear()
    torch.testing.assert_close(derived.value([weight]), weight.t())


class _WritesThroughData(torch.optim.Optimizer):
    """An optimizer whose kernel torch knows nothing of."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    # One element: too few for the sample of words.
                    param.detach().numpy()[5, 5] -= group["lr"] * float(param.grad[5, 5])


OPTIMIZERS = {
    "plain": lambda params: torch.optim.SGD(params, lr=1.0),
    "foreach": lambda params: torch.optim.SGD(params, lr=1.0, foreach=True),
    "fused SGD": lambda params: torch.optim.SGD(params, lr=1.0, fused=True),
    "fused Adam": lambda params: torch.optim.Adam(params, lr=1.0, fused=True),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=1.0, fused=True),
    "fused Adagrad": lambda params: torch.optim.Adagrad(params, lr=1.0, fused=True),
    "fused group": lambda params: torch.optim.SGD([{"params": params, "fused": True}], lr=1.0),
    "other library": lambda params: _WritesThroughData(params, lr=1.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("closure", [False, True])
def test_a_value_follows_every_step_of_an_optimizer(optimizer, closure):
    weight, derived = parameter(1024, 64), CachedWeight(WeightFunction("turned", turned), (0,))
    step = optimizer([weight]).step
    for row, column in ((5, 5), (5, 5), (7, 3)):
        derived.value([weight])
        weight.grad = torch.zeros_like(weight)
        weight.grad[row, column] = 0.5
        step(lambda: torch.zeros(())) if closure else step()
        torch.testing.assert_close(derived.value([weight]), weight.t(), rtol=0, atol=0)


def test_a_step_computes_no_value_of_a_weight_that_it_leaves_alone():
    frozen, trained = parameter(), parameter()
    derived = CachedWeight(WeightFunction("turned", turned), (0,))
    optimizer = torch.optim.SGD([frozen, trained], lr=1.0, fused=True)
    first = derived.value([frozen])
    trained.grad = torch.ones_like(trained)
    optimizer.step()
    assert derived.value([frozen]) is first
    assert derived.cache.refreshed == 1


def _product(x, value):
    return x @ value


def _product_of_a_view(x, value):
    return x[:, :5] @ value[3:8]


class _Saves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):
        ctx.save_for_backward(value)
        return x @ value

    @staticmethod
    def backward(ctx, gradient):
        (value,) = ctx.saved_tensors
        return gradient @ value.t(), None


@pytest.mark.parametrize("call", [_product, _product_of_a_view, _Saves.apply])
def test_a_value_that_a_backward_still_needs_is_not_written_over(call):
    weight = nn.Parameter(torch.randn(64, 32), requires_grad=False)
    derived = CachedWeight(WeightFunction("turned", turned), (0,))
    x = torch.randn(3, 32, requires_grad=True)
    results, wanted = [], []
    for _ in range(3):
        results.append(call(x, derived.value([weight])).sum())
        wanted.append(torch.autograd.grad(call(x, weight.t().contiguous()).sum(), x)[0])
        weight.lerp_(torch.zeros_like(weight), 0.5)
    torch.testing.assert_close(torch.autograd.grad(sum(results), x)[0], sum(wanted))
    del results
    pointer = derived.value([weight]).data_ptr()
    weight.mul_(2)
    assert derived.value([weight]).data_ptr() == pointer, "no backward needs this one"
