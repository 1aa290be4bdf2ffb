"""Attributes are found through wrappers, and keywords through partials, wrappers and methods."""

import functools
import gc

import diffusers
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fixpass.modules import accepted_kwargs, find_attr, unwrapped


class Wrapper(nn.Module):
    def __init__(self, name, module):
        super().__init__()
        setattr(self, name, module)


class Model(nn.Linear):
    guidance = 0
    config = None

    def __init__(self):
        super().__init__(2, 2)
        self.names = []

    @property
    def twice(self):
        return 2 * self.in_features


@pytest.mark.parametrize(
    "wrap",
    [
        functools.partial(Wrapper, "_fsdp_wrapped_module"),
        functools.partial(Wrapper, "module"),
        functools.partial(Wrapper, "_orig_mod"),
        checkpoint_wrapper,
        functools.partial(torch.compile, backend="eager"),
        nn.DataParallel,
        lambda model: torch.compile(checkpoint_wrapper(Wrapper("module", model)), backend="eager"),
    ],
)
def test_an_attribute_is_found_through_wrappers_and_falsy_ones_are_values(wrap):
    model = Model()
    wrapped = wrap(model)
    assert find_attr(wrapped, "guidance") == 0
    assert find_attr(wrapped, "config") is None
    assert find_attr(wrapped, "names") is model.names
    assert find_attr(wrapped, "weight") is model.weight
    assert find_attr(wrapped, "twice") == 4
    assert unwrapped(wrapped) is model


def test_the_outermost_of_two_is_found():
    outer = Wrapper("module", Model())
    outer.guidance = 3
    assert find_attr(outer, "guidance") == 3


def test_an_attribute_that_nobody_has_raises_and_names_the_modules():
    with pytest.raises(AttributeError, match="no attribute 'depth' in Wrapper -> Model"):
        find_attr(Wrapper("module", Model()), "depth")
    assert find_attr(Wrapper("module", Model()), "depth", None) is None


def test_wrappers_in_a_cycle_end_the_search():
    first, second = Wrapper("module", nn.Identity()), Wrapper("_orig_mod", nn.Identity())
    first._modules["module"], second._modules["_orig_mod"] = second, first
    with pytest.raises(AttributeError, match="in Wrapper -> Wrapper"):
        find_attr(first, "depth")


def test_a_wrapper_that_is_no_module_is_looked_through():
    class Engine:
        def __init__(self):
            self.module = Model()

    assert find_attr(Engine(), "twice") == 4


def test_a_model_with_a_child_called_module_is_no_wrapper():
    model = nn.ModuleDict({"module": Model(), "head": nn.Linear(2, 2)})
    assert unwrapped(model) is model


def test_attributes_that_a_model_makes_up_are_found_behind_its_wrapper():
    class Configured(Model):
        def __getattr__(self, name):
            return 28 if name == "depth" else super().__getattr__(name)

    assert find_attr(torch.compile(Configured(), backend="eager"), "depth") == 28


def plain(a, b=1, *, c=2):
    return a + b + c


def open_ended(a, **kwargs):
    return kwargs


def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Step:
    def step(self, sample, *, eta=0.0):
        return sample

    def loose(self, sample, **kwargs):
        return self.step(sample, **kwargs)

    def unknown(self, sample, callback, **kwargs):
        return callback(sample, **kwargs)

    def reading(self, sample, **kwargs):
        eta = kwargs.pop("eta", 0.0)
        return self.step(sample, eta=eta, **kwargs)

    def copying(self, sample, **kwargs):
        return self.step(sample, **dict(kwargs))

    def dropping(self, sample, **kwargs):
        return sample

    def around(self, sample, **kwargs):
        return self.around(sample, **kwargs)

    __call__ = loose


def test_names_come_through_partials_wrappers_and_bound_methods():
    assert accepted_kwargs(plain).names == {"a", "b", "c"}
    assert accepted_kwargs(logged(logged(plain))).names == {"a", "b", "c"}
    assert accepted_kwargs(Step().step).names == {"sample", "eta"}
    assert accepted_kwargs(functools.partial(plain, 1, c=3)).names == {"b", "c"}
    assert accepted_kwargs(functools.partial(Step().step, torch.ones(1))).names == {"eta"}
    assert accepted_kwargs(functools.partial(logged(Step.step), Step())).names == {"sample", "eta"}
    assert accepted_kwargs(Step).names == set()
    assert "input" in accepted_kwargs(torch.compile(nn.Linear(2, 2), backend="eager")).names


def test_kwargs_that_go_to_a_strict_function_are_not_taken():
    """A pipeline passed everything on because `**kwargs` was there; the step inside was strict."""
    loose = accepted_kwargs(Step().loose)
    assert loose.var_keyword
    assert loose.strict
    assert (loose.accepts("eta"), loose.accepts("generator")) == (True, False)
    assert accepted_kwargs(Step()).accepts("generator") is False


def test_what_the_source_does_not_show_is_not_known():
    for function in (
        Step().unknown,
        Step().copying,
        Step().around,
        print,
        eval("lambda **k: f(**k)"),
    ):
        accepted = accepted_kwargs(function)
        assert (accepted.accepts("generator"), accepted.strict) == (None, None), function


def test_a_keyword_that_is_read_is_taken_and_one_that_a_call_gives_is_not():
    reading = accepted_kwargs(Step().reading)
    assert (reading.accepts("eta"), reading.accepts("generator")) == (True, False)
    assert reading.inner.accepts("eta") is False


def test_kwargs_that_are_used_for_nothing_are_taken_and_said_to_be_ignored():
    dropping = accepted_kwargs(Step().dropping)
    assert (dropping.accepts("generator"), dropping.strict, dropping.ignored) == (True, False, True)


def test_a_partial_that_carries_the_original_forward_is_followed():
    class Transformer(nn.Module):
        def _original_forward(self, hidden_states, timestep=None):
            return hidden_states

    def cached_forward(self, *args, **kwargs):
        return self._original_forward(*args, **kwargs)

    accepted = accepted_kwargs(functools.partial(cached_forward, Transformer()))
    assert (accepted.accepts("timestep"), accepted.accepts("guidance")) == (True, False)


def test_schedulers_of_diffusers_take_what_their_step_takes():
    flow = accepted_kwargs(diffusers.FlowMatchEulerDiscreteScheduler().step)
    assert (flow.accepts("generator"), flow.accepts("eta")) == (True, False)
    assert accepted_kwargs(diffusers.DDIMScheduler().step).accepts("eta") is True


def test_two_thousand_short_lived_functions_find_no_stale_entry():
    stale = 0
    for index in range(2000):
        space = {}
        exec(f"def f(x{index}): return x{index}", space)
        stale += accepted_kwargs(space.pop("f")).names != {f"x{index}"}
    assert stale == 0


def test_the_cache_keeps_no_function_alive():
    from fixpass.integrations.sglang import step_kwargs as module

    gc.collect()
    before = len(module._SIGNATURES)

    def short_lived(a):
        return a

    accepted_kwargs(short_lived)
    assert len(module._SIGNATURES) == before + 1
    del short_lived
    gc.collect()
    assert len(module._SIGNATURES) <= before
