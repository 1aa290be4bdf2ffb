"""SGLang's q and k norms: packed slices are read in place, and every other call stays SGLang's."""

import pytest
import torch
from torch import nn

from fixpass.integrations.sglang import hooks as sglang_hooks
from fixpass.integrations.sglang import serving as serving
from fixpass.runtime import strided
from helpers import sglang_standin
from helpers.calls import Calls

HEAD = 16
COPIES = ("aten::clone", "aten::copy_", "aten::_to_copy")


@pytest.fixture
def utils(monkeypatch):
    """SGLang's module of models with the hook in place, on a device that has our kernel."""
    monkeypatch.setenv("FIXPASS", "1")
    sglang_hooks.say_once.cache_clear()
    engine = sglang_standin.install(monkeypatch)
    serving.plugin()
    engine("sglang.srt.plugins.hook_registry").HookRegistry.apply_hooks()
    monkeypatch.setattr(strided, "is_available", lambda: True)
    return engine("sglang.srt.models.utils")


def packed(tokens=5, heads=4, groups=2, dtype=torch.bfloat16):
    """q, k and v of one projection, as the engine splits it."""
    sizes = (heads * HEAD, groups * HEAD, groups * HEAD)
    qkv = torch.randn(tokens, sum(sizes), generator=torch.Generator().manual_seed(tokens)).to(dtype)
    return qkv, *qkv.split(sizes, dim=-1)


def norms(utils, **changes):
    """Two norms of the engine, with weights that tell q from k."""
    import sglang.srt.layers.layernorm as layernorm

    pair = layernorm.RMSNorm(HEAD), layernorm.RMSNorm(HEAD)
    for seed, norm in enumerate(pair):
        generator = torch.Generator().manual_seed(seed)
        norm.weight.data.copy_(torch.rand(HEAD, generator=generator) + 0.5)
    for name, value in changes.items():
        setattr(pair[1], name, value)
    return pair


def wanted(x, norm):
    """The norm of each head in float64."""
    h = x.unflatten(-1, (-1, HEAD)).double()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight.double()
    return h.flatten(-2).to(x.dtype)


@pytest.mark.parametrize("tokens", [2, 5, 64])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_slices_of_a_packed_projection_are_read_in_place(utils, tokens, groups):
    qkv, q, k, _ = packed(tokens, groups=groups)
    q_norm, k_norm = norms(utils)
    before = qkv.clone()
    with Calls() as calls:
        new_q, new_k = utils.apply_qk_norm(q, k, q_norm, k_norm, HEAD, alt_stream=object())
    torch.testing.assert_close(new_q, wanted(q, q_norm), rtol=8e-3, atol=1e-3)
    torch.testing.assert_close(new_k, wanted(k, k_norm), rtol=8e-3, atol=1e-3)
    assert new_q.shape == q.shape
    assert new_q.is_contiguous()
    assert torch.equal(qkv, before)
    names = [name for name, _ in calls.found]
    first = names.index("fixpass::qk_norm")
    assert not set(names[:first]) & set(COPIES)
    heads, keys, *_ = calls.found[first][1]
    assert (heads.data_ptr(), keys.data_ptr()) == (q.data_ptr(), k.data_ptr())


@pytest.mark.parametrize(
    "changes",
    [
        {"variance_size_override": 8},
        {"cast_x_before_out_mul": True},
        {"x_pad_to_multiple": 32},
        {"variance_epsilon": 1e-5},
        {"_forward_method": lambda x: x},
        {"weight": nn.Parameter(torch.ones(HEAD))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_norm_of_another_kind_stays_sglangs(utils, changes):
    _, q, k, _ = packed()
    q_norm, k_norm = norms(utils, **changes)
    with Calls() as calls:
        utils.apply_qk_norm(q, k, q_norm, k_norm, HEAD)
    assert "fixpass::qk_norm" not in [name for name, _ in calls.found]


def test_dense_and_empty_tensors_stay_sglangs(utils):
    q_norm, k_norm = norms(utils)
    _, q, k, _ = packed()
    _, empty_q, empty_k, _ = packed(tokens=0)
    with Calls() as calls:
        dense = utils.apply_qk_norm(q.contiguous(), k.contiguous(), q_norm, k_norm, HEAD)
        empty = utils.apply_qk_norm(empty_q, empty_k, q_norm, k_norm, HEAD)
    assert "fixpass::qk_norm" not in [name for name, _ in calls.found]
    torch.testing.assert_close(dense[0], wanted(q, q_norm), rtol=8e-3, atol=1e-3)
    assert empty[0].shape == empty_q.shape


def test_without_our_kernel_sglang_copies_as_before(utils, monkeypatch):
    monkeypatch.setattr(strided, "is_available", lambda: False)
    _, q, k, _ = packed()
    with Calls() as calls:
        new_q, _ = utils.apply_qk_norm(q, k, *norms(utils), HEAD)
    assert "fixpass::qk_norm" not in [name for name, _ in calls.found]
    torch.testing.assert_close(new_q, wanted(q, norms(utils)[0]), rtol=8e-3, atol=1e-3)
