"""Random modules: outputs, strides, gradients and what is written are those of eager mode.

`lower="eager"` runs the rewritten graph op by op, so it must round as eager mode does. Fixed seeds
here; `make test-full` runs 20,000 examples of other seeds and some hundreds through Inductor.
A failing example prints as the `Program` to put into tests/test_faults.py.
"""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from fixpass import explain
from fixpass.lowering.contract_table import KERNELS
from fixpass.testing import assert_same
from helpers import standins
from helpers.compiling import EAGER
from helpers.fuzz_modules import Input, Program, RandomModule, Step, new_input
from helpers.fuzz_norms import Form
from helpers.fuzz_strategies import DTYPES, draw_form, draw_input, draw_view, pick, programs

# The share of a tensor's largest element by which each of its elements may differ. Rewritten
# graphs compute the same steps as eager mode, so a value differs where a sum runs in another
# order: some units in the last place of float32, and one or two of a half dtype, where such a
# difference crosses a rounding boundary and later steps carry it on.
# Where everything cancels, as in the layer norm of rows of one element, float32's noise is left.
ERROR_SHARE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
# The kernels that stand-ins compute here; our own need a GPU.
# The kernels with quantised output need a quantisation behind the norm, which no program has.
FOREIGN = sorted({row.name for row in KERNELS if "::" in row.needs and row.op != "rms_norm_quant"})
FULL = os.environ.get("FIXPASS_TEST_FULL", "0") == "1"


