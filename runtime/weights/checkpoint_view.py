"""The load window: folded parameters show the checkpoint's layout, and writes land where they fold.

Any loader works unchanged: what it narrows, chunks and copies into is the logical tensor, over the
same memory. Where strides can say the logical layout, that view is shown. Where they cannot, the
shape and strides of the logical tensor are shown, and a dispatch mode sends every read and write
to its place. The mode sees the thread that opened the window, and no other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fixpass.runtime.errors import LayoutError
from fixpass.runtime.weights.layout_plan import Plan, dense
from fixpass.runtime.weights.region import Region, read, write
from fixpass.runtime.weights.relayout import LayoutRecord, check_memory, memory_of, record_of


@dataclass(frozen=True)
class _Open:
    """A folded parameter while its window is open."""

    param: Tensor
    folded: LayoutRecord
    memory: Tensor

    @property
    def plan(self) -> Plan:
        return self.folded.plan

    @property
    def by_strides(self) -> bool:
        return self.plan.logical_strides is not None

    def region(self, tensor: Tensor) -> Region | None:
        """The part of the logical tensor that a view in this memory stands for, or None."""
        start = tensor.storage_offset() - self.memory.storage_offset()
        if not 0 <= start < max(1, self.memory.numel()):
            return None
        return Region(tuple(tensor.shape), tuple(tensor.stride()), int(start))


# Parameters whose window is open, in any thread.
_OPENED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def is_open(param: Tensor) -> bool:
    """Whether `param` shows the checkpoint's layout now although it is folded."""
    return param in _OPENED


@contextmanager
def checkpoint_layout(params: Iterable[Tensor]) -> Iterator[None]:
    """Show the checkpoint's layout of the folded ones of `params` until the context ends."""
    opened: list[_Open] = []
    try:
        for param in params:
            if record_of(param) is not None and not is_open(param):
                opened.append(_open(param))
        with _Redirect([item for item in opened if not item.by_strides]):
            yield
    finally:
        for item in opened:
            _close(item)


def _open(param: Tensor) -> _Open:
    found = record_of(param)
    assert found is not None
    check_memory(param, found, "a parameter")
    plan = found.plan
    item = _Open(param, found, memory_of(param, plan))
    strides = plan.logical_strides or dense(plan.padded)
    param.data = item.memory.as_strided(plan.logical, strides, item.memory.storage_offset())
    _OPENED[param] = True
    return item


def _close(item: _Open) -> None:
    """Show the kernel's layout again; what was put in place of the memory is copied into it."""
    plan, param = item.plan, item.param
    _OPENED.pop(param, None)
    replaced = param.untyped_storage().data_ptr() != item.memory.untyped_storage().data_ptr()
    given = param.detach()
    param.data = item.memory.as_strided(plan.shown, plan.strides, item.memory.storage_offset())
    torch.autograd.graph.increment_version(param)
    if not replaced:
        return
    if tuple(given.shape) != plan.logical:
        raise LayoutError(
            f"a loader put {tuple(given.shape)} in the place of a parameter of {plan.logical}, "
            f"folded into {plan.layout}: the old values were kept"
        )
    write(item.memory, plan, Region.of(plan), given)


class _Redirect(TorchDispatchMode):
    """Sends what reads or writes a shown logical tensor to where its elements lie."""

    def __init__(self, opened: list[_Open]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._opened: dict[int, list[_Open]] = {}
        for item in opened:
            self._opened.setdefault(item.memory.untyped_storage()._cdata, []).append(item)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not any(self._find(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default:
            return self._copy(*args)
        if _is_view(func):
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        return self._on_copies(func, args, kwargs)

    def _find(self, tensor: Any) -> tuple[_Open, Region] | None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not self._opened:
            return None
        if tensor.device.type == "meta":
            return None
        for item in self._opened.get(tensor.untyped_storage()._cdata, ()):
            region = item.region(tensor)
            if region is not None:
                return item, region
        return None

    def _copy(self, out: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        source = self._values(source)
        found = self._find(out)
        if found is None:
            return out.copy_(source, non_blocking)
        item, region = found
        write(_as(item.memory, out), item.plan, region, source.expand(out.shape))
        return out

    def _values(self, tensor: Tensor) -> Tensor:
        """The values that a tensor shows."""
        found = self._find(tensor)
        if found is None:
            return tensor
        item, region = found
        return read(_as(item.memory, tensor), item.plan, region)

    def _on_copies(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run any other operation on copies of what it reads; what it wrote goes back."""
        copies: dict[int, tuple[Tensor, Tensor]] = {}

        def copied(leaf: Any) -> Any:
            if self._find(leaf) is None:
                return leaf
            return copies.setdefault(id(leaf), (leaf, self._values(leaf)))[1]

        written = {id(leaf) for leaf in pytree.tree_leaves(_written(func, args, kwargs))}
        args, kwargs = pytree.tree_map(copied, (args, kwargs))
        result = func(*args, **kwargs)
        for leaf, copy in copies.values():
            if id(leaf) in written:
                self._copy(leaf, copy)
        originals = {id(copy): leaf for leaf, copy in copies.values()}
        return pytree.tree_map(lambda leaf: originals.get(id(leaf), leaf), result)


def _as(memory: Tensor, view: Tensor) -> Tensor:
    """The memory in the dtype of a view of it, of the same size: a loader may look at raw bits."""
    if view.dtype == memory.dtype:
        return memory
    if view.element_size() != memory.element_size():
        raise LayoutError(
            f"a folded parameter of {memory.dtype} was viewed as {view.dtype}, of another size: "
            "unfold it first"
        )
    return memory.view(view.dtype)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation says it writes to."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return [
        given[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        if argument.name in given
    ]


def _is_view(func: Any) -> bool:
    infos = [argument.alias_info for argument in func._schema.arguments]
    shared = [info for info in infos if info is not None]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )
    return bool(shared) and not any(info.is_write for info in shared) and not composite
