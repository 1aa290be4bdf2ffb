"""Keeps parameters through an engine's processing, so that they can be loaded again.

`keeping(module)` wraps a step in which an engine replaces parameters by transposed, shuffled or
repacked ones. After the step the module has its own parameters again: their class and attributes,
with the engine's values. `restore(model)` gives them the checkpoint's layout before the next load.
The next processing writes into the storage of the last one, so captured graphs stay right. Nothing
is loaded or processed here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fixpass.integrations.sglang.undo import Undo, as_bytes, same_bytes, undo_of
from fixpass.runtime.attributes import Remembered, note
from fixpass.runtime.errors import CheckpointError
from fixpass.runtime.weights.targets import is_freed
from fixpass.runtime.weights.weight_version import SAMPLES, fingerprint

# Random bytes at the start of a parameter whose values are lost: a load writes over them.
MARK_BYTES = 16
# Scales and indices are small enough to be remembered where what was done cannot be undone.
SMALL_BYTES = 64 << 10


@dataclass(frozen=True)
class ProcessedParameter:
    """A parameter of the checkpoint, and the tensor that an engine made of it."""

    noted: Remembered
    shape: torch.Size
    """The shape in the checkpoint, as dtype and device."""
    dtype: torch.dtype
    device: torch.device
    processed: Tensor | None
    """The tensor that the engine computes with; None where it removed the parameter."""
    undo: Undo | None = None
    """From `processed` to the checkpoint's values; None where they are lost."""
    derived: bool = False
    """Whether the engine made the parameter, so that no checkpoint has it."""
    restored: bool = False
    """Whether the parameter has the checkpoint's layout, and waits for a load."""
    mark: Tensor | None = None
    """The random bytes at its start until the load has written over them."""
    words: int | None = None
    """The fingerprint after a change in place; None where the engine made another tensor."""

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class _Before(NamedTuple):
    """A parameter before processing; `values` is None for large and meta tensors."""

    param: nn.Parameter
    data: Tensor
    values: Undo | None
    words: int


_KEPT: WeakKeyDictionary[nn.Module, dict[str, ProcessedParameter]] = WeakKeyDictionary()


@contextmanager
def keeping(module: nn.Module) -> Iterator[None]:
    """Wrap a step that processes the parameters of `module` itself, not of its children.

    Raises CheckpointError if `restore` asked for values and no load has brought them.
    """
    kept = _KEPT.get(module, {})
    _check_loaded(module, kept)
    before = {
        name: _Before(p, p.data, _remembering(p.data), _words(p.data))
        for name, p in module._parameters.items()
        if p is not None
    }
    yield
    found: dict[str, ProcessedParameter] = {}
    for name in dict.fromkeys((*before, *module._parameters)):
        one = _settle(module, name, before.get(name), kept.get(name))
        if one is not None:
            found[name] = one
    if found or kept:
        _KEPT[module] = found


def restore(model: nn.Module) -> int:
    """Give parameters the layout of the checkpoint for the next load; return how many.

    Where the engine's change can be undone, the parameters have their values again. Where not, the
    next load has to bring them, and the next `keeping` checks that it did.

    Raises CheckpointError for a processed parameter whose memory was freed.
    """
    count = 0
    for module in model.modules():
        kept = _KEPT.get(module, {})
        for name, one in kept.items():
            waits = one.derived or one.restored
            if not waits and (found := _as_processed(module, name, one)) is not None:
                kept[name] = _restored(module, name, found)
                count += 1
    return count


def _settle(
    module: nn.Module,
    name: str,
    before: _Before | None,
    prior: ProcessedParameter | None,
) -> ProcessedParameter | None:
    """Put the old parameter back with the engine's values; return its record, if any."""
    new = _in_use(module, name)
    if before is None:
        # Made by the engine: kept from now on, so that its storage stays the same one.
        is_made = isinstance(new, nn.Parameter) and not new.is_meta
        return _kept(new, new.data, new.data, derived=True) if is_made and new is not None else None
    param, old = before.param, before.data
    if new is None:
        return _kept(param, old, None, before.values)
    in_place = new is param and _same_place(new.data, old)
    if old.is_meta or new.is_meta or (in_place and _words(old) == before.words):
        return prior if prior is not None and not prior.restored else None
    derived = prior is not None and prior.derived
    found = None if derived or in_place else undo_of(old, new.data)
    placed = _placed(new.data, prior)
    param.data = placed
    if new is not param:
        param.__dict__.update(new.__dict__)
        param.requires_grad_(new.requires_grad)
        _replace(module, name, new, param)
    undo = None if derived else found or before.values
    kept = _kept(param, old, placed, undo, derived)
    return replace(kept, words=_words(placed)) if in_place else kept


def _in_use(module: nn.Module, name: str) -> Tensor | None:
    """The tensor under the name of a parameter; a plain one where the engine deleted that."""
    for held in (module._parameters, module._buffers, module.__dict__):
        if isinstance(found := held.get(name), Tensor):
            return found
    return None


def _kept(
    param: Tensor,
    old: Tensor,
    processed: Tensor | None,
    undo: Undo | None = None,
    derived: bool = False,
) -> ProcessedParameter:
    return ProcessedParameter(
        note(param), old.shape, old.dtype, old.device, processed, undo, derived
    )


