"""Every opaque kernel gets the layout that its contract asks for, compiled and eager.

The stand-ins read memory by pointer, as the real kernels do, so a wrong stride, offset or pitch
gives wrong values or raises. The right values are computed in float64 from the logical tensors.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fixpass.eager_kernels import WRAPPED

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parent / "helpers" / "contract_calls.py"
KERNELS = (
    "aiter_rms_norm",
    "aiter_layer_norm",
    "aiter_add_rms_norm",
    "vllm_rms_norm",
    "vllm_add_rms_norm",
    "flashinfer_rms_norm",
    "flashinfer_add_rms_norm",
)


def run(*arguments, cache=None):
    """The program in a process of its own, where no other stand-ins are registered."""
    cached = {"TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache else {}
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **cached}
    command = [sys.executable, "-P", "-W", "ignore", str(PROGRAM), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


OF_2026 = ("aiter_rms_norm:2026", "aiter_add_rms_norm:2026")


@pytest.mark.parametrize("kernel", [*sorted({row.kernel for row in WRAPPED}), *OF_2026])
def test_eager_calls_get_what_the_contract_asks_for(kernel):
    assert "0 wrong" in run("eager", kernel)


# Other constraints of the same row imply these in eager calls: the result is dense, or is x itself.
IMPLIED = {"x is 2-D", "x is 2-D to 4-D", "x is dense", "out is dense", "out is dense 2-D"}
ALIGNED = "is dense and starts at a multiple of 16 bytes"
ALSO_IMPLIED = {
    # Weight and bias are copied together.
    "aiter_layer_norm": {f"weight {ALIGNED}", f"bias {ALIGNED}"},
    # x is written in place, so that the constraint on the result speaks of it too.
    "flashinfer_add_rms_norm": {"x.stride[-1] == 1"},
}
OTHERS = (*KERNELS[1:5], "flashinfer_add_rms_norm", "aiter_rms_norm:2026")


@pytest.mark.parametrize(
    "kernel",
    ["aiter_rms_norm", *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)],
)
def test_without_a_constraint_on_a_layout_some_call_is_wrong(kernel):
    lines = [line.partition(" without ") for line in run("without", kernel).splitlines()]
    found = {text for word, _, text in lines if word == "found"}
    missed = {text for word, _, text in lines if word == "MISSED"}
    assert len(found) >= 2
    assert missed <= IMPLIED | ALSO_IMPLIED.get(kernel, set())


# 10 to 25 s each.
GRAPHS = [
    pytest.param(
        kernel,
        shapes,
        marks=() if (kernel, shapes) == ("aiter_rms_norm", "dynamic") else pytest.mark.full,
    )
    for kernel in (*KERNELS, *OF_2026)
    for shapes in ("static", "dynamic")
]


@pytest.mark.parametrize(("kernel", "dynamic"), GRAPHS)
def test_rewritten_graphs_call_kernels_as_the_contract_asks(kernel, dynamic):
    assert "0 wrong" in run("graph", kernel, dynamic)


@pytest.mark.inductor
def test_compiled_code_calls_kernels_as_the_contract_asks(tmp_path):
    """Cold, then warm from Inductor's cache in a new process; one graph for each library."""
    cold = run("inductor", "all", cache=tmp_path)
    warm = run("inductor", "all", cache=tmp_path)
    assert "0 wrong, 0 graphs from the cache" in cold
    assert "0 wrong, 3 graphs from the cache" in warm


@pytest.mark.full
@pytest.mark.parametrize("dynamic", ["static", "dynamic"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_rewritten_graphs_of_training_have_right_values_and_gradients(kernel, dynamic):
    assert "0 wrong" in run("train", kernel, dynamic)


@pytest.mark.full
@pytest.mark.inductor
@pytest.mark.parametrize("way", ["inductor", "train-inductor"])
@pytest.mark.parametrize("dynamic", ["static", "dynamic"])
def test_compiled_code_of_training_and_dynamic_shapes_calls_kernels_as_asked(
    tmp_path, way, dynamic
):
    assert "0 wrong" in run(way, "all", dynamic, cache=tmp_path)


def test_under_verify_a_call_checks_its_contract():
    assert "aiter_rms_norm: x is dense 2-D does not hold" in run("verify", "aiter_rms_norm")
