"""An FP8 checkpoint in the real vLLM on CPU: its norms are joined with their quantisation.

vLLM's build for CPU has no norm that quantises. One test registers the name of one, whose contract
does not hold for what vLLM's layers compute.
"""

import pytest
import tiny
from vllm_engines import applied

pytestmark = pytest.mark.engine
LAYERS = tiny.SHAPE["num_hidden_layers"]
KERNEL = "vllm_rms_norm_dynamic_fp8"


def test_norms_are_joined_with_their_quantisation_and_the_tokens_are_vllms(engines):
    without, ours = (engines.run("qwen3-fp8", fixpass=on) for on in (False, True))
    assert ours["tokens"] == without["tokens"]
    # Four norms a layer and the last one; two of a layer stand before a quantised layer.
    assert len(applied(ours, "canonicalize-norms")[0]) == 4 * LAYERS + 1 + 2 * LAYERS
    assert "joined with its quantisation to float8_e4m3fn" in ours["reports"][0]


def test_a_quantising_norm_of_vllms_is_refused_with_the_reason_where_it_computes_another_value(
    engines,
):
    environ = (
        ("FIXPASS_TEST_QUANTISED_OP", "1"),
        ("FIXPASS_NORM_KERNELS", f"{KERNEL},inductor"),
    )
    ours = engines.run("qwen3-fp8", fixpass=True, environ=environ)
    assert ours["tokens"] == engines.run("qwen3-fp8", fixpass=False)["tokens"]
    (report,) = ours["reports"]
    assert f"{KERNEL}: quantised as vLLM does: divide does not hold" in report
    assert f"{KERNEL}: there is no residual does not hold" in report