def _words(data: Tensor) -> int:
    """The fingerprint of values: of all where they are few, else of a sample; 0 without memory."""
    if data.is_meta or data.layout != torch.strided or is_freed(data):
        return 0
    return fingerprint(data, 0 if data.nbytes <= SMALL_BYTES else SAMPLES)


def _remembering(old: Tensor) -> Undo | None:
    """The values themselves, where they are few."""
    if old.is_meta or old.nbytes > SMALL_BYTES:
        return None
    values = old.clone(memory_format=torch.contiguous_format)
    return lambda _: values


def _placed(after: Tensor, prior: ProcessedParameter | None) -> Tensor:
    """The new values in the storage that the engine computed with before, where they fit."""
    held = None if prior is None else prior.processed
    if held is None or _same_place(after, held) or not _same_layout(after, held):
        return after
    if held.untyped_storage().data_ptr() == after.untyped_storage().data_ptr():
        after = after.clone()
    return held.copy_(after)


def _replace(module: nn.Module, name: str, new: Tensor, param: nn.Parameter) -> None:
    """Under every name that the module has for the new tensor, the old parameter."""
    # A plain tensor or a buffer would hide the parameter from the next load.
    for hiding in (module._buffers, module.__dict__):
        hiding.pop(name, None)
    for held in (module._parameters, module.__dict__):
        for other, value in list(held.items()):
            if value is new:
                held[other] = param
    module._parameters[name] = param


def _as_processed(
    module: nn.Module, name: str, one: ProcessedParameter
) -> ProcessedParameter | None:
    """How the parameter can be restored; None where the engine has undone its step by itself.

    A parameter that was moved, to the host and back, has the layout of the processed one and
    another address. Without its values the next load has to bring them.
    """
    param, held = module._parameters.get(name), one.processed
    if held is None or param is None:
        return one if held is None and param is None else None
    if is_freed(held):
        raise CheckpointError(
            f"{type(module).__name__}: {name} was processed by the engine and its memory was freed "
            "by an offload: bring the weights back before the next load"
        )
    if _same_place(param.data, held):
        return one if one.words in (None, _words(held)) else None
    if _layout(param) != _layout(held):
        return None
    if not is_freed(param.data) and same_bytes(param.data.to(held.device), held):
        return one
    # Of the processed shape alone, the parameter can't be the checkpoint's: its values are lost.
    return replace(one, undo=None) if held.shape != one.shape else None


def _restored(module: nn.Module, name: str, one: ProcessedParameter) -> ProcessedParameter:
    """Give one parameter the checkpoint's layout, with its values or with a mark."""
    mark = None
    if one.undo is not None:
        data = _undone(one, one.undo)
    else:
        data = _room(one)
        mark = _marked(data)
    param = module._parameters.get(name)
    if param is None:
        made: Any = one.noted.like(data)
        # The engine may have set the name to None: that would hide the parameter.
        module.__dict__.pop(name, None)
        module._parameters[name] = made
    else:
        param.data = data
    return replace(one, restored=True, mark=mark)


def _undone(one: ProcessedParameter, undo: Undo) -> Tensor:
    held = one.empty() if one.processed is None else one.processed
    values = undo(held)
    if values.is_contiguous() and values.data_ptr() == held.data_ptr():
        return values
    # The values may be a view of the room that they are written to.
    values = values.clone(memory_format=torch.contiguous_format)
    return _room(one).copy_(values)


def _room(one: ProcessedParameter) -> Tensor:
    """Dense storage for the checkpoint's layout: the engine's own, where all of it is ours."""
    held = one.processed
    if held is None or not held.is_contiguous() or held.dtype != one.dtype:
        return one.empty()
    whole = held.untyped_storage().nbytes() == held.nbytes == one.nbytes
    return held.view(one.shape) if whole else one.empty()


def _marked(data: Tensor) -> Tensor:
    """Random bytes, written at the start of a tensor whose values a load has to bring."""
    data.zero_()
    start = as_bytes(data)[:MARK_BYTES]
    start.copy_(torch.frombuffer(bytearray(os.urandom(len(start))), dtype=torch.uint8))
    return start.clone()


def _check_loaded(module: nn.Module, kept: dict[str, ProcessedParameter]) -> None:
    missing = []
    for name, one in kept.items():
        param = module._parameters.get(name)
        if one.mark is None or param is None or param.nbytes < len(one.mark):
            continue
        if torch.equal(as_bytes(param.data.contiguous())[: len(one.mark)], one.mark):
            missing.append(f"{name} {tuple(one.shape)}")
    if missing:
        raise CheckpointError(
            f"{type(module).__name__}: the update brought no values for {', '.join(missing)}, and "
            "what the engine made of the last ones cannot be undone: update all of the layer"
        )


def _same_place(left: Tensor, right: Tensor) -> bool:
    return left.data_ptr() == right.data_ptr() and _same_layout(left, right)


def _same_layout(left: Tensor, right: Tensor) -> bool:
    return _layout(left) == _layout(right) and left.device == right.device


def _layout(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.stride(), x.dtype
