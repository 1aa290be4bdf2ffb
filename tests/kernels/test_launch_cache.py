"""Launches are planned once for a signature, and say to the kernel what a fresh plan says."""

import sys

import pytest
import torch

from fixpass.runtime import strided
from fixpass.runtime.kernels import add_rms_norm, launch_cache, qk_norm, rms_norm
from fixpass.testing import bf16
from helpers.fake_gpu import fake_gpu

CACHES = [each.LAUNCHES for each in (rms_norm, add_rms_norm, qk_norm)] + [rms_norm.LAYER_LAUNCHES]


@pytest.fixture
def gpu():
    def forget():
        for cache in CACHES:
            cache.replays.clear()
            cache.kernel.device_caches.clear()

    forget()
    with fake_gpu() as fake:
        yield fake
    forget()


def packed(tokens=5, offset=0):
    wide = bf16(tokens, 3072 + 8)
    return wide[:, offset : offset + 1024].unflatten(1, (8, 128))


def pointers(arguments):
    """(address, number of elements) of tensors; other arguments as they are."""
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]


def weights_of(size):
    return bf16(size), bf16(2 * size)[::2], bf16(size + 1)[1:]


@pytest.mark.parametrize("offset", [0, 8, 4, 1], ids=lambda n: f"offset {n}")
def test_a_repeated_call_launches_what_a_planned_one_launches(gpu, offset):
    for weight in weights_of(128):
        x, y = packed(offset=offset), packed(offset=offset)
        out = torch.empty(5, 8, 128, dtype=torch.bfloat16)
        for _ in range(2):  # planned and compiled, then looked up
            rms_norm.rms_norm(y, weight, 1e-6, out=out)
        gpu.launches.clear()
        rms_norm.rms_norm(x, weight, 1e-6, out=out)
        rms_norm.LAUNCHES.replays.clear()
        rms_norm.rms_norm(x, weight, 1e-6, out=out)
        (name, grid, looked_up), (_, _, planned) = gpu.launches
        assert (name, grid) == ("norm_kernel", (20, 1, 1))
        names = rms_norm.norm_kernel.arg_names
        found, wanted = (dict(zip(names, pointers(a), strict=True)) for a in (looked_up, planned))
        if weight.stride(0) == 2:  # a copy of its own each time
            assert found.pop("weight_ptr") != weight.data_ptr()
            wanted.pop("weight_ptr")
        assert found == wanted


def differing():
    x, out = packed(), torch.empty(5, 8, 128, dtype=torch.bfloat16)
    weight = bf16(128)
    yield "shape", (packed(4), weight, 1e-6, out[:4])
    yield "offset", (packed(offset=4), weight, 1e-6, out)
    yield "stride", (out.clone(), weight, 1e-6, out)
    yield "dtype", (x, weight.float(), 1e-6, out)
    yield "output dtype", (x, weight, 1e-6, out.float())
    yield "no weight", (x, None, 1e-6, out)
    yield "eps", (x, weight, 1e-5, out)


@pytest.mark.parametrize("call", [pytest.param(call, id=what) for what, call in differing()])
def test_another_signature_is_another_launch(gpu, call):
    x, out, weight = packed(), torch.empty(5, 8, 128, dtype=torch.bfloat16), bf16(128)
    rms_norm.rms_norm(x, weight, 1e-6, out=out)
    rms_norm.rms_norm(x, weight, 1e-6, out=out)
    rms_norm.rms_norm(*call[:3], out=call[3])
    assert len(rms_norm.LAUNCHES.replays) == 2
    assert gpu.launches[0][2][-1] is gpu.launches[1][2][-1]


def test_a_known_signature_does_not_excuse_overlap(gpu):
    x, out = bf16(4, 64), bf16(4, 64)
    rms_norm.rms_norm(x, None, 1e-6, out=out)
    both = bf16(5, 64)
    with pytest.raises(ValueError, match="lies partly over x"):
        rms_norm.rms_norm(both[:4], None, 1e-6, out=both[1:])
    assert len(gpu.launches) == 1


def test_slices_and_an_empty_side_are_planned_each_time(gpu):
    q, k = bf16(0, 4, 64), bf16(2, 1, 64)
    for _ in range(2):
        qk_norm.qk_norm(q, k, None, None, 1e-6, q_out=q.clone(), k_out=torch.empty_like(k))
    assert [name for name, *_ in gpu.launches] == ["norm_kernel"] * 2
    assert qk_norm.LAUNCHES.replays == {}


def test_the_cache_is_bounded_and_keeps_no_tensor(gpu, monkeypatch):
    monkeypatch.setattr(launch_cache, "MAX_SIGNATURES", 3)
    out = torch.empty(9, 64)
    for rows in range(1, 9):
        rms_norm.rms_norm(out[:rows], None, 1e-6, out=out[:rows])
        assert len(rms_norm.LAUNCHES.replays) <= 3
    kept = [a for replay in rms_norm.LAUNCHES.replays.values() for a in replay.arguments]
    assert not any(isinstance(a, torch.Tensor) for a in kept)


def calls_of(run):
    count = 0

    def count_call(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(count_call)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_the_host_makes_few_calls_for_a_known_launch(gpu):
    q, k, weight = packed(), packed()[:, :2], bf16(128)
    x = bf16(1, 4096)
    for run in (
        lambda: strided.rms_norm(x, None, None, 1e-6),
        lambda: strided.add_rms_norm(x, x, None, None, 1e-6),
        lambda: strided.qk_norm(q, k, weight, weight, 1e-6),
    ):
        run()
        run()
        assert calls_of(run) <= 28
