"""`assert_same`: two functions give the same values, dtypes, strides and gradients."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def assert_same(
    actual: Callable[..., Any],
    expected: Callable[..., Any],
    *args: Any,
    gradients: bool = False,
    strides: bool = True,
    rtol: float | None = None,
    atol: float | None = None,
    scaled: bool = False,
    **kwargs: Any,
) -> None:
    """Call both on the same inputs and compare all that they return and what they wrote into.

    gradients: also compare those of the inputs and parameters, for a fixed random cotangent.
    strides: also compare the strides of the outputs, except where a size is 1.
    rtol, atol: as for torch.testing.assert_close, whose defaults by dtype hold when left out.
    scaled: take rtol of the largest element of each tensor, not of each element: an element that
    is small because large ones cancelled has their rounding error. It needs rtol; atol may be
    left out.
    Raises AssertionError that names the output or the input.
    """
    got = _run(actual, args, kwargs, gradients)
    want = _run(expected, args, kwargs, gradients)
    if [name for name, _ in got] != [name for name, _ in want]:
        raise AssertionError(f"{[n for n, _ in got]} came out, expected {[n for n, _ in want]}")
    for (name, a), (_, b) in zip(got, want, strict=True):
        slack = max(atol or 0.0, rtol * _largest(b)) if scaled and rtol is not None else atol
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=slack, equal_nan=True, msg=partial("{}: {}".format, name)
        )
        if strides and name.startswith("output"):
            _assert_strides(name, a, b)


def _largest(t: Tensor) -> float:
    finite = t[t.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _assert_strides(name: str, got: Tensor, want: Tensor) -> None:
    if got.layout != torch.strided or not got.numel():
        return
    sized = [dim for dim in range(got.dim()) if got.shape[dim] != 1]
    a, b = ([t.stride(dim) for dim in sized] for t in (got, want))
    if a != b:
        raise AssertionError(f"{name}: strides {got.stride()}, expected {want.stride()}")


def _run(
    fn: Callable[..., Any], args: Any, kwargs: Any, gradients: bool
) -> list[tuple[str, Tensor]]:
    args, kwargs = _fresh(args, kwargs)
    with torch.set_grad_enabled(gradients):
        results = list(_tensors("output", fn(*args, **kwargs)))
    written = [(f"{n} afterwards", t.detach()) for n, t in _tensors("input", (args, kwargs))]
    if not gradients:
        return results + written
    inputs = [*_inputs(args, kwargs), *_parameters(fn)]
    if not inputs:
        raise ValueError("gradients=True, but no input and no parameter requires a gradient")
    live = [t for _, t in results if t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    cotangents = [_cotangent(t, generator) for t in live]
    if not live:
        return results + written
    grads = torch.autograd.grad(live, [t for _, t in inputs], cotangents, allow_unused=True)
    found = [(f"gradient of {n}", g) for (n, _), g in zip(inputs, grads, strict=True)]
    values = [(n, t.detach()) for n, t in results]
    return values + written + [(n, g) for n, g in found if g is not None]


def _cotangent(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(t.shape, generator=generator).to(t.device, t.dtype)


def _fresh(args: Any, kwargs: Any) -> Any:
    """The arguments with every tensor copied, so that runs do not meet.

    Copies have the same values, strides, offsets and marks, are leaves, and share storage where
    the tensors did; one tensor given twice stays one tensor.
    """
    storages: dict[Any, Tensor] = {}
    copies: dict[int, Tensor] = {}

    def copy(t: Tensor) -> Tensor:
        if id(t) not in copies:
            copies[id(t)] = _copy(t, storages)
        return copies[id(t)]

    return pytree.tree_map_only(Tensor, copy, (args, kwargs))


def _copy(t: Tensor, storages: dict[Any, Tensor]) -> Tensor:
    if t.layout != torch.strided or type(t) not in (Tensor, nn.Parameter):
        return t.detach().clone().requires_grad_(t.requires_grad)
    storage = t.untyped_storage()
    key = (storage._cdata, t.dtype)
    if key not in storages:
        size = storage.nbytes() // t.element_size()
        storages[key] = t.detach().as_strided((size,), (1,), 0).clone()
    view = storages[key].as_strided(t.shape, t.stride(), t.storage_offset())
    # Where torch._dynamo.mark_dynamic and its siblings leave their marks.
    view.__dict__.update(t.__dict__)
    return view.requires_grad_(t.requires_grad)


def _tensors(prefix: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in pytree.tree_leaves_with_path(value):
        if isinstance(leaf, Tensor):
            yield prefix + pytree.keystr(path), leaf


def _inputs(args: Any, kwargs: Any) -> Iterator[tuple[str, Tensor]]:
    for name, leaf in _tensors("input", (args, kwargs)):
        if leaf.requires_grad:
            yield name, leaf


def _parameters(fn: Any) -> Iterator[tuple[str, Tensor]]:
    module = getattr(fn, "_orig_mod", fn)
    if isinstance(module, nn.Module):
        yield from ((n, p) for n, p in module.named_parameters() if p.requires_grad)
