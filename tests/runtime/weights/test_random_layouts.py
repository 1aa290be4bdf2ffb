"""Random layouts against a plain permute; random writes in checkpoint_layout against a plain tensor."""

import random
from math import prod

import pytest
import torch
from torch import nn

from fixpass.runtime.weights.checkpoint_view import checkpoint_layout
from fixpass.runtime.weights.layout_plan import resolve
from fixpass.runtime.weights.layouts import Pad, Permute, SwapHalves, WeightLayout
from fixpass.runtime.weights.parameter_layout import logical, reset_layout, set_layout


def random_permute(choose):
    """A shape, its splits into factors, and an order of all factors."""
    rank = choose.randint(1, 3)
    split = tuple(
        tuple(choose.choice((1, 2, 3, 4)) for _ in range(choose.randint(1, 3))) for _ in range(rank)
    )
    shape = tuple(prod(factors) for factors in split)
    order = list(range(sum(map(len, split))))
    choose.shuffle(order)
    return shape, split, tuple(order)


def reference(values, split, order, batch):
    factors = [factor for part in split for factor in part]
    moved = [*range(len(batch)), *(len(batch) + axis for axis in order)]
    return values.reshape(*batch, *factors).permute(moved).reshape(values.shape)


@pytest.mark.parametrize("seed", range(60))
def test_a_random_layout_is_its_permute_and_has_its_inverse(seed):
    choose = random.Random(seed)
    shape, split, order = random_permute(choose)
    batch = (choose.randint(1, 3),) if choose.random() < 0.5 else ()
    layout = WeightLayout(f"random {seed}", (Permute(split, order),))
    values = torch.arange(float(prod(batch) * prod(shape))).view(*batch, *shape)
    param = nn.Parameter(values.clone())
    set_layout(param, layout)
    assert torch.equal(param, reference(values, split, order, batch))
    assert torch.equal(logical(param), values)
    plan = resolve(layout, (*batch, *shape), 4)
    block = plan.numel
    for place, size in enumerate(plan.sizes):
        if plan.order[place] != place:
            break
        block //= size
    moved = param.detach().view(-1, block)
    for mine, before in zip(moved, values.view(-1, block), strict=True):
        assert set(mine.tolist()) == set(before.tolist())
    reset_layout(param)
    assert torch.equal(param, values)


@pytest.mark.parametrize("seed", range(60))
def test_random_writes_in_the_checkpoint_layout_land_in_their_places(seed):
    choose = random.Random(1000 + seed)
    shape, split, order = random_permute(choose)
    steps = (Permute(split, order),)
    even = [-place for place in range(1, len(split) + 1) if split[-place][0] % 2 == 0]
    if even:
        steps = (SwapHalves(choose.choice(even)), *steps)
    if choose.random() < 0.3:
        steps = (Pad(shape), *steps)
        shape = tuple(choose.randint(1, size) for size in shape)
    plain = torch.arange(float(prod(shape))).view(shape)
    param = nn.Parameter(plain.clone())
    set_layout(param, WeightLayout(f"random {seed}", steps))
    with checkpoint_layout([param]):
        for step in range(8):
            mine, wanted = param.data, plain
            for _ in range(choose.randint(0, 3)):
                mine, wanted = random_view(choose, mine, wanted)
            values = -torch.arange(float(wanted.numel())).view(wanted.shape) - 1000 * step
            wanted.copy_(values)
            mine.copy_(values)
            assert torch.equal(param, plain)
    assert torch.equal(logical(param), plain)


def random_view(choose, mine, wanted):
    if not wanted.dim():
        return mine, wanted
    dim = choose.randrange(wanted.dim())
    start = choose.randrange(wanted.shape[dim])
    length = choose.randint(1, wanted.shape[dim] - start)
    step = choose.randint(1, 3)
    index = (slice(None),) * dim + (slice(start, start + length, step),)
    other = choose.randrange(wanted.dim())
    views = (
        lambda t: t.narrow(dim, start, length),
        lambda t: t[index],
        lambda t: t.select(dim, start),
        lambda t: t.transpose(dim, other),
        lambda t: t.unsqueeze(dim),
        lambda t: t.chunk(2, dim)[0],
    )
    view = choose.choice(views)
    return view(mine), view(wanted)
