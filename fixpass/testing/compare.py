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
    """Call two functions on copies of the same inputs, and compare their outputs and their inputs.

    Args:
        actual: the function to test, for example a compiled model.
        expected: the function that gives the right results, for example the model itself.
        args: arguments for both.
        gradients: compare the gradients of inputs and parameters too, for a fixed random cotangent.
        strides: compare the strides of outputs too, except those of dimensions of size 1.
        rtol: relative tolerance, as for torch.testing.assert_close. None is its default by dtype.
        atol: absolute tolerance, in the same way.
        scaled: multiply `rtol` with the largest element of a tensor, not with each element. A small
            element that is left where large ones cancel has the rounding error of the large ones.
        kwargs: keyword arguments for both.

    Raises:
        AssertionError: a value, dtype, stride or gradient differs. The error names the tensor.

    Example:
        >>> assert_same(fixpass.compile(model), model, x, gradients=True)
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
    """The arguments with every tensor copied, so that one run does not see writes of the other.

    A copy is a leaf with the values, strides, offset and dynamic marks of its tensor. Copies share
    storage where their tensors do, and a tensor that is given twice has one copy.
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
