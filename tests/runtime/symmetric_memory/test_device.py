"""Which way a device reduces: by size, dtype, ranks and the device's facts alone."""

import pytest
import torch

from fixpass.runtime.symmetric_memory import collective_ops
from fixpass.runtime.symmetric_memory.device import DeviceFacts, choose

KIB, MIB = 1 << 10, 1 << 20
A100 = DeviceFacts("8.0", has_multicast=False)
H100 = DeviceFacts("9.0", has_multicast=True)
H100_WITHOUT_SWITCH = DeviceFacts("9.0", has_multicast=False)
B200 = DeviceFacts("10.0", has_multicast=True)
MI300 = DeviceFacts()


@pytest.mark.parametrize(
    ("device", "num_ranks", "num_bytes", "way"),
    [
        # Two ranks read the same bytes in one-shot and in two-shot.
        (H100, 2, 64 * MIB, "one_shot"),
        (H100, 2, 64 * MIB + 32, "process_group"),
        (H100, 4, 16 * KIB, "multimem"),
        (H100, 4, 32 * MIB, "multimem"),
        (H100, 4, 32 * MIB + 64, "process_group"),
        (H100, 4, 64 * KIB + 16, "one_shot"),  # four ranks cannot share 16 bytes
        (H100, 4, 16 * MIB + 16, "process_group"),  # and one-shot would read 64 MiB
        (H100_WITHOUT_SWITCH, 4, 512 * KIB, "one_shot"),
        (H100_WITHOUT_SWITCH, 4, 512 * KIB + 64, "two_shot"),
        (H100_WITHOUT_SWITCH, 8, 256 * KIB, "one_shot"),
        (H100_WITHOUT_SWITCH, 8, 256 * KIB + 128, "two_shot"),
        (B200, 2, 8 * MIB, "one_shot"),
        (B200, 2, 8 * MIB + 32, "process_group"),
        (B200, 4, 1 * MIB, "two_shot"),  # four ranks of B200 are faster without the switch
        (B200, 8, 128 * MIB, "multimem"),
        # No table for these: PyTorch's largest message.
        (A100, 8, 10 * MIB, "two_shot"),
        (A100, 8, 10 * MIB + 128, "process_group"),
        (MI300, 8, 256 * KIB, "one_shot"),
        (MI300, 16, 128 * KIB, "one_shot"),
        (MI300, 16, 128 * KIB + 256, "two_shot"),
        (H100, 2, 10, "process_group"),
        (H100, 2, 0, "process_group"),
    ],
)
def test_the_way_follows_from_the_message_and_the_device(device, num_ranks, num_bytes, way):
    assert choose(num_bytes, num_ranks, torch.bfloat16, device) == way


@pytest.mark.parametrize("num_ranks", [4, 8])
@pytest.mark.parametrize("num_bytes", [128, 16 * KIB, 256 * KIB, 32 * MIB])
def test_multicast_sums_float32_and_bfloat16_and_never_float16(num_bytes, num_ranks):
    for dtype in (torch.float32, torch.bfloat16):
        assert choose(num_bytes, num_ranks, dtype, H100) == "multimem"
    without = choose(num_bytes, num_ranks, torch.float16, H100_WITHOUT_SWITCH)
    assert choose(num_bytes, num_ranks, torch.float16, H100) == without


def test_other_dtypes_go_through_the_process_group():
    assert choose(1024, 2, torch.float64, H100) == "process_group"


def test_our_ops_stay_out_of_cuda_graphs():
    assert collective_ops
    for name in ("all_reduce", "matmul_all_reduce", "call_all_reduce"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.fixpass, name).default.tags