def examples(count: int, full: int):
    """Settings of a run: a fixed seed by default, fresh ones in a full run."""
    return settings(
        max_examples=full if FULL else count,
        derandomize=not FULL,
        database=None,
        deadline=None,
        print_blob=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def inputs_of(program: Program, extra: int = 0):
    generator = torch.Generator().manual_seed(2)
    inputs = [new_input(spec, generator, extra) for spec in program.inputs]
    for spec, x in zip(program.inputs, inputs, strict=True):
        x.requires_grad_(program.training and spec.grad)
        if program.dynamic == "first":
            torch._dynamo.maybe_mark_dynamic(x, 0)
    return inputs


def coarsest(program: Program) -> torch.dtype:
    """The dtype with the fewest bits of precision that the program rounds to."""
    dtypes = {spec.dtype for spec in program.inputs}
    for step in program.steps:
        forms = [arg for arg in step.args if isinstance(arg, Form)]
        dtypes |= {arg for arg in step.args if isinstance(arg, torch.dtype)}
        dtypes |= {d for form in forms for d in (form.upcast, form.weight) if d is not None}
    return max(dtypes, key=ERROR_SHARE.__getitem__)


def check(program: Program, **options):
    torch._dynamo.reset()
    module = RandomModule(program)
    inputs = inputs_of(program)
    compiled = torch.compile(
        module,
        backend="fixpass",
        dynamic=program.dynamic == "all" or None,
        options=EAGER | options,
    )
    gradients = program.training and any(t.requires_grad for t in (*inputs, *module.parameters()))
    rule = {
        "gradients": gradients,
        "rtol": ERROR_SHARE[coarsest(program)],
        "atol": 1e-6,
        "scaled": True,
    }
    assert_same(compiled, module, *inputs, **rule)
    if program.dynamic and fits(program, module):
        assert_same(compiled, module, *inputs_of(program, 2), **rule)


def fits(program: Program, module: RandomModule) -> bool:
    """Whether the module takes inputs with more rows: it may use their number as a width."""
    try:
        module(*inputs_of(program, 2))
    except RuntimeError:
        return False
    return True


# In parts, so that the workers of a full run share them.
@pytest.mark.parametrize("part", range(8 if FULL else 1))
@examples(100, full=2_000)
@given(program=programs())
def test_random_modules_give_what_eager_gives(part, program):
    check(program)


@examples(50, full=2_000)
@given(programs(of_models=True), st.permutations(FOREIGN))
def test_opaque_kernels_get_the_layouts_that_they_ask_for(program, kernels):
    standins.register()
    # Without Inductor to choose, a kernel is used wherever a copy makes its contract hold.
    check(replace(program, training=False), norm_kernels=tuple(kernels))


@st.composite
def single_norms(draw, dtypes=DTYPES):
    """One norm of one input, perhaps behind one view."""
    dtype = pick(draw, *dtypes)
    shape = pick(draw, (4, 8), (2, 3, 8), (5, 16), (8,), (2, 1, 3, 8))
    spec = draw_input(draw, shape, dtype)
    value = new_input(spec, None)
    steps = []
    if draw(st.booleans()):
        steps.append(draw_view(draw, 0, value))
        value = RandomModule(Program((spec,), tuple(steps), (1,)))(value)[0]
    steps.append(Step("norm", len(steps), (draw_form(draw, value),)))
    return Program((spec,), tuple(steps), (len(steps),), pick(draw, "", "all"))


@examples(50, full=1_000)
@given(single_norms())
def test_every_norm_is_found_or_missed_with_a_reason(program):
    torch._dynamo.reset()
    module, inputs = RandomModule(program), inputs_of(program)
    form = program.steps[-1].args[0]
    with torch.no_grad():
        report = explain(module, *inputs, options=EAGER)
    found = report.of_pass("select-norm-kernel")
    missed = [
        remark.text for remark in report.of_pass("canonicalize-norms") if remark.kind == "missed"
    ]
    if form.twist:
        # What a square root is taken of is often no moment at all: that leaves no remark.
        assert len(found) + len(missed) == 1 or form.root != "rsqrt", str(report)
    else:
        assert len(found) == 1, str(report)


@examples(40, full=1_000)
@given(single_norms((torch.bfloat16, torch.float16)))
def test_a_norm_rounds_where_eager_rounds(program):
    form = program.steps[-1].args[0]
    # In a half dtype throughout, another root than rsqrt rounds a whole row's scale differently.
    assume(not form.twist and (form.upcast is not None or form.root in ("rsqrt", "eps first")))
    torch._dynamo.reset()
    module, inputs = RandomModule(program), inputs_of(program)
    with torch.no_grad():
        (expected,) = module(*inputs)
        (got,) = torch.compile(module, backend="fixpass", options=EAGER)(*inputs)
    # A rounding step in another place would change every other element or so.
    dtype = program.inputs[0].dtype
    assert (got.to(dtype) != expected.to(dtype)).sum() <= max(1, got.numel() // 20)


# The steps of a decoder layer with packed q, k and v, and of a training step of two norms.
ATTENTION = Program(
    inputs=(Input((2, 5, 24), torch.bfloat16), Input((2, 5, 24), torch.bfloat16)),
    steps=(
        Step("add", 0, (1,)),
        Step("norm", 2, (Form(weight=torch.bfloat16, weight_first=True),)),
        Step("linear", 3, (48, True)),
        Step("narrow", 4, (-1, 0, 32)),
        Step("split heads", 5, (4,)),
        Step(
            "norm",
            6,
            (Form(weight=torch.bfloat16, offset=1.0, widens_weight=True, rounds="after"),),
        ),
        Step("transpose", 7, (1, 2)),
        Step("contiguous", 8),
        Step("norm", 9, (Form("functional", centred=True, weight=torch.bfloat16, has_bias=True),)),
        Step("norm", 2, (Form("op", weight=torch.bfloat16),)),
    ),
    outputs=(2, 8, 10, 11),
    dynamic="all",
)
TRAINING = Program(
    inputs=(Input((4, 3, 16), layout="packed"), Input((4, 3, 16), layout="swapped")),
    steps=(
        Step("add", 0, (1,)),
        Step("norm", 2, (Form(weight=torch.float32, square="mul", root="1 / sqrt"),)),
        Step("linear", 3, (8, False)),
        Step("norm", 4, (Form(centred=True, square="var", weight=torch.float32, has_bias=True),)),
        Step("norm", 2, (Form("op", weight=torch.float32),)),
    ),
    outputs=(2, 5, 6),
    training=True,
)


def check_through_inductor(program: Program):
    """Stock Inductor is the measure; eager mode rounds where Inductor goes on in float32."""
    torch._dynamo.reset()
    module, inputs = RandomModule(program), inputs_of(program)
    dynamic = program.dynamic == "all" or None
    ours = {"verify": True, "strict": True}
    fixpass = torch.compile(module, backend="fixpass", dynamic=dynamic, options=ours)
    gradients = program.training and any(t.requires_grad for t in (*inputs, *module.parameters()))
    rtol = ERROR_SHARE[coarsest(program)]
    assert_same(
        fixpass, module, *inputs, gradients=gradients, rtol=4 * rtol, atol=1e-5, scaled=True
    )
    inductor = torch.compile(module, backend="inductor", dynamic=dynamic)
    assert_same(fixpass, inductor, *inputs, gradients=gradients, rtol=rtol, atol=1e-6, scaled=True)


@pytest.mark.inductor
@pytest.mark.parametrize("program", [ATTENTION, TRAINING], ids=["attention", "training"])
def test_a_module_through_inductor(program):
    check_through_inductor(program)


@pytest.mark.full
@pytest.mark.inductor
@examples(300, full=300)
@given(programs())
def test_random_modules_through_inductor(program):
    check_through_inductor(program)
