"""Hypothesis strategies for `Program`: each drawn step fits the value that it reads.

Shapes are followed on the meta device, so that every program runs in eager mode. Sizes are small:
layouts and rounding are what is looked for, and both show at any size.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers.fuzz_modules import (
    Input,
    Program,
    Step,
    new_input,
    run_step,
    shapes_of_parameters,
)
from helpers.fuzz_norms import ROOTS, SQUARES, TWISTS, Form

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)
Draw = Callable[[st.SearchStrategy[Any]], Any]


def pick(draw: Draw, *choices: Any) -> Any:
    return draw(st.sampled_from(choices))


@st.composite
def programs(draw: Draw, of_models: bool = False) -> Program:
    """Programs of up to 7 steps; `of_models` leaves out the norms that no model has."""
    dtype = pick(draw, *(HALF if of_models else DTYPES))
    shape = tuple(draw(st.lists(st.sampled_from((4, 3, 2, 1, 8)), min_size=1, max_size=3)))
    shape = (*shape[:-1], pick(draw, 8, 16, 4, 1, 24))
    if draw(st.integers(0, 19)) == 19:
        shape = pick(draw, (0, *shape[1:]), (*shape[:-1], 0))
    inputs = [draw_input(draw, shape, dtype)]
    if draw(st.booleans()):
        inputs.append(
            draw_input(draw, pick(draw, shape, shape, (1, *shape[1:]), shape[1:] or shape), dtype)
        )
    values = [new_input(spec, None) for spec in inputs]
    steps: list[Step] = []
    form = model_form if of_models else draw_form
    residuals: set[int] = set()
    for _ in range(draw(st.integers(1, 7))):
        step = draw_step(draw, values, form)
        if steps and steps[-1].op == "add" and draw(st.integers(0, 3)):
            # As in models: the sum is normalised, and read on as the residual.
            residuals.add(len(values) - 1)
            step = Step("norm", len(values) - 1, (form(draw, values[-1]),))
        weights = [
            torch.empty(size, dtype=kind, device="meta")
            for size, kind in shapes_of_parameters(step, values[step.on])
        ]
        values.append(run_step(step, values, weights))
        steps.append(step)
    read = {
        i for step in steps for i in (step.on, *step.args) if type(i) is int and _is_value(step, i)
    }
    unread = {i for i in range(len(inputs), len(values)) if i not in read}
    more = draw(st.sets(st.integers(len(inputs), len(values) - 1), max_size=2))
    dynamic = pick(draw, "", "", "all", "first")
    training = draw(st.booleans())
    outputs = tuple(sorted(unread | residuals | more))
    return Program(tuple(inputs), tuple(steps), outputs, dynamic, training)


def _is_value(step: Step, i: int) -> bool:
    return i == step.on or (step.op == "add" and i in step.args)


def draw_input(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Input:
    layouts = ["dense", "offset", "packed", "first rows", "every second", "transposed", "expanded"]
    layouts += ["swapped"] if len(shape) > 1 else []
    # An expanded last dimension gives rows without variance, whose norm is rounding noise alone.
    if len(shape) < 2:
        layouts.remove("expanded")
    return Input(shape, dtype, pick(draw, *layouts), draw(st.booleans()))


def draw_step(draw: Draw, values: list[Tensor], form: Callable[[Draw, Tensor], Form]) -> Step:
    # Mostly the newest value, so that steps make chains.
    on = len(values) - 1 - draw(st.integers(0, min(len(values) - 1, 3)))
    x = values[on]
    op = pick(draw, "norm", "norm", "norm", "add", "linear", "narrow", "view", "copy", "pointwise")
    if op == "norm":
        return Step("norm", on, (form(draw, x),))
    if op == "add":
        # To the left only what broadcasts to x, or to what x broadcasts.
        other = [i for i, v in enumerate(values) if _broadcast(v, x)]
        return Step("add", on, (pick(draw, *other),))
    if op == "linear" and x.dim() > 1:
        return Step("linear", on, (pick(draw, 8, 16, 4), draw(st.booleans())))
    if op == "narrow" and x.numel():
        dim = draw(st.integers(-x.dim(), -1))
        start = draw(st.integers(0, x.shape[dim] - 1))
        return Step("narrow", on, (dim, start, draw(st.integers(1, x.shape[dim] - start))))
    if op == "copy":
        return Step(pick(draw, "contiguous", "clone"), on)
    if op == "pointwise":
        return pick(
            draw, Step("silu", on), Step("half", on), Step("cast", on, (pick(draw, *DTYPES),))
        )
    return draw_view(draw, on, x)


def _broadcast(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(a.shape, b.shape) in (a.shape, b.shape)
    except RuntimeError:
        return False


def draw_view(draw: Draw, on: int, x: Tensor) -> Step:
    last = x.shape[-1]
    found = [Step("unsqueeze", on, (0,)), Step("rows", on)] if x.numel() else []
    if x.dim() < 4:
        found += [Step("unsqueeze", on, (pick(draw, 0, -2),)), Step("expand", on, (2,))]
        found += [Step("split heads", on, (heads,)) for heads in (2, 4) if last % heads == 0]
    if x.dim() > 1:
        a = draw(st.integers(-x.dim(), -1))
        found += [
            Step("transpose", on, (a, draw(st.integers(-x.dim(), -1)))),
            Step("merge heads", on),
        ]
    found += [Step("every", on, (2,))]
    return pick(draw, *found)


def draw_form(draw: Draw, x: Tensor) -> Form:
    weight = pick(draw, x.dtype, x.dtype, None, torch.float32, pick(draw, *DTYPES))
    centred = draw(st.booleans())
    # Rows of one element have no variance: a small eps would blow up rounding noise alone.
    eps = pick(draw, 1e-6, 1e-5, 0.5) if x.shape[-1] > 1 else 0.5
    via = pick(draw, "written", "written", "written", "functional", "op")
    if via == "functional":
        weight = pick(draw, x.dtype, None)
        has_bias = centred and weight is not None and draw(st.booleans())
        return Form(via, centred, eps, weight=weight, has_bias=has_bias)
    squares = (*SQUARES, "var_mean", "var") if centred else tuple(SQUARES)
    upcast = torch.float64 if x.dtype == torch.float64 else torch.float32
    form = Form(
        via,
        centred,
        eps,
        upcast=pick(draw, upcast, upcast, None),
        square=pick(draw, *squares),
        root=pick(draw, *ROOTS, "/ sqrt"),
        scale_first=draw(st.booleans()),
        scales_raw=draw(st.booleans()),
        rounds=pick(draw, "before", "after", "never"),
        weight=weight,
        weight_first=draw(st.booleans()),
        widens_weight=draw(st.booleans()),
        offset=pick(draw, 0.0, 1.0),
        has_bias=draw(st.integers(0, 3)) == 3,
        twist=pick(draw, *[""] * 30, *TWISTS) if via == "written" else "",
    )
    return form if _runs(form, x) else Form(weight=x.dtype)


def model_form(draw: Draw, x: Tensor) -> Form:
    """A norm as models spell it, in the dtype of its input: Llama, OLMo2, Gemma, LayerNorm."""
    forms = (
        Form(weight=x.dtype, weight_first=True),
        Form(weight=x.dtype, weight_first=True, rounds="after"),
        Form(weight=x.dtype, widens_weight=True, offset=1.0, rounds="after"),
        Form("functional", weight=x.dtype),
        Form("functional", centred=True, eps=1e-5, weight=x.dtype, has_bias=True),
    )
    # Rows of one element, as in `draw_form`.
    return pick(draw, *forms) if x.shape[-1] > 1 else Form(eps=0.5)


def _runs(form: Form, x: Tensor) -> bool:
    """Whether the form gives a value of x's shape: a twist may not fit."""
    try:
        step = Step("norm", 0, (form,))
        weights = [torch.empty(s, dtype=d, device="meta") for s, d in shapes_of_parameters(step, x)]
        return run_step(step, [x], weights).shape == x.shape
    except (RuntimeError, IndexError):
        return False
