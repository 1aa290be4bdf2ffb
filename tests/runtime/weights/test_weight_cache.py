"""Values derived from weights: when they are computed again, where they lie, when they go."""

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.weight_cache import CachedWeight, WeightFunction, drop_dead
from fixpass.runtime.weights.weight_version import WeightVersion


def turned(weight):
    return weight.t().contiguous()


def parameter(*shape):
    return nn.Parameter(torch.randn(*(shape or (64, 32))))


def test_a_value_is_computed_once():
    weight, derived = parameter(), CachedWeight(WeightFunction("turned", turned), (1,))
    first = derived.value([None, weight])
    assert derived.value([None, weight]) is first
    assert derived.store.refreshed == 1


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
    assert derived.store.refreshed == 3


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
    with pytest.raises(WeightError, match="turned is derived from weights and was"):
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


def test_memory_that_was_freed_and_taken_again_is_told_apart():
    """One parameter, one address, one version, the same values in the words that are compared."""
    weight = parameter(4, 4)
    source = WeightVersion(weight)
    assert source.is_same(weight)
    storage = weight.untyped_storage()
    weight.data = torch.empty(0)
    again = torch.empty(0)
    again.set_(storage, 0, (4, 4))
    # The very same storage is no other memory.
    weight.data = again
    assert source.is_same(weight)
    del storage, again
    weight.data = weight.data.clone()
    assert not source.is_same(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(1,), (3,), (17, 5), (64, 128), (0, 4)])
def test_every_shape_can_be_watched(dtype, shape):
    weight = torch.ones(shape).to(dtype)
    source = WeightVersion(weight)
    assert source.is_same(weight)
    if weight.nbytes >= 64:
        weight.data.copy_(torch.full(shape, 2.0).to(dtype))
        assert not source.is_same(weight)


def test_a_narrow_view_is_watched_within_its_own_memory():
    whole = torch.randn(64, 64)
    weight = nn.Parameter(whole[:, 7:9])
    source = WeightVersion(weight)
    assert source.is_same(weight)
    weight.data.copy_(torch.randn(64, 2))
    assert not source.is_same(weight)


def test_a_write_that_is_not_counted_and_too_small_to_be_seen_is_announced_by_its_version():
    weight = parameter(1024, 1024)
    source = WeightVersion(weight)
    weight.data[5, 5] += 1
    assert source.is_same(weight)
    torch.autograd.graph.increment_version(weight)
    assert not source.is_same(weight)
