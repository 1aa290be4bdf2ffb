"""SGLang's own Qwen3 attention on CPU, with the flags of ROCm: q and k norms copy nothing.

aiter's kernel is a stand-in. Ours runs in Triton's interpreter, on the operands that SGLang gives.
"""

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.models import qwen3

from fixpass.runtime import strided
from fixpass.runtime.kernels.qk_norm import qk_norm
from fixpass.testing.kernel_memory import trace_memory
from helpers.calls import Calls

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]
HEAD, HEADS, GROUPS, HIDDEN = 16, 4, 2, 64


@pytest.fixture
def attention(on_rocm):
    """An attention layer with random weights, as SGLang builds it on one rank."""
    context, parallel = runtime_context.get_context(), runtime_context.get_parallel()
    ranks = {"tp_size": 1, "tp_rank": 0, "attn_tp_size": 1, "attn_tp_rank": 0}
    with context.override_server_args(device="cpu"), parallel.override(**ranks):
        layer = qwen3.Qwen3Attention(
            HIDDEN, HEADS, GROUPS, head_dim=HEAD, rms_norm_eps=1e-6, max_position_embeddings=128
        ).bfloat16()
        torch.manual_seed(0)
        for parameter in layer.parameters():
            torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
        yield layer.requires_grad_(False)


def prepared(layer, tokens):
    """q and k as the rotary embedding gets them, and the ops that were called until then."""
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    calls, found = Calls(), []
    hook = layer.rotary_emb.register_forward_pre_hook(
        lambda _, args: found.append((args[1], args[2], list(calls.found)))
    )
    with calls, hook:
        layer.forward_prepare_native(torch.arange(tokens), x)
    ((q, k, ops),) = found
    return q, k, ops


@pytest.mark.parametrize("tokens", [2, 7])
def test_sglang_copies_q_and_k_and_with_fixpass_nothing_is_copied(
    attention, fixpass_on, monkeypatch, tokens
):
    want_q, want_k, ops = prepared(attention, tokens)
    copied = [args[0].nbytes for name, args in ops if name == "aten::clone"]
    assert copied == [tokens * HEADS * HEAD * 2, tokens * GROUPS * HEAD * 2]
    fixpass_on()
    monkeypatch.setattr(strided, "is_available", lambda: True)
    q, k, ops = prepared(attention, tokens)
    names = [name for name, _ in ops]
    assert names.count("fixpass::qk_norm") == 1
    assert not {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous"} & set(names)
    assert torch.equal(q, want_q)
    assert torch.equal(k, want_k)


def test_our_kernel_reads_the_slices_that_sglang_gives_it_once(attention, fixpass_on, monkeypatch):
    fixpass_on()
    monkeypatch.setattr(strided, "is_available", lambda: True)
    q, k, ops = prepared(attention, 7)
    (operands,) = [args for name, args in ops if name == "fixpass::qk_norm"]
    heads, keys = operands[:2]
    assert heads.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
    assert heads.stride() == ((HEADS + 2 * GROUPS) * HEAD, HEAD, 1)
    outs = torch.empty(heads.shape).bfloat16(), torch.empty(keys.shape).bfloat16()
    report = trace_memory(qk_norm, *operands, q_out=outs[0], k_out=outs[1])
    assert not report.faults, report
    assert report.moved(("q", "k"), ("q_out", "k_out")) == 1.0
    assert torch.equal(outs[0].view(q.shape), q)
    assert torch.equal(outs[1].view(k.shape), k)
