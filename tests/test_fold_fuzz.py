"""Random programs of weights: rearranged, written, returned; folded they give what eager gives."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional

from fixpass.runtime.versions import torch_version
from fixpass.testing import f32
from helpers.weight_updates import COUNTED, UNCOUNTED, compiled

SIZE = 192  # square, so that all steps fit together, and large enough to be worth keeping

PURE = (
    lambda a, b: a.t(),
    lambda a, b: a.t().contiguous(),
    lambda a, b: a.contiguous(),
    lambda a, b: a.clone(),
    lambda a, b: (
        a.view(-1, 4, SIZE).transpose(0, 1).reshape(SIZE, SIZE)
        if a.is_contiguous()
        else a.reshape(SIZE, SIZE)
    ),
    lambda a, b: (
        a.view(12, 16, 24, 8).permute(0, 2, 1, 3).reshape(SIZE, SIZE)
        if a.is_contiguous()
        else a + 1
    ),
    lambda a, b: a.bfloat16().float(),
    lambda a, b: a + b,
    lambda a, b: a * 0.5,
    lambda a, b: torch.cat([a, b])[:SIZE],
    lambda a, b: torch.cat([a[:, : SIZE // 2], b[:, : SIZE // 2]], 1),
    lambda a, b: a.chunk(2)[0].repeat(2, 1),
    lambda a, b: a[torch.arange(SIZE - 1, -1, -1)],
    lambda a, b: a.sort(dim=0).values,
    lambda a, b: a @ b / SIZE,
    lambda a, b: functional.relu(a),
    lambda a, b: a.detach(),
    lambda a, b: torch.stack([a, b], 1).flatten(1)[:, :SIZE],
)
WRITES = (
    lambda a, x: a.mul_(0.5),
    lambda a, x: a.copy_(a.flip(0)),
    lambda a, x: a.__setitem__((0, slice(None)), x[0]),
    lambda a, x: functional.relu(a, True),
    lambda a, x: functional.relu_(a),
    # Dynamo takes dense ones only.
    lambda a, x: torch.add(a, 1.0, out=a) if a.is_contiguous() else a.add_(1.0),
    lambda a, x: a.view(-1)[:7].fill_(2.0) if a.is_contiguous() else a[0].fill_(2.0),
    lambda a, x: a.index_copy_(0, torch.tensor([1]), x[:1]),
    lambda a, x: torch._foreach_mul_([a], 0.5),
    lambda a, x: a.t()[1].add_(x[0]),
    lambda a, x: a.data.mul_(0.5),
)


class Program(nn.Module):
    """A random program: `pure` steps on values of weights, `writes` into some of them."""

    def __init__(self, seed):
        super().__init__()
        chance = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)

        def values():
            return torch.randn(SIZE, SIZE, generator=generator)

        self.first = nn.Parameter(values(), requires_grad=False)
        self.second = nn.Parameter(values(), requires_grad=False)
        self.register_buffer("third", values())
        self.register_buffer("alias", self.third if chance.random() < 0.3 else values())
        self.steps = []
        count = 4
        for _ in range(chance.randint(3, 8)):
            if chance.random() < 0.2:
                self.steps.append(("write", chance.choice(WRITES), chance.randrange(count), 0))
            else:
                pair = chance.randrange(count), chance.randrange(count)
                self.steps.append(("pure", chance.choice(PURE), *pair))
                count += 1
        self.used = [chance.randrange(count) for _ in range(2)] + [count - 1]
        # Weights are not: what gets them may write into them.
        computed = range(4, count)
        self.returned = [chance.choice(computed)] if computed and chance.randint(0, 1) else []

    def forward(self, x):
        values = [self.first, self.second, self.third, self.alias]
        for kind, step, a, b in self.steps:
            if kind == "write":
                step(values[a], x)
            else:
                values.append(step(values[a], values[b]))
        outs = [x @ values[index] for index in self.used]
        return outs, [values[index] for index in self.returned]


def check(seed, fold):
    """Run a program three times beside its twin in eager mode, with an update in between."""
    program = Program(seed)
    twin = copy.deepcopy(program)
    # Deepcopy keeps what is one tensor one tensor; steps hold no state.
    options = {} if fold == "cache" else {"fold_weights": fold}
    # With eager's own matmuls, which sum in eager's order: weights are compared here.
    run = compiled(program, linear="inductor", **options)
    updates = {**COUNTED, **UNCOUNTED}
    names = [name for name in updates if "optimizer" not in name and "swap" not in name]
    chance = random.Random(seed)
    with torch.no_grad():
        for step in range(3):
            x = f32(3, SIZE) + step
            got, wanted = run(x), twin(x)
            torch.testing.assert_close(got, wanted, msg=lambda text: f"seed {seed}: {text}")
            for mine, theirs in zip(got[1], wanted[1], strict=True):
                mine.add_(1.0)
                theirs.add_(1.0)
            state = torch.random.get_rng_state()
            update = updates[chance.choice(names)]
            for module in (program, twin):
                torch.random.set_rng_state(state)
                update(module)
                # torch forbids some writes through views of what requires a gradient.
                module.requires_grad_(False)
            torch.testing.assert_close(dict(program.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("fold", ["cache", "restride"])
@pytest.mark.parametrize("seed", range(8))
def test_a_random_program_gives_what_eager_gives(seed, fold):
    if seed == 2 and torch_version() == (2, 11):
        pytest.skip("Inductor 2.11 is off by 0.077 for this program without fixpass too")
    check(seed, fold)


@pytest.mark.full
@pytest.mark.parametrize("fold", ["cache", "restride"])
@pytest.mark.parametrize("block", range(10))
def test_many_random_programs_give_what_eager_gives(block, fold):
    for seed in range(1000 + 40 * block, 1040 + 40 * block):
        check(seed, fold)
        torch._dynamo.reset()
