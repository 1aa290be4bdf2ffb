"""Show parameters in the checkpoint's layout: memory to load into, and `checkpoint_layout`.

`destination` gives a view of the checkpoint's shape over a parameter's memory; of a DTensor, over
the local part. In the context `checkpoint_layout` the parameters themselves show that shape. Where
strides can't express the layout, they only name the elements: `LogicalView.put` and a dispatch
mode, which acts in the thread that entered the context only, go to the elements' real positions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fixpass.runtime.errors import CheckpointError, LayoutError
from fixpass.runtime.weights.layout_plan import LayoutPlan
from fixpass.runtime.weights.parameter_layout import (
    LayoutRecord,
    check_memory,
    memory_of,
    record_of,
)
from fixpass.runtime.weights.region import Region, read, write
from fixpass.runtime.weights.stored import Box, Shape
from fixpass.runtime.weights.targets import is_freed, local_box


class LogicalView(NamedTuple):
    """A parameter with a layout that strides can't express."""

    memory: Tensor
    """Its elements as they lie, 1-D."""
    plan: LayoutPlan

    def put(self, values: Tensor, part: Tensor) -> None:
        """Write values where the elements of `part` lie, a view of the destination's tensor."""
        start = int(part.storage_offset()) - int(self.memory.storage_offset())
        region = Region(tuple(part.shape), tuple(part.stride()), start)
        with torch.no_grad():
            write(self.memory, self.plan, region, values)


class Destination(NamedTuple):
    """Memory of a parameter in the checkpoint's layout."""

    tensor: Tensor
    """A view of the checkpoint's shape. With a `view` its strides only name the elements."""
    box: Box
    """The box of the whole parameter that lies on this rank."""
    whole: Shape
    """The shape of the whole parameter in the checkpoint."""
    view: LogicalView | None = None

    @property
    def memory(self) -> Tensor:
        """The memory that is written, as a tensor that names all of it."""
        return self.tensor if self.view is None else self.view.memory


def destination(param: Tensor, name: str = "the parameter") -> Destination:
    """The memory of `param` on this rank.

    Args:
        param: the parameter or buffer, in any layout.
        name: stands in messages.

    Raises:
        CheckpointError: there is no memory of its own to write to.
        LayoutError: a parameter with a layout was given other memory.

    """
    if param.device.type == "meta":
        raise CheckpointError(
            f"{name} is on the meta device and has no memory: model.to_empty(device=...) gives it"
        )
    if param.layout != torch.strided:
        raise CheckpointError(f"{name} is {param.layout}: only strided parameters are loaded")
    local, box = local_box(param.detach())
    if is_freed(local):
        raise CheckpointError(f"{name} has no memory any more: it was freed")
    if any(
        stride == 0 and size > 1 for stride, size in zip(local.stride(), local.shape, strict=True)
    ):
        raise CheckpointError(f"{name} is expanded: its elements share their memory. clone() it")
    found = record_of(param)
    if found is None:
        return Destination(local, box, tuple(param.shape))
    check_memory(param, found, name)
    plan = found.plan
    memory = memory_of(local, plan)
    strides = plan.logical_strides or plan.index_strides
    shown = memory.as_strided(plan.logical, strides, memory.storage_offset())
    view = LogicalView(memory, plan) if plan.logical_strides is None else None
    return Destination(shown, Box.whole(plan.logical), plan.logical, view)


@dataclass(frozen=True)
class _Shown:
    """A parameter that shows the checkpoint's layout now."""

    param: Tensor
    record: LayoutRecord
    memory: Tensor
    """All of its elements, flat."""

    @property
    def plan(self) -> LayoutPlan:
        return self.record.plan

    @property
    def by_strides(self) -> bool:
        return self.plan.logical_strides is not None

    def region(self, tensor: Tensor) -> Region | None:
        """The part of the logical tensor that `tensor` is, or None where it lies elsewhere."""
        start = tensor.storage_offset() - self.memory.storage_offset()
        if not 0 <= start < max(1, self.memory.numel()):
            return None
        return Region(tuple(tensor.shape), tuple(tensor.stride()), int(start))


_SHOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameters that show the checkpoint's layout, in any thread."""


