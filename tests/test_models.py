"""Real `transformers` models: every norm is found, and the results are those of eager.

Most run `lower="eager"`, where the rewritten graph's operations are eager's own and the tolerance
can be tight. Inductor compiles a few here and all of them with FIXPASS_TEST_FULL=1. What Inductor
itself needs against eager is measured in docs/models.md.
"""

from collections import Counter
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fixpass
from fixpass import Report
from fixpass.testing import assert_same
from helpers import models
from helpers.compiling import EAGER

pytest.importorskip("transformers")
# transformers says once for each kernel library it lacks that it falls back to PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# As parts of the largest element: a few steps of float32, two of bfloat16.
TIGHT = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
STEPS = ("prefill", "decode")
FLOATS = (torch.float32, torch.bfloat16)
WITH_CACHE = tuple(name for name in models.NAMES if models.SPECS[name].has_cache)
WITHOUT_CACHE = tuple(name for name in models.NAMES if name not in WITH_CACHE)
THROUGH_INDUCTOR = ("qwen3-packed", "persimmon", "olmo2")


class NormCounter(TorchDispatchMode):
    """Counts the operations without which there is no norm, as eager runs them."""

    ANCHORS = ("rsqrt", "sqrt", "native_layer_norm", "_fused_rms_norm", "native_group_norm",
               "linalg_vector_norm", "var", "var_mean", "std")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in self.ANCHORS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def compile_model(model, *, dynamic=False, **options):
    return torch.compile(
        model.module,
        backend="fixpass",
        fullgraph=model.fullgraph,
        dynamic=dynamic,
        options=options,
    )


def assert_as_eager(compiled, model, step, tolerances, *lengths, **cache):
    """Results, and the cache after the call, at each length; a cache is never used twice."""
    make = getattr(model, step)
    rtol = tolerances[model.module.dtype]
    for length in lengths or (12,):
        assert_same(
            lambda n=length: dense_cache(models.outputs(compiled, make(n, **cache))),
            lambda n=length: dense_cache(models.outputs(model.module, make(n, **cache))),
            rtol=rtol,
            scaled=True,
        )


def dense_cache(tensors):
    """Without the strides of the cache: what is compiled, by Inductor too, appends to an empty
    cache by keeping the new part as it lies, where eager copies it."""
    cached = {n: t.contiguous() for n, t in tensors.items() if n.startswith("cache")}
    return {**tensors, **cached}


def last_graph():
    """The report of the graph compiled last."""
    return fixpass.last_reports()[-1]


def assert_norms_found(model, report: Report):
    """The exact counts, and a remark for each norm module."""
    assert models.norms_on(report) == model.norms, str(report)
    paths = {remark.where for remark in report.of_pass("canonicalize-norms")}
    assert set(model.norm_modules) <= paths, str(report)
    assert not report.of_kind("failed")


@pytest.mark.parametrize("name", models.NAMES)
def test_the_expected_norms_are_all_there_are(name):
    """Counted without fixpass: in eager's operations, and in modules."""
    model = models.build(name)
    with NormCounter() as counter:
        models.outputs(model.module, model.prefill())
    assert counter.calls.total() == model.norms.total == len(model.norm_modules)


@pytest.mark.parametrize("name", WITH_CACHE)
def test_decode_of_one_token_with_any_length_cached(name):
    model = models.build(name)
    compiled = compile_model(model, dynamic=True, **EAGER)
    assert_as_eager(compiled, model, "decode", TIGHT)
    report = last_graph()
    assert_norms_found(model, report)
    assert_as_eager(compiled, model, "decode", TIGHT, 9)
    assert last_graph() is report, "another length compiled again"


@pytest.mark.parametrize("name", models.NAMES)
def test_prefill_in_bfloat16(name):
    model = models.build(name, torch.bfloat16)
    assert_as_eager(compile_model(model, **EAGER), model, "prefill", TIGHT)
    assert_norms_found(model, last_graph())


@pytest.mark.parametrize("name", ["qwen3-packed", *WITHOUT_CACHE])
def test_prefill_of_any_length(name):
    model = models.build(name)
    compiled = compile_model(model, dynamic=True, **EAGER)
    assert_as_eager(compiled, model, "prefill", TIGHT)
    report = last_graph()
    assert_norms_found(model, report)
    assert_as_eager(compiled, model, "prefill", TIGHT, 7)
    assert last_graph() is report, "another length compiled again"


@pytest.mark.inductor
@pytest.mark.parametrize("name", THROUGH_INDUCTOR)
def test_inductor_and_fixpass_give_what_eager_gives(name):
    model = models.build(name)
    compiled = compile_model(model, verify=True, strict=True)
    assert_as_eager(compiled, model, "prefill", models.TOLERANCE)
    inductor = torch.compile(model.module, backend="inductor", fullgraph=model.fullgraph)
    assert_as_eager(inductor, model, "prefill", models.TOLERANCE)
    assert_same(
        lambda: models.outputs(compiled, model.prefill()),
        lambda: models.outputs(inductor, model.prefill()),
        rtol=models.TOLERANCE[torch.float32],
        scaled=True,
    )


def matrix():
    """Every model, step, dtype and kind of length."""
    for name, step, dtype, dynamic in product(models.NAMES, STEPS, FLOATS, (False, True)):
        if step == "decode" and name not in WITH_CACHE:
            continue
        kind = "dynamic" if dynamic else "static"
        label = f"{name}-{step}-{str(dtype).removeprefix('torch.')}-{kind}"
        yield pytest.param(name, step, dtype, dynamic, id=label)


@pytest.mark.full
@pytest.mark.parametrize(("name", "step", "dtype", "dynamic"), matrix())
def test_every_combination(name, step, dtype, dynamic):
    model = models.build(name, dtype)
    compiled = compile_model(model, dynamic=dynamic, **EAGER)
    assert_as_eager(compiled, model, step, TIGHT)
    report = last_graph()
    assert_norms_found(model, report)
    if dynamic:
        assert_as_eager(compiled, model, step, TIGHT, 7)
        assert last_graph() is report, "another length compiled again"


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WITH_CACHE)
def test_decode_with_a_static_cache(name, dtype):
    model = models.build(name, dtype)
    compiled = compile_model(model, **EAGER)
    assert_as_eager(compiled, model, "decode", TIGHT, static=True)
    assert_norms_found(model, last_graph())


@pytest.mark.full
@pytest.mark.inductor
@pytest.mark.parametrize(("name", "step", "dtype", "dynamic"), matrix())
def test_every_combination_through_inductor(name, step, dtype, dynamic):
    model = models.build(name, dtype)
    compiled = compile_model(model, dynamic=dynamic, verify=True, strict=True)
    assert_as_eager(compiled, model, step, models.TOLERANCE, *((12, 7) if dynamic else ()))
