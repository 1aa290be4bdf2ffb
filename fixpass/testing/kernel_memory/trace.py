"""Record the accesses of one launcher call.

It performs no access outside a storage: such a load reads nothing, such a store is dropped.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fixpass.testing.kernel_memory.interpret import interpreted
from fixpass.testing.kernel_memory.memory_report import Access, Launched, MemoryReport, summarize


@dataclass
class _Recorder:
    """The watcher: keeps addresses, refuses those outside every storage."""

    views: dict[str, Tensor]
    bounds: list[tuple[int, int]] = field(default_factory=list)
    launches: list[Launched] = field(default_factory=list)
    program: int = 0

    def __post_init__(self) -> None:
        for tensor in self.views.values():
            self._admit(tensor)

    def launch(self, kernel: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self.launches.append(Launched(kernel, grid, []))
        for name, value in arguments.items():
            for label, tensor in _tensors(name, value):
                if self._admit(tensor):  # allocated by the launcher: it may use all of it
                    found = f"{kernel}.{label}"
                    again = f" of launch {len(self.launches)}" if found in self.views else ""
                    self.views[found + again] = tensor.new_empty(0).set_(tensor.untyped_storage())

    def start_program(self, program: int) -> None:
        self.program = program

    def access(self, kind: str, addresses: Any, mask: Any, itemsize: int) -> Any:
        if not self.launches:
            raise RuntimeError("a kernel was imported while interpreting: import it before")
        mask = np.broadcast_to(mask, addresses.shape)
        inside = np.zeros(addresses.shape, dtype=bool)
        for low, high in self.bounds:
            inside |= (addresses >= low) & (addresses <= high - itemsize)
        self.launches[-1].accesses.append(
            Access(kind, self.program, itemsize, addresses[mask], inside[mask])
        )
        return mask & inside

    def _admit(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        bounds = (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
        if bounds in self.bounds or storage.nbytes() == 0:
            return False
        self.bounds.append(bounds)
        return True


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for i, each in enumerate(value):
            yield from _tensors(f"{name}[{i}]", each)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _tensors(str(key), each)


def trace_memory(launcher: Callable[..., Any], /, *args: Any, **kwargs: Any) -> MemoryReport:
    """Call `launcher` with its kernels interpreted, and report what they did to memory.

    The tensors among the arguments, on the CPU, are the views that it may touch; their
    contents after the call are what the kernels stored.
    """
    bound = inspect.signature(launcher).bind(*args, **kwargs)
    views = {
        label: tensor
        for name, value in bound.arguments.items()
        for label, tensor in _tensors(name, value)
    }
    recorder = _Recorder(views)
    with interpreted(recorder):
        launcher(*args, **kwargs)
    return summarize(recorder.views, recorder.launches)
