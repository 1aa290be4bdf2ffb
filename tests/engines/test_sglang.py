"""SGLang itself on CPU: the hooks are in place, and the aiter path of its norms comes out right.

Kernels of aiter are stand-ins that check their contract, under the names by which SGLang has them:
without fixpass they are given what the real ones would read out of bounds.
"""

import pytest
import sglang
import torch
from sglang.srt.layers import layernorm

from fixpass.integrations.sglang import serving as integration
from fixpass.integrations.sglang.hooks import is_in_place
from helpers.standins import LayoutFault, aiter_rms_norm

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]


def bf16(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def norm(hidden=128):
    module = layernorm.RMSNorm(hidden).bfloat16()
    module.weight.data = bf16(hidden, seed=9)
    return module


def test_every_hook_is_in_place(on_rocm, fixpass_on):
    registry = fixpass_on()
    targets = {hook.target for hook in integration.serving_hooks()}
    assert targets <= registry._patched
    assert len(targets) == 7
    for target, hooks in registry._hooks.items():
        for _, run, _ in hooks:
            assert is_in_place(integration.Hook(target, "AROUND", run))


def test_without_aiter_there_is_nothing_to_guard(fixpass_on):
    assert fixpass_on()._patched == {
        f"{integration.LOADER}.device_loading_context",
        f"{integration.LOADER}.DefaultModelLoader.restore_weights_before_loading",
    }


def strided_heads():
    """q and k of a packed projection: (tokens, heads, 128)."""
    packed = bf16(5, 3072)
    return packed[:, :2048].view(5, 16, 128), packed[:, 2048:2560].view(5, 4, 128)


FAULTS = {
    "2-D x, 3-D residual": lambda: (bf16(6, 128), bf16(2, 3, 128, seed=1)),
    "an empty batch": lambda: (bf16(2, 0, 128), None),
    "an empty batch with a residual": lambda: (bf16(2, 0, 128), bf16(2, 0, 128)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_aiter_path_faults_without_fixpass_and_is_right_with_it(on_rocm, fixpass_on, name):
    x, residual = FAULTS[name]()
    rms = norm()
    with pytest.raises(LayoutFault):
        rms.forward_aiter(x, residual)
    fixpass_on()
    got = rms.forward_aiter(x, residual)
    out, total = got if residual is not None else (got, None)
    want_total = x if residual is None else x + residual.reshape(x.shape)
    assert out.shape == x.shape
    assert torch.equal(out.reshape(-1, 128), expected(want_total.reshape(-1, 128), rms))
    if residual is not None:
        assert total.shape == residual.shape
        assert torch.equal(total.reshape(x.shape), want_total)


def expected(rows, rms):
    return aiter_rms_norm(rows, rms.weight, rms.variance_epsilon) if rows.numel() else rows


def test_strided_q_and_k_are_normalised_through_the_aiter_path(on_rocm, fixpass_on):
    """SGLang 0.5.23 copies them itself, and is right without us too; it stays right."""
    rms = norm()
    fixpass_on()
    for x in strided_heads():
        got = rms.forward_aiter(x)
        assert got.shape == x.shape
        assert torch.equal(got.reshape(-1, 128), expected(x.reshape(-1, 128), rms))


def test_strided_q_and_k_reach_the_kernel_as_they_are_called_directly(on_rocm, fixpass_on):
    """As models call the kernel by itself, and as SGLang did before it copied."""
    q, _ = strided_heads()
    rms = norm()
    with pytest.raises(LayoutFault):
        layernorm.rms_norm(q, rms.weight, 1e-6)
    fixpass_on()
    got = layernorm.rms_norm(q, rms.weight, 1e-6)
    assert torch.equal(got.reshape(-1, 128), aiter_rms_norm(q.reshape(-1, 128), rms.weight, 1e-6))


def test_a_padded_norm_of_3_d_input_keeps_its_shape(on_rocm, fixpass_on):
    rms = norm()
    rms.x_pad_to_multiple = 256

    def padded(x, weight, eps, residual, multiple):
        out = torch.nn.functional.pad(aiter_rms_norm(x, weight, eps), (0, multiple - x.shape[-1]))
        return out if residual is None else (out, x + residual)

    rms._fused_pad_kernel = padded
    x = bf16(2, 3, 128)
    assert rms.forward_aiter(x).shape == (6, 256)
    fixpass_on()
    assert rms.forward_aiter(x).shape == (2, 3, 256)


def test_an_unsupported_version_is_said_once_and_hooks_nothing(monkeypatch, fixpass_on):
    said = []
    monkeypatch.setattr(integration, "say_once", said.append)
    monkeypatch.setattr(sglang, "__version__", "0.7.1")
    assert not fixpass_on()._hooks
    (text,) = said
    assert text == "fixpass works with SGLang 0.5, and this is 0.7.1: SGLang runs without fixpass"


def test_the_environment_is_the_one_that_the_page_names():
    assert sglang.__version__ == "0.5.23"
