"""Random modules as plain data: a `Program` is inputs, steps and outputs; `RandomModule` runs it.

A step reads one earlier value, by its index, and makes the next. The tests draw programs; nothing
here is random but the numbers in tensors, and those come from a fixed seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.fuzz_norms import Form, Spec, normalise


@dataclass(frozen=True, repr=False)
class Input(Spec):
    """One argument: `layout` names how it lies in its storage."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "dense"
    grad: bool = True


@dataclass(frozen=True, repr=False)
class Step(Spec):
    """`op` applied to value number `on`; `args` are its numbers, another value's index, or a Form."""

    op: str
    on: int = 0
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, repr=False)
class Program(Spec):
    """A module: values are the inputs, then one a step; `outputs` are indices of values."""

    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    dynamic: str = ""
    """"" static, "all" dimensions dynamic, or the "first" of each input marked."""
    training: bool = False


def _reversed_dims(dense: Tensor) -> Tensor:
    return dense.permute(*reversed(range(dense.dim())))


# Each takes the shape wanted and a maker of dense tensors.
LAYOUTS: dict[str, Callable[[tuple[int, ...], Any], Tensor]] = {
    "dense": lambda shape, new: new(shape),
    "offset": lambda shape, new: new((shape[0] + 1, *shape[1:]))[1:],
    "packed": lambda shape, new: new((*shape[:-1], 3 * shape[-1]))[..., shape[-1] : 2 * shape[-1]],
    "first rows": lambda shape, new: new((2 * shape[0] + 1, *shape[1:]))[: shape[0]],
    "every second": lambda shape, new: new((*shape[:-1], 2 * shape[-1]))[..., ::2],
    "transposed": lambda shape, new: _reversed_dims(new(shape[::-1])),
    "swapped": lambda shape, new: new((shape[1], shape[0], *shape[2:])).transpose(0, 1),
    "expanded": lambda shape, new: new((1, *shape[1:])).expand(shape),
}

OPS: dict[str, Callable[..., Tensor]] = {
    "narrow": lambda x, dim, start, size: x.narrow(dim, start, size),
    "every": lambda x, step: x[..., ::step],
    "split heads": lambda x, heads: x.unflatten(-1, (heads, x.shape[-1] // heads)),
    "merge heads": lambda x: x.flatten(-2),
    "rows": lambda x: x.reshape(-1, x.shape[-1]),
    "transpose": lambda x, a, b: x.transpose(a, b),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "unsqueeze": lambda x, dim: x.unsqueeze(dim),
    "expand": lambda x, size: x.expand(size, *x.shape),
    "cast": lambda x, dtype: x.to(dtype),
    "silu": F.silu,
    "half": lambda x: x * 0.5,
}


def shapes_of_parameters(step: Step, x: Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The shape and dtype of each parameter of a step that reads `x`."""
    if step.op == "linear":
        size, has_bias = step.args
        weight = ((size, x.shape[-1]), x.dtype)
        return [weight, ((size,), x.dtype)] if has_bias else [weight]
    if step.op not in ("norm", "add norm"):
        return []
    form: Form = step.args[0]
    found = [] if form.weight is None else [(x.shape[-1:], form.weight)]
    return [*found, (x.shape[-1:], x.dtype)] if form.has_bias else found


def run_step(step: Step, values: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    x = values[step.on]
    if step.op == "linear":
        return F.linear(x, *parameters)
    if step.op == "add":
        return x + values[step.args[0]]
    if step.op == "norm":
        form = step.args[0]
        weight = parameters[0] if form.weight is not None else None
        return normalise(form, x, weight, parameters[-1] if form.has_bias else None)
    return OPS[step.op](x, *step.args)


def new_input(spec: Input, generator: torch.Generator | None, extra: int = 0) -> Tensor:
    """The argument; `extra` rows more in its first dimension. On meta without a generator."""

    def new(shape: tuple[int, ...]) -> Tensor:
        if generator is None:
            return torch.empty(shape, dtype=spec.dtype, device="meta")
        return torch.randn(shape, generator=generator).to(spec.dtype)

    shape = (spec.shape[0] + extra, *spec.shape[1:]) if spec.shape else ()
    return LAYOUTS[spec.layout](shape, new)


class RandomModule(nn.Module):
    """Runs a program; its parameters are random with a fixed seed."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.weights = nn.ModuleList()
        generator = torch.Generator().manual_seed(1)
        values = [new_input(spec, None) for spec in program.inputs]
        for step in program.steps:
            weights = nn.ParameterList()
            for shape, dtype in shapes_of_parameters(step, values[step.on]):
                value = torch.randn(shape, generator=generator)
                # Near 1 for a norm, of about the inputs' size behind a linear.
                value = value / max(shape[1], 1) ** 0.5 if len(shape) == 2 else 1 + value / 4
                weights.append(nn.Parameter(value.to(dtype)))
            self.weights.append(weights)
            meta = [w.to("meta") for w in weights]
            values.append(run_step(step, values, meta))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = list(inputs)
        for step, weights in zip(self.program.steps, self.weights, strict=True):
            values.append(run_step(step, values, list(weights)))
        return tuple(values[i] for i in self.program.outputs)
