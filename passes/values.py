"""`verify="values"`: the numbers that a graph gives before and after a pass.

The graph runs on random inputs that fit the recorded layouts. The first dimension but one of each
input has one row of small values, so that an epsilon counts. How far rounding moves a result is
measured: the same operations run again, and each result of an operation is changed by a random part
of its last digit.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fixpass.lowering.relayout import hint
from fixpass.runtime.errors import PassError

Run = Callable[[AbstractContextManager[Any]], list[Any]]
"""Computes results on equal inputs each time, with its operations inside a context."""
_COMMUNICATES = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "symm_mem", "_dtensor")
_RUNS, _MARGIN = 2, 16
"""Runs with other rounding, and how many times their difference counts as rounding."""


@dataclass(frozen=True)
class RoundedValues:
    """The results of a computation, and how far rounding moves each tensor."""

    leaves: list[Any]
    slack: list[float]

    @staticmethod
    def of(run: Run) -> "RoundedValues":
        """Call `run` once as it is, and then with other rounding."""
        leaves = run(nullcontext())
        slack = [_MARGIN * _last_digit(leaf) * _largest(leaf) for leaf in leaves]
        for seed in range(_RUNS):
            moved = run(OtherRounding(seed))
            for i, (a, b) in enumerate(zip(moved, leaves, strict=True)):
                slack[i] = max(slack[i], _MARGIN * _difference(a, b))
        return RoundedValues(leaves, slack)

    def fault_of(self, leaves: list[Any]) -> str:
        """The first of `leaves` that differs by more than rounding explains, or ""."""
        for i, (got, want) in enumerate(zip(leaves, self.leaves, strict=True)):
            if not isinstance(want, Tensor):
                continue
            if (got.shape, got.dtype) != (want.shape, want.dtype):
                return f"result {i} is {_shown(got)} and was {_shown(want)}"
            if (difference := _difference(got, want)) > self.slack[i]:
                return (
                    f"result {i} differs by {difference:.3g}; rounding explains {self.slack[i]:.3g}"
                )
        return ""


@dataclass(frozen=True)
class GraphValues:
    """The values of a graph on one set of random inputs, and its inputs after the run."""

    inputs: list[Any]
    values: RoundedValues

    @staticmethod
    def of(graph: fx.Graph) -> "GraphValues":
        """Run `graph`.

        Raises:
            PassError: the graph communicates, has an input that is no number, or fails.
        """
        for node in graph.nodes:
            name = str(node.target)
            if name.partition(".")[0] in _COMMUNICATES or "all_reduce" in name:
                raise PassError(f"{node.name} talks to other ranks")
        try:
            with _without_modes():
                inputs = _inputs(graph)
                return GraphValues(inputs, RoundedValues.of(lambda mode: _run(graph, inputs, mode)))
        except PassError:
            raise
        # Random inputs can make an operation raise any error, such as an index out of range.
        except Exception as error:
            raise PassError(f"{type(error).__name__} on random inputs: {error}") from error

    def check(self, graph: fx.Graph, pass_name: str) -> None:
        """Raise PassError naming the pass where `graph` gives other values."""
        with _without_modes():
            fault = self.values.fault_of(_run(graph, self.inputs, nullcontext()))
        if fault:
            raise PassError(f"{pass_name} changed a value: {fault}")


class OtherRounding(TorchDispatchMode):
    """Changes each floating-point result of an operation by a random part of its last digit."""

    def __init__(self, seed: int) -> None:
        base: Any = super()
        base.__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor) and _last_digit(leaf):
                    part = 2 * torch.rand(leaf.shape, generator=self.generator) - 1
                    leaf.mul_((1 + _last_digit(leaf) * part).to(leaf.device, leaf.dtype))
        return result


def _run(graph: fx.Graph, inputs: list[Any], mode: AbstractContextManager[Any]) -> list[Any]:
    """The results of `graph`, and then its inputs, which it may have written into."""
    module = graph.owning_module or nn.Module()
    copies = [_copy(x) if isinstance(x, Tensor) else x for x in inputs]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with mode:
            results = fx.Interpreter(module, graph=graph).run(*copies)
    return [*pytree.tree_leaves(results), *copies]


@contextmanager
def _without_modes() -> Iterator[None]:
    """Compute real numbers inside a compile, where fake tensors are the rule."""
    with torch.no_grad(), _disable_current_modes():
        yield


def _inputs(graph: fx.Graph) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [_input(node, generator) for node in graph.find_nodes(op="placeholder")]


def _input(node: fx.Node, generator: torch.Generator) -> Any:
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    if value is None or isinstance(value, (int, float)):
        return value
    if not isinstance(value, Tensor):
        raise PassError(f"input {node.name} is a {type(value).__name__}")
    if value.layout != torch.strided:
        raise PassError(f"input {node.name} is a {type(value).__name__} of layout {value.layout}")
    return _random(value, generator)


def _random(value: Tensor, generator: torch.Generator) -> Tensor:
    """Random values in the layout of `value`: small integers, normal numbers."""
    shape, stride = [hint(n) for n in value.shape], [hint(n) for n in value.stride()]
    offset = hint(value.storage_offset())
    size = 1 + offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True) if n)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        storage = torch.randn(size, generator=generator)
    else:
        storage = torch.randint(0, 2, (size,), generator=generator)
    is_dense = all(step or n == 1 for n, step in zip(shape, stride, strict=True))
    if storage.is_floating_point() and len(shape) > 1 and shape[-2] > 1 and is_dense:
        storage.as_strided(shape, stride, offset).select(-2, 0).mul_(1e-3)
    return storage.to(value.device, value.dtype).as_strided(shape, stride, offset)


def _copy(x: Tensor) -> Tensor:
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).clone()
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def _last_digit(leaf: Any) -> float:
    """The relative size of the last digit of a floating-point tensor; 0 for others."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.element_size() == 1:
        return 0.0
    return float(torch.finfo(leaf.dtype).eps)


def _largest(leaf: Any) -> float:
    finite = leaf[leaf.isfinite()].abs() if _last_digit(leaf) else torch.zeros(0)
    return float(finite.max()) if finite.numel() else 0.0


def _difference(a: Any, b: Any) -> float:
    """The largest difference of two tensors; equal infinities and two NaNs are equal."""
    if not isinstance(a, Tensor) or a.numel() == 0:
        return 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = (a - b).abs().masked_fill(same, 0.0)
    return float(difference.nan_to_num(nan=torch.inf).max())


def _shown(t: Any) -> str:
    return f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
