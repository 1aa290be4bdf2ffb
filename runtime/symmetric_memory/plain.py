"""All-reduce through shared memory with torch operations alone, for machines without a compiler.

Messages go slot by slot: each rank copies a piece into its slot, all meet, and each sums all
slots in rank order in float32. Two slots take turns with the meetings, so that a slot is written
again only when all have met once more. Waiting hands the core on; nobody sleeps on a futex.
"""

import os
import platform
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.distributed import DistBackendError

from fixpass.runtime.symmetric_memory.ordinary import SUMMED
from fixpass.runtime.symmetric_memory.settings import CONTROL_BYTES, Settings

# A rank's data must be visible before its arrival is. x86 keeps the order of stores by itself.
ORDERED_STORES = platform.machine() in ("x86_64", "AMD64", "i686")
DTYPES = (*SUMMED, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MAX_DIMS = 8
# In a control page, as int64: arrivals, the rank's state, then two descriptions.
ARRIVED, STATE, DESCRIPTIONS = 0, 16, 32
# A rank that gave up may have been counted as arrived; one that left was there for all of it.
LEFT, GAVE_UP = 1, 2


class PlainGroup:
    """The ranks of one host and their segments, uint8[settings.segment_bytes] each, by rank."""

    def __init__(
        self, name: str, segments: Sequence[Tensor], rank: int, settings: Settings
    ) -> None:
        self.name, self.rank, self.settings = name, rank, settings
        self._controls = [s[:CONTROL_BYTES].view(torch.int64) for s in segments]
        self._slots = [
            [_area(s, CONTROL_BYTES + parity * settings.slot_bytes, settings.slot_bytes)
             for s in segments]
            for parity in (0, 1)
        ]  # fmt: skip
        self._met = 0
        self._calls = 0
        self._staged_bytes = 0
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._broken = ""

    def all_reduce(self, x: Tensor, op: str) -> Tensor | None:
        """The sum of the ranks' x, dense; None where it cannot be summed here, on every rank."""
        self._check_caller()
        try:
            x = x.contiguous()
            summed = op == "sum" and x.dtype in SUMMED
            self._compare(x, op)
            return self._sum(x) if summed else None
        finally:
            self._lock.release()

    def stats(self) -> tuple[int, int, int, int, int]:
        """Calls, none of them two-shot, and the bytes that they copied; see `context.Stats`."""
        return self._calls, 0, self._staged_bytes, 0, 0

    def leave(self) -> None:
        """Tell the others that this rank takes part no more."""
        if os.getpid() == self._pid and not self._broken:
            self._controls[self.rank][STATE] = LEFT

    def _check_caller(self) -> None:
        if os.getpid() != self._pid:
            raise ValueError(
                f"group {self.name!r} was made before this process was forked: make a group of "
                "the child's own, or use the spawn start method"
            )
        if not self._lock.acquire(blocking=False):
            raise ValueError(
                f"group {self.name!r} is in use by another thread: give each thread a group of "
                "its own, or let one thread make all calls"
            )
        if self._broken:
            self._lock.release()
            raise DistBackendError(self._broken)

    def _sum(self, x: Tensor) -> Tensor:
        self._calls += 1
        self._staged_bytes += x.nbytes
        out = torch.empty_like(x)
        step = self.settings.slot_bytes // x.itemsize
        flat, result = x.view(-1), out.view(-1)
        for start in range(0, x.numel(), step):
            piece = flat[start : start + step]
            slots = [
                slot[: piece.numel() * x.itemsize].view(x.dtype)
                for slot in self._slots[(self._met + 1) & 1]
            ]
            slots[self.rank].copy_(piece)
            self._meet()
            total = slots[0].float()
            # A slot that is float32 is its own `.float()`, and is not to be added into.
            total = total.clone() if total.data_ptr() == slots[0].data_ptr() else total
            for slot in slots[1:]:
                total += slot
            result[start : start + step].copy_(total)
        return out

    def _compare(self, x: Tensor, op: str) -> None:
        dtype = DTYPES.index(x.dtype) if x.dtype in DTYPES else -1
        shape = list(x.shape[:MAX_DIMS])
        mine = [dtype, int(op == "sum"), x.dim(), *shape, *[0] * (MAX_DIMS - len(shape))]
        at = DESCRIPTIONS + ((self._met + 1) & 1) * 16
        self._controls[self.rank][at : at + len(mine)] = torch.tensor(mine)
        self._meet()
        said = [control[at : at + len(mine)].tolist() for control in self._controls]
        if any(other != mine for other in said):
            listed = ", ".join(f"rank {rank} {_describe(each)}" for rank, each in enumerate(said))
            raise ValueError(
                f"the ranks of group {self.name!r} bring different tensors to an all-reduce: "
                + listed
            )

    def _meet(self) -> None:
        self._met += 1
        self._controls[self.rank][ARRIVED] = self._met
        limit = time.monotonic() + self.settings.timeout
        for rank, control in enumerate(self._controls):
            while int(control[ARRIVED]) < self._met:
                self._wait_for(rank, limit)
            if int(control[STATE]) == GAVE_UP:
                self._give_up(rank, "has given the all-reduce up")

    def _wait_for(self, rank: int, limit: float) -> None:
        state = int(self._controls[rank][STATE])
        late = time.monotonic() > limit
        if int(self._controls[rank][ARRIVED]) >= self._met or not (state or late):
            time.sleep(0)
        elif state == GAVE_UP:
            self._give_up(rank, "has given an all-reduce up")
        elif state == LEFT:
            self._give_up(rank, "has left the group")
        else:
            self._give_up(rank, f"has not come within {self.settings.timeout:g} s")

    def _give_up(self, rank: int, why: str) -> NoReturn:
        self._controls[self.rank][STATE] = GAVE_UP
        self._broken = (
            f"rank {rank} of group {self.name!r} {why}, and the all-reduce on rank {self.rank} "
            "cannot be completed: destroy the process group and make it again"
        )
        raise DistBackendError(self._broken)


def _area(segment: Tensor, start: int, num_bytes: int) -> Tensor:
    return segment[start : start + num_bytes]


def _describe(said: Sequence[int]) -> str:
    dtype, _, dims, *shape = said
    name = str(DTYPES[dtype]).removeprefix("torch.") if dtype >= 0 else "another dtype"
    return f"{name}{list(shape[:dims])}"
