"""A census: every tensor that a model reaches, under a path that leads to it, and its memory."""

import functools
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.reachable import reachable, resolve
from fixpass.weights import census

MADE_FOR_ALL = torch.tensor([1.5, 2.5])


@functools.lru_cache
def cached_table(size):
    return torch.arange(float(size))


class Cached(nn.Module):
    """Tensors on the class, and in a cache of a method."""

    table = torch.ones(3)

    @functools.lru_cache  # noqa: B019
    def steps(self, size):
        return torch.zeros(size)

    def forward(self, x):
        return x + MADE_FOR_ALL


class Pair(NamedTuple):
    one: torch.Tensor
    other: int


class Slotted:
    """Slots, no dict, and as pydantic has it: a look-up of anything else raises."""

    __slots__ = ("empty", "held")

    def __getattr__(self, name):
        raise RuntimeError(name)


@dataclass
class Config:
    held: torch.Tensor


def names_of(model, tensor, **options):
    return [held.name for held in reachable(model, **options) if held.value is tensor]


def add(x, y):
    return x + y


def closure_over(held):
    return lambda x: x + held


def default_of(held):
    def function(x, y=held, *, z=held):
        return x + y + z

    return function


def method_of(held):
    return Config(held).__eq__


def slotted(held):
    found = Slotted()
    found.held = held
    return found


PLACES = {
    "x": lambda t: t,
    "x['k']": lambda t: {"k": t},
    "x['a']['b'][1]": lambda t: OrderedDict(a={"b": [0, t]}),
    "x[(torch.float32, torch.Size([2, 3]))]": lambda t: {(torch.float32, torch.Size([2, 3])): t},
    "x[0]": lambda t: Pair(t, 1),
    "x.held": Config,
    "x.a.b": lambda t: SimpleNamespace(a=SimpleNamespace(b=t)),
    "x<held>": closure_over,
    "x.__defaults__[0]": default_of,
    "x.args[0]": lambda t: functools.partial(add, t),
    "x.keywords['y']": lambda t: functools.partial(add, y=t),
    "x.__self__.held": method_of,
}


@pytest.mark.parametrize("path", PLACES)
def test_a_tensor_is_found_under_a_path_that_leads_to_it(path):
    model, tensor = nn.Module(), torch.randn(3)
    model.x = PLACES[path](tensor)
    assert path in names_of(model, tensor)
    assert resolve(model, path)[1] is tensor


def test_a_slot_and_a_tensor_on_a_parameter_are_found():
    model, tensor = nn.Module(), torch.randn(3)
    model.slots = slotted(tensor)
    model.weight = nn.Parameter(torch.randn(2))
    model.weight.scale = tensor
    assert names_of(model, tensor) == ["weight.scale", "slots.held"]
    assert resolve(model, "weight.scale")[1] is tensor


def test_caches_of_functions_and_tensors_on_classes_are_found():
    model = nn.Sequential(Cached())
    steps = model[0].steps(4)
    model.table_of = cached_table
    table = cached_table(5)
    assert names_of(model, Cached.table) == ["0.table"]
    (name,) = names_of(model, steps)
    assert name.startswith("0.steps<")
    (name,) = names_of(model, table)
    assert name.startswith("table_of<")
    with pytest.raises(WeightError, match="call cache_clear of that function"):
        resolve(model, name)


def test_globals_are_found_on_request():
    model = nn.Sequential(Cached())
    assert names_of(model, MADE_FOR_ALL) == []
    (name,) = names_of(model, MADE_FOR_ALL, module_globals=True)
    assert name.endswith("test_census:MADE_FOR_ALL")
    (entry,) = (e for e in census(model, module_globals=True).entries if e.value is MADE_FOR_ALL)
    assert entry.kind == "global"


def test_hooks_are_followed_and_cycles_end():
    model, tensor = nn.Linear(2, 2), torch.randn(3)
    model.register_forward_hook(closure_over(tensor))
    model.me = [model, {"again": model}]
    assert len(names_of(model, tensor)) == 1


def test_kinds_say_where_a_tensor_is():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2))
    model.register_buffer("saved", torch.zeros(2))
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    for name in ("attribute", "object", "container", "closure"):
        path = {"object": "x.held", "container": "x['k']", "closure": "x<held>"}.get(name, "x")
        setattr(model, name, PLACES[path](torch.zeros(2)))
    kinds = [(entry.names[0].split("<")[0], entry.kind) for entry in census(model).entries]
    assert kinds == [
        ("weight", "weight"),
        ("saved", "weight"),
        ("scratch", "buffer"),
        ("attribute", "attribute"),
        ("object.held", "object"),
        ("container['k']", "container"),
        ("closure", "closure"),
    ]


def test_a_tensor_has_one_entry_with_all_its_names_and_those_that_share_its_memory():
    model = nn.Module()
    model.a = nn.Linear(3, 2, bias=False)
    model.b = nn.Linear(3, 2, bias=False)
    model.b.weight = model.a.weight
    model.first_row = model.a.weight.data[0]
    weight, row = census(model).entries[::-1]
    assert weight.names == ("a.weight", "b.weight")
    assert (row.names, row.shares) == (("first_row",), ("a.weight", "b.weight"))
    assert (
        str(row)
        == "first_row: attribute, torch.float32 (3,); shares memory with a.weight, b.weight"
    )


def test_after_an_update_a_census_tells_what_became_stale_since_the_one_before():
    model = nn.Linear(4, 3, bias=False)
    model.turned, model.view = model.weight.detach().t().contiguous(), model.weight.data.t()
    before = census(model)
    assert census(model).stale_since(before) == ()
    model.weight.data.add_(1)
    assert [entry.names for entry in census(model).stale_since(before)] == [("turned",)]
    model.turned = model.weight.detach().t().contiguous()
    assert census(model).stale_since(before) == ()


def test_tensors_without_values_are_listed_and_compared_with_nothing():
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(3, device="meta"))
    model.meta = torch.empty(3, device="meta")
    model.sparse = torch.eye(3).to_sparse()
    model.freed = torch.randn(3)
    model.freed.untyped_storage().resize_(0)
    found = census(model)
    assert [entry.names[0] for entry in found.entries] == ["weight", "meta", "sparse", "freed"]
    assert found.derived == ()


def process(model):
    model.table = (model.weight.detach() ** 3).cumsum(0)
    model.limit = model.weight.detach().mean().item()
    model.other = torch.arange(4.0)


def test_post_processing_is_followed_from_weights_to_what_it_makes():
    model = nn.Linear(4, 3)
    found = {e.names[0]: str(e.relation) for e in census(model, process=process).exposed}
    assert found == {"table": "made by process of weight", "limit": "made by process of weight"}
    # A later census remembers.
    assert {entry.names[0] for entry in census(model).exposed} == {"table", "limit"}


DTYPES = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}


@pytest.mark.parametrize("dtype", sorted(DTYPES - {torch.bool}, key=str), ids=str)
def test_values_of_every_dtype_are_read(dtype):
    """Of those that torch itself can't compare, the bytes are."""
    numbers = torch.Generator().manual_seed(0)
    size = 8 * dtype.itemsize
    values = torch.randint(1, 100, (8, size), dtype=torch.uint8, generator=numbers)
    model = nn.Module()
    model.register_buffer("weight", values.view(dtype))
    model.kept = values.clone().view(dtype)
    (entry,) = census(model).exposed
    assert (entry.names, entry.relation.of) == (("kept",), ("weight",))
    before = census(model)
    assert before.stale_since(before) == ()
    values.add_(1)
    assert len(census(model).stale_since(before)) == 1
