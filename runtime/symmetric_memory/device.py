"""All-reduce on CUDA and ROCm devices, through `torch.distributed._symmetric_memory`.

Data that already lies in symmetric memory is read where it is; other data is copied into the
group's workspace first. The way of the reduction depends only on the message and the device, so
all ranks choose the same. Nothing here has a CPU path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch._C._distributed_c10d import _SymmetricMemory
from torch.distributed import _symmetric_memory as symm_mem
from torch.distributed.distributed_c10d import GroupName

from fixpass.runtime.symmetric_memory import groups
from fixpass.runtime.symmetric_memory.device_limits import limits_of
from fixpass.runtime.symmetric_memory.process_group import SUMMED, process_group_all_reduce

Way = Literal["multimem", "one_shot", "two_shot", "process_group"]
# PyTorch's multimem kernels have no float16.
MULTIMEM = (torch.float32, torch.bfloat16)
# The device kernels read 16 bytes at a time; two-shot cuts the data in num_ranks such parts.
ALIGNMENT = 16


@dataclass(frozen=True)
class DeviceFacts:
    """The facts of a device that decide about the way."""

    architecture: str = ""
    """The compute capability of a CUDA device, such as "9.0"; empty on ROCm."""
    has_multicast: bool = False
    """The switch can sum data (NVLink SHARP)."""

    @staticmethod
    @cache
    def of(place: torch.device) -> "DeviceFacts":
        """The facts of a present device."""
        multicast = _SymmetricMemory.has_multicast_support(DeviceType.CUDA, place.index or 0)
        if torch.version.hip:
            return DeviceFacts("", multicast)
        major, minor = torch.cuda.get_device_capability(place)
        return DeviceFacts(f"{major}.{minor}", multicast)


def choose(num_bytes: int, num_ranks: int, dtype: torch.dtype, device: DeviceFacts) -> Way:
    """The way to sum `num_bytes` of each of `num_ranks` ranks on this device."""
    limits = limits_of(device.architecture, num_ranks)
    if dtype not in SUMMED or num_bytes == 0 or num_bytes % ALIGNMENT:
        return "process_group"
    if num_bytes > limits.symmetric:
        return "process_group"
    divides = num_bytes % (ALIGNMENT * num_ranks) == 0
    if device.has_multicast and limits.multimem and divides and dtype in MULTIMEM:
        return "multimem"
    if num_bytes <= limits.one_shot:
        return "one_shot"
    return "two_shot" if divides else "process_group"


def all_reduce(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    """x reduced over the ranks of the group: a new dense tensor of the same shape and dtype."""
    group = groups.find(group_name)
    # A captured graph replays with fixed addresses, and nothing proves that they stay valid.
    if group is None or reduce_op != "sum" or torch.cuda.is_current_stream_capturing():
        return process_group_all_reduce(x, reduce_op, group_name)
    way = choose(x.nbytes, group.size(), x.dtype, DeviceFacts.of(x.device))
    if way == "process_group":
        return process_group_all_reduce(x, reduce_op, group_name)
    ops, name = torch.ops.symm_mem, group.group_name
    x = x.contiguous()
    if way == "multimem" and symm_mem.is_symm_mem_tensor(x):
        return ops.multimem_one_shot_all_reduce(x, reduce_op, name)  # type: ignore[no-any-return]
    if way == "multimem":
        # The op works in place, and the caller's tensor must not change.
        return ops.multimem_all_reduce_(_staged(x, name), reduce_op, name).clone()  # type: ignore[no-any-return]
    resident = x if symm_mem.is_symm_mem_tensor(x) else _staged(x, name)
    if way == "one_shot":
        return ops.one_shot_all_reduce(resident, reduce_op, name)  # type: ignore[no-any-return]
    return ops.two_shot_all_reduce_out(resident, reduce_op, name, torch.empty_like(x))  # type: ignore[no-any-return]


@contextmanager
def allocating_in(group_name: str) -> Iterator[None]:
    """Within it, new tensors on the device come from the symmetric memory pool."""
    if torch.cuda.is_current_stream_capturing():
        # Buffers of a captured graph can move between capture and replay.
        yield
        return
    with torch.cuda.use_mem_pool(symm_mem.get_mem_pool(torch.device("cuda"))):
        yield


def _staged(x: Tensor, name: str) -> Tensor:
    """A copy of x in the group's workspace, which grows to the largest message and stays."""
    handle = symm_mem.get_symm_mem_workspace(GroupName(name), x.nbytes)
    return handle.get_buffer(handle.rank, x.shape, x.dtype).copy_(x)
