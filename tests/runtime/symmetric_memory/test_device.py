"""Which way a device reduces: by size, dtype, ranks and multicast alone."""

import pytest
import torch

from fixpass.runtime.symmetric_memory.device import choose

KIB = 1024


@pytest.mark.parametrize(
    ("num_bytes", "num_ranks", "multicast", "way"),
    [
        (16 * KIB, 8, False, "one_shot"),
        (128 * KIB, 8, False, "one_shot"),
        (256 * KIB, 8, False, "two_shot"),
        (256 * KIB + 16, 8, False, "one_shot"),  # not to be cut in eight parts of 16 bytes
        (16 * KIB, 8, True, "multimem"),
        (256 * KIB, 8, True, "multimem"),
        (16, 8, True, "one_shot"),
        (10, 2, True, "process_group"),
        (0, 2, True, "process_group"),
    ],
)
def test_the_way_follows_from_the_message_and_the_device(num_bytes, num_ranks, multicast, way):
    assert choose(num_bytes, num_ranks, torch.bfloat16, multicast) == way


@pytest.mark.parametrize("num_ranks", [2, 8])
@pytest.mark.parametrize("num_bytes", [128, 16 * KIB, 128 * KIB, 256 * KIB, 64 << 20])
def test_multicast_sums_float32_and_bfloat16_and_never_float16(num_bytes, num_ranks):
    for dtype in (torch.float32, torch.bfloat16):
        assert choose(num_bytes, num_ranks, dtype, True) == "multimem"
    without = choose(num_bytes, num_ranks, torch.float16, False)
    assert choose(num_bytes, num_ranks, torch.float16, True) == without


def test_other_dtypes_go_through_the_process_group():
    assert choose(1024, 2, torch.float64, True) == "process_group"


def test_our_ops_stay_out_of_cuda_graphs():
    for name in ("all_reduce", "matmul_all_reduce", "call_all_reduce"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.fixpass, name).default.tags
