"""Models with folded weights at work: every update is seen at the next call, and nothing compiles again."""

import gc
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from fixpass import weights
from fixpass.runtime.versions import GUARDS_WEIGHT_SHAPES, torch_version
from fixpass.runtime.weights import weight_cache as derived
from fixpass.runtime.weights.weight_cache import drop_dead
from fixpass.testing import f32
from helpers.weight_updates import COUNTED, UNCOUNTED, Folds, Reads, by_copy, compiled, same


def held():
    """Bytes of all values that are kept."""
    gc.collect()
    drop_dead()
    entries = [entry for store in list(derived._ALL) for entry in list(store.entries.values())]
    return sum(entry.value.nbytes for entry in entries if entry.value is not None)


@pytest.mark.parametrize(
    "update", [*COUNTED.values(), *UNCOUNTED.values()], ids=[*COUNTED, *UNCOUNTED]
)
def test_a_call_after_an_update_sees_the_new_weights(update):
    module, x = Folds(), f32(3, 64)
    with torch.no_grad():
        run = compiled(module)
        for _ in range(3):
            same(run, module, x)
            update(module)
            same(run, module, x)


STALE = ("copy_", "an optimizer", "load_state_dict", "new data", ".data.copy_")


@pytest.mark.inductor
@torch.no_grad()
def test_where_a_frozen_graph_is_stale_ours_is_right():
    module, x = Folds(), f32(3, 64)
    frozen = torch.compile(lambda x: module(x), backend="inductor")
    ours = torch.compile(lambda x: module(x), backend="fixpass")
    with torch._inductor.config.patch(freezing=True):
        same(frozen, module, x)
    same(ours, module, x)
    for name in STALE:
        {**COUNTED, **UNCOUNTED}[name](module)
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            same(frozen, module, x)
        same(ours, module, x)


def test_an_update_compiles_nothing_again():
    module, x = Folds(), f32(3, 64)
    with torch.no_grad():
        run = compiled(module)
        run(x)
        compiles = counters["stats"]["unique_graphs"]
        for update in COUNTED.values():
            if "swap" not in update.__name__:  # it exchanges the attributes that guards look at
                update(module)
                same(run, module, x)
    assert counters["stats"]["unique_graphs"] == compiles


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_values_are_those_of_eager_for_all_sizes(dynamic):
    module = Folds()
    with torch.no_grad():
        run = compiled(module, dynamic=dynamic)
        for rows in (3, 5, 1):
            same(run, module, f32(rows, 64))


def test_all_graphs_of_a_model_hold_one_value_of_a_weight():
    module = Folds()
    before, compiles = held(), counters["stats"]["unique_graphs"]
    with torch.no_grad():
        run = compiled(module, dynamic=False)
        same(run, module, f32(3, 64))
        once = held() - before
        for rows in (4, 5, 6):
            same(run, module, f32(rows, 64))
    assert counters["stats"]["unique_graphs"] == compiles + 4
    assert held() - before == once > 0


def test_inference_mode_and_no_grad_share_no_tensor_that_the_other_cannot_use():
    module, x = Folds().requires_grad_(False), f32(3, 64)
    run = compiled(module)
    with torch.inference_mode():
        torch.testing.assert_close(run(x), module(x))
        by_copy(module)
        torch.testing.assert_close(run(x), module(x))
    same(run, module, x)
    torch.testing.assert_close(run(x), module(x))


def test_modules_that_share_a_graph_have_values_of_their_own():
    blocks = nn.ModuleList([Folds() for _ in range(4)])
    x = f32(3, 64)
    with torch.no_grad():
        runs = [compiled(block) for block in blocks]
        for _ in range(2):
            for run, block in zip(runs, blocks, strict=True):
                same(run, block, x)
            by_copy(blocks)


def test_a_graph_that_another_graph_updates_a_buffer_of_sees_the_update():
    module = Reads(lambda weight: weight.t().contiguous(), of_buffer=True)

    def step(x):
        module.scale.mul_(2)
        return x + 1

    with torch.no_grad():
        run, update = compiled(module), compiled(step)
        for _ in range(3):
            same(run, module, f32(3, 64))
            update(f32(3))


def test_calls_in_other_threads_see_an_update_that_came_before_them():
    module, x = Folds(), f32(3, 64)
    failures = []
    with torch.no_grad():
        run = compiled(module)
        run(x)

    def call():
        try:
            same(run, module, x)
        except AssertionError as error:
            failures.append(error)

    for _ in range(5):
        by_copy(module)
        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not failures


def test_the_parameters_and_the_state_dict_are_untouched():
    module = Folds()
    before = {name: (p, p.data_ptr(), p.stride()) for name, p in module.named_parameters()}
    values = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        compiled(module)(f32(3, 64))
    for name, parameter in module.named_parameters():
        assert before[name] == (parameter, parameter.data_ptr(), parameter.stride())
    torch.testing.assert_close(dict(module.state_dict()), values, rtol=0, atol=0)


@pytest.mark.parametrize("fold", ["cache", "restride"])
@pytest.mark.parametrize("mode", ["buffered", "undo_log", "double_buffer"])
def test_updates_in_every_mode_are_seen_and_compile_nothing_again(mode, fold):
    module, x = Folds(), f32(3, 64)
    with torch.no_grad():
        run = compiled(module, fold_weights=fold)
        same(run, module, x)
        compiles = counters["stats"]["unique_graphs"]
        for _ in range(3):
            values = {name: torch.randn(p.shape) for name, p in module.named_parameters()}
            with weights.update(module, mode) as update:
                update.load_state_dict(values)
            same(run, module, x)
            weights.reload(module, {name: torch.randn(v.shape) for name, v in values.items()})
            same(run, module, x)
    assert counters["stats"]["unique_graphs"] == compiles


def test_an_update_that_fails_leaves_the_old_values():
    module, x = Folds(), f32(3, 64)

    def dying():
        yield "gate", torch.zeros(256, 64)
        raise RuntimeError("the source died")

    with torch.no_grad():
        run = compiled(module)
        wanted = run(x)
        with pytest.raises(RuntimeError, match="the source died"):
            weights.reload(module, dying())
        torch.testing.assert_close(run(x), wanted, rtol=0, atol=0)


@pytest.mark.skipif(
    torch_version() < GUARDS_WEIGHT_SHAPES,
    reason="Dynamo guards on no shape of a weight's data; the call raises WeightError",
)
def test_a_weight_of_another_shape_compiles_again_and_is_right():
    module, x = Reads(lambda weight: weight.t().contiguous()), f32(3, 64)
    with torch.no_grad():
        run = compiled(module)
        same(run, module, x)
        module.weight.data = torch.randn(1024, 64)
        same(run, module, x)
        module.weight = nn.Parameter(torch.randn(512, 64).bfloat16())
        same(run, module, x)
