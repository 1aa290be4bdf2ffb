"""Run a kernel launcher on a device, with operands on the CPU as the interpreter takes them.

The report knows whether memory outside of the outputs changed. It counts no accesses: a device
doesn't say which bytes a kernel read.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fixpass.testing.kernel_memory.memory_report import OUTSIDE_VIEWS, Fault, MemoryReport


def launcher_on(device: str) -> Callable[..., MemoryReport]:
    """A function that runs launchers on `device`, called as `trace_memory` is."""

    def launch(launcher: Callable[..., Any], /, *args: Any, **kwargs: Any) -> MemoryReport:
        moved = _Moved(device)
        launcher(*map(moved.there, args), **{k: moved.there(v) for k, v in kwargs.items()})
        written = [v for k, v in kwargs.items() if k.endswith("out") and isinstance(v, Tensor)]
        faults = moved.bring_back(written, launcher.__name__)
        return MemoryReport(0, 0, 0, 0, {}, faults, ())

    return launch


class _Moved:
    """Storages of the CPU and their copies on a device; views keep sharing them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.storages: dict[int, tuple[Tensor, Tensor]] = {}

    def there(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.storages:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.storages[storage.data_ptr()] = whole, whole.to(self.device, copy=True)
        flat = self.storages[storage.data_ptr()][1].view(value.dtype)
        return flat.as_strided(value.shape, value.stride(), value.storage_offset())

    def bring_back(self, written: list[Tensor], kernel: str) -> tuple[Fault, ...]:
        """Copy the storages back; the faults are bytes that changed outside of `written`."""
        changed = 0
        for address, (here, there) in self.storages.items():
            came = there.cpu()
            allowed = torch.zeros(came.shape, dtype=torch.bool)
            for view in written:
                if view.untyped_storage().data_ptr() == address:
                    each = allowed.view(-1, view.element_size())
                    each[_elements(view)] = True
            changed += int(((came != here) & ~allowed).sum())
            here.copy_(came)
        if not changed:
            return ()
        return (Fault(OUTSIDE_VIEWS, kernel, "stored bytes", 0, "an unknown element", changed),)


def _elements(view: Tensor) -> Tensor:
    """The numbers of the view's elements in its storage."""
    count = view.untyped_storage().nbytes() // view.element_size()
    numbers = torch.arange(count).as_strided(view.shape, view.stride(), view.storage_offset())
    return numbers.reshape(-1)
