"""Relations by value: each one is found where it holds, and nothing is found where none does."""

import pytest
import torch

from fixpass.runtime.weights.relations import relation_of

FP8 = torch.float8_e4m3fn


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


W, HALF = randn(12, 10), randn(12, 10, seed=7, dtype=torch.bfloat16)
SQUARE, OTHER = randn(8, 8, seed=1), randn(8, 6, seed=2)
ROW = randn(10, seed=3).abs() + 1
SCALES = torch.tensor([0.4, 0.7, 0.2])
IDS = torch.tensor([3, 1, 1, 0, 2])
SOURCES = [
    ("W", W),
    ("half", HALF),
    ("square", SQUARE),
    ("other", OTHER),
    ("row", ROW),
    ("scales", SCALES),
    ("scale", torch.tensor(0.15)),
    ("ids", IDS),
    ("zeros", torch.zeros(64)),
]
CASES = {
    "a copy of W": W.clone(),
    "a transpose of W": W.t().contiguous(),
    "a slice of W": W[4:9].clone(),
    "a copy in torch.float64 of W": W.double(),
    "a copy in torch.float8_e4m3fn of W": W.to(FP8),
    "a multiple of W": W * -0.37,
    "a multiple of half": HALF * -0.37,
    "the reciprocal of row": 1 / ROW,
    "the product of W and row": W * ROW,
    "the quotient of W and row": W / ROW,
    "the inverse of square": torch.linalg.inv(SQUARE),
    "the matrix product of square and other": SQUARE @ OTHER,
    "the sorting order of ids": IDS.argsort(stable=True),
    "a copy of scale": torch.tensor(0.15),
    "a slice of scales": SCALES.max(),
}


@pytest.mark.parametrize("wanted", CASES)
def test_a_relation_is_found(wanted):
    found = relation_of(CASES[wanted], SOURCES)
    assert str(found) == wanted
    sources = [dict(SOURCES)[name] for name in found.of]
    assert found.holds(CASES[wanted], sources)
    changed = [1 - source for source in sources]
    assert not found.holds(CASES[wanted], changed)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_single_scale_is_a_multiple_only_by_two(factor):
    found = relation_of(torch.tensor(0.15 * factor), SOURCES)
    assert str(found) == "a multiple of scale"
    assert not found.holds(torch.tensor(0.15 * factor), [torch.tensor(0.15 * factor**2)])
    assert relation_of(torch.tensor(0.15 * 1.7), SOURCES) is None


SLICES = {
    "columns": W[:, 3:8],
    "every other row": W[1::2],
    "every other column": W[:, ::2],
    "heads, turned": W.view(3, 4, 10)[:, 1:3].permute(2, 0, 1),
    "a head": W.view(12, 2, 5)[:, 1].t(),
    "flat": W.reshape(-1),
    "three dimensions": W.view(2, 6, 10).transpose(0, 2),
}


@pytest.mark.parametrize("what", SLICES)
def test_slices_and_turned_views_are_found(what):
    found = relation_of(SLICES[what].contiguous(), [("W", W)])
    assert found.of == ("W",)
    assert not found.holds(SLICES[what].contiguous(), [W + 1])


def test_elements_of_a_weight_with_many_equal_values_are_found():
    """A weight in few bits repeats its values: only the places of many elements tell."""
    weight = randn(64, 48).sign().mul(randn(64, 48, seed=1).abs().round())
    part = weight.view(4, 16, 48)[:, 4:12].permute(0, 2, 1).contiguous()
    found = relation_of(part, [("weight", weight)])
    assert str(found) == "a slice of weight"


NOTHING = {
    "zeros": torch.zeros(64),
    "ones": torch.ones(12, 10),
    "a scale that nothing set": torch.tensor(1.0),
    "empty": torch.empty(0),
    "NaN": torch.tensor(float("nan")),
    "masks": torch.ones(4, dtype=torch.bool),
    "other values": randn(12, 10, seed=9),
    "one other value": torch.cat([W.flatten()[:-1], torch.tensor([5.0])]).view(12, 10),
    "indices": torch.arange(5),
    "few values by chance": W.flatten()[40:43],
}


@pytest.mark.parametrize("what", NOTHING)
def test_nothing_is_found_where_nothing_follows(what):
    assert relation_of(NOTHING[what], SOURCES) is None
