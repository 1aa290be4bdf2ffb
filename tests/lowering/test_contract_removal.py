"""With any one constraint taken out of the contract table, some call goes wrong; with all, none.

Each row is asked about the same sites. A site that it takes is called, with stand-ins that read
memory by pointer and with our kernels in Triton's interpreter, and compared with the reference.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "helpers" / "contract_removal.py"

IN_PLACE = "the kernel's callable copies what the kernel writes; test_contract_calls takes it out"
AT_CALL = "the kernel's callable runs the reference there: test_providers calls it"
NO_ORDER = "the results of rms_norm_quant are dense: the op has no step for another order"
DENSE_OUT = "out has the shape of x, and out is dense 2-D"
LAST_BIT = "y / s and y * (1 / s) round to another code for fewer than 1 of 100 values"
MANY_LAUNCHES = (
    "the launcher splits such rows into several launches, and is right: a matter of cost"
)
X_FAR, OUT_FAR, RESIDUAL_FAR = (
    f"{name}'s last element is within 2^32 of its first" for name in ("x", "out", "residual")
)
FP8_OUT = "out.dtype in (float8_e4m3fn, float8_e4m3fnuz)"
UP_TO_6, MERGED = "x is 1-D to 6-D", "leading dimensions merge to at most 4"
# Constraints that no call shows to be needed, by kernel, and why.
NOT_SHOWN = {
    "vllm_add_rms_norm": {"x is dense": IN_PLACE, "residual is dense": IN_PLACE},
    "flashinfer_rms_norm": {X_FAR: AT_CALL, OUT_FAR: AT_CALL},
    "flashinfer_add_rms_norm": {
        "x is 2-D": IN_PLACE,
        "x.stride[-1] == 1": IN_PLACE,
        "residual.stride[-1] == 1": IN_PLACE,
        "x's rows start at multiples of 16 bytes": IN_PLACE,
        "residual's rows start at multiples of 16 bytes": IN_PLACE,
        X_FAR: AT_CALL,
        RESIDUAL_FAR: AT_CALL,
    },
    "vllm_rms_norm_static_fp8": {
        "out is dense 2-D": NO_ORDER,
        "residual is dense 2-D": IN_PLACE,
    },
    "vllm_rms_norm_dynamic_fp8": {"out is dense 2-D": NO_ORDER, FP8_OUT: LAST_BIT},
    "vllm_rms_norm_dynamic_int8": {"out is dense 2-D": NO_ORDER, "out.dtype in (int8)": LAST_BIT},
    "vllm_rms_norm_block_fp8": {"out is dense 2-D": NO_ORDER, FP8_OUT: LAST_BIT},
    "aiter_rms_norm of 2026": {"x is 2-D": DENSE_OUT},
    "aiter_add_rms_norm of 2026": {"x is 2-D": DENSE_OUT},
}
OURS_NOT_SHOWN = {
    **{
        f"strided_{op}": {UP_TO_6: MANY_LAUNCHES, MERGED: MANY_LAUNCHES}
        for op in ("rms_norm", "layer_norm", "add_rms_norm", "rms_norm_quant")
    },
    "strided_gated_rms_norm": {
        "group_size divides hidden_size": "the reference refuses such groups, too",
        UP_TO_6: MANY_LAUNCHES,
        MERGED: MANY_LAUNCHES,
    },
    "strided_qk_norm": {"q is 1-D to 6-D": MANY_LAUNCHES, "k is 1-D to 6-D": MANY_LAUNCHES},
}


def lines(way, whose):
    """(word, kernel, constraint, fault) of each line, from a process with stand-ins of its own."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", "-W", "ignore", str(PROGRAM), way, whose]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in done.stdout.splitlines():
        word, kernel, needs, constraint, fault = line.split("|", 4)
        yield word, kernel + " of 2026" * ("gemma" in needs), constraint, fault


@pytest.mark.parametrize(
    ("way", "whose", "not_shown", "shown"),
    [
        ("called", "opaque", NOT_SHOWN, 150),
        pytest.param("called", "ours", OURS_NOT_SHOWN, 35, marks=pytest.mark.full),
        pytest.param("compiled", "opaque", NOT_SHOWN, 150, marks=pytest.mark.full),
    ],
    ids=["called-opaque", "called-ours", "compiled-opaque"],
)
def test_without_any_one_constraint_a_call_goes_wrong(way, whose, not_shown, shown):
    found = list(lines(way, whose))
    assert [line for line in found if line[0] == "WRONG"] == []
    missed = [(kernel, constraint) for word, kernel, constraint, _ in found if word == "MISSED"]
    assert missed == [(kernel, each) for kernel, names in not_shown.items() for each in names]
    assert sum(word == "found" for word, *_ in found) >= shown
