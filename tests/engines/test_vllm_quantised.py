"""FP8 checkpoints in the real vLLM on CPU: norms before quantised layers, with vLLM's ops or not.

vLLM's build for CPU has no norm that quantises; in one test stand-ins have their names.
"""

import pytest
import tiny
from vllm_engines import applied

pytestmark = pytest.mark.engine
LAYERS = tiny.SHAPE["num_hidden_layers"]
SITES = 2 * LAYERS
OURS = {
    "static": ("vllm_rms_norm_static_fp8", SITES),
    # vLLM's dynamic kernel takes no residual under our contract: the first norm alone has none.
    "token": ("vllm_rms_norm_dynamic_fp8", 1),
}


@pytest.mark.parametrize("scales", OURS)
def test_norms_are_joined_with_their_quantisation_and_the_tokens_are_vllms(engines, scales):
    without, ours = (engines.run(f"qwen3-fp8-{scales}", fixpass=on) for on in (False, True))
    assert ours["tokens"] == without["tokens"]
    assert ours["reports"][0].count("its quantisation to float8_e4m3fn") == 3
    assert len(applied(ours, "canonicalize-norms")[0]) == 4 * LAYERS + 1 + SITES


@pytest.mark.parametrize("scales", OURS)
def test_vllms_quantising_norms_are_called_where_their_contract_holds(engines, scales):
    kernel, sites = OURS[scales]
    environ = (
        ("FIXPASS_TEST_QUANTISED_OPS", "1"),
        ("FIXPASS_NORM_KERNELS", f"{kernel},inductor"),
    )
    ours = engines.run(f"qwen3-fp8-{scales}", fixpass=True, environ=environ)
    assert ours["tokens"] == engines.run(f"qwen3-fp8-{scales}", fixpass=False)["tokens"]
    chosen = [remark for remark in ours["choices"][0] if remark == kernel]
    assert len(chosen) == sites