def shows_checkpoint(param: Tensor) -> bool:
    """Whether `param` has a layout and shows the checkpoint's at present."""
    return bool(_SHOWN.data) and param in _SHOWN


@contextmanager
def checkpoint_layout(params: Iterable[Tensor]) -> Iterator[None]:
    """A context in which the parameters that have a layout show the checkpoint's layout.

    A parameter without a layout stays as it is. A loader may also put other memory into a
    parameter (`param.data = ...`): its values are copied when the context ends.

    Example:
        >>> with fixpass.weights.checkpoint_layout(model.parameters()):
        ...     engine_loader(model)

    Raises:
        LayoutError: a parameter was given other memory before, or is given values of another shape.

    """
    shown: list[_Shown] = []
    try:
        for param in params:
            if record_of(param) is not None and not shows_checkpoint(param):
                shown.append(_show_checkpoint(param))
        with _Redirect([item for item in shown if not item.by_strides]):
            yield
    finally:
        for item in shown:
            _show_kernel(item)


def _show_checkpoint(param: Tensor) -> _Shown:
    found = record_of(param)
    assert found is not None
    check_memory(param, found, "a parameter")
    plan = found.plan
    item = _Shown(param, found, memory_of(param, plan))
    strides = plan.logical_strides or plan.index_strides
    param.data = item.memory.as_strided(plan.logical, strides, item.memory.storage_offset())
    _SHOWN[param] = True
    return item


def _show_kernel(item: _Shown) -> None:
    """Show the kernel's layout again; copy the values of other memory that the loader put there."""
    plan, param = item.plan, item.param
    _SHOWN.pop(param, None)
    replaced = param.untyped_storage().data_ptr() != item.memory.untyped_storage().data_ptr()
    given = param.detach()
    param.data = item.memory.as_strided(plan.shown, plan.strides, item.memory.storage_offset())
    torch.autograd.graph.increment_version(param)
    if not replaced:
        return
    if tuple(given.shape) != plan.logical:
        raise LayoutError(
            f"a loader gave a parameter of {plan.logical} with layout {plan.layout} data of shape "
            f"{tuple(given.shape)}: the old values were kept"
        )
    write(item.memory, plan, Region.of(plan), given)


class _Redirect(TorchDispatchMode):
    """Redirects reads and writes of logical tensors to the real positions of their elements."""

    def __init__(self, shown: list[_Shown]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shown: dict[int, list[_Shown]] = {}
        for item in shown:
            self._shown.setdefault(item.memory.untyped_storage()._cdata, []).append(item)

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

    def _find(self, tensor: Any) -> tuple[_Shown, Region] | None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not self._shown:
            return None
        if tensor.device.type == "meta":
            return None
        for item in self._shown.get(tensor.untyped_storage()._cdata, ()):
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
        """A tensor, or a copy of its values where it is part of a logical tensor."""
        found = self._find(tensor)
        if found is None:
            return tensor
        item, region = found
        return read(_as(item.memory, tensor), item.plan, region)

    def _on_copies(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run `func` on copies of logical tensors, then copy written arguments back."""
        copies: dict[int, tuple[Tensor, Tensor]] = {}

        def copied(leaf: Any) -> Any:
            if self._find(leaf) is None:
                return leaf
            return copies.setdefault(id(leaf), (leaf, self._values(leaf)))[1]

        written = {id(leaf) for leaf in pytree.tree_leaves(written_arguments(func, args, kwargs))}
        args, kwargs = pytree.tree_map(copied, (args, kwargs))
        result = func(*args, **kwargs)
        for leaf, copy in copies.values():
            if id(leaf) in written:
                self._copy(leaf, copy)
        originals = {id(copy): leaf for leaf, copy in copies.values()}
        return pytree.tree_map(lambda leaf: originals.get(id(leaf), leaf), result)


def _as(memory: Tensor, view: Tensor) -> Tensor:
    """The memory in the dtype of a view of it. A loader may write through a dtype of raw bits."""
    if view.dtype == memory.dtype:
        return memory
    if view.element_size() != memory.element_size():
        raise LayoutError(
            f"a parameter of {memory.dtype} with a layout was viewed as {view.dtype}, of another "
            "size: call fixpass.weights.reset_layout first"
        )
    return memory.view(view.dtype)


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the schema of an operation marks as written."""
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
