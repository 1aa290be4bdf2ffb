"""`assert_same`: two functions give the same values, dtypes, strides and gradients."""

from collections.abc import Callable, Iterator
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
    **kwargs: Any,
) -> None:
    """Call both on the same inputs and compare all that they return.

    gradients: also compare those of the inputs and parameters, for a fixed random cotangent.
    strides: also compare the strides of the outputs, except where a size is 1.
    rtol, atol: as for torch.testing.assert_close, whose defaults by dtype hold when left out.
    Raises AssertionError that names the output or the input.
    """
    got = _run(actual, args, kwargs, gradients)
    want = _run(expected, args, kwargs, gradients)
    if [name for name, _ in got] != [name for name, _ in want]:
        raise AssertionError(f"{[n for n, _ in got]} came out, expected {[n for n, _ in want]}")
    for (name, a), (_, b) in zip(got, want, strict=True):
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )
        if strides and name.startswith("output"):
            _assert_strides(name, a, b)


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
    args, kwargs = pytree.tree_map_only(Tensor, _fresh, (args, kwargs))
    if not gradients:
        with torch.no_grad():
            return list(_tensors("output", fn(*args, **kwargs)))
    results = list(_tensors("output", fn(*args, **kwargs)))
    inputs = [*_inputs(args, kwargs), *_parameters(fn)]
    live = [t for _, t in results if t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    cotangents = [_cotangent(t, generator) for t in live]
    grads = torch.autograd.grad(live, [t for _, t in inputs], cotangents, allow_unused=True)
    found = [(f"gradient of {n}", g) for (n, _), g in zip(inputs, grads, strict=True)]
    return [(n, t.detach()) for n, t in results] + [(n, g) for n, g in found if g is not None]


def _cotangent(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(t.shape, generator=generator).to(t.device, t.dtype)


def _fresh(t: Tensor) -> Tensor:
    """A leaf with the same values, strides and storage offset, so that runs do not meet."""
    if t.layout != torch.strided:
        return t.detach().clone()
    size = t.untyped_storage().nbytes() // t.element_size()
    storage = t.detach().as_strided((size,), (1,), 0).clone()
    view = storage.as_strided(t.shape, t.stride(), t.storage_offset())
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
