"""Insert nodes whose recorded values are right: every call is run on fake tensors as it is made.

An editor inserts in front of one node. It decides nothing about what to insert.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fixpass.lowering.layout import Layout, dense_order
from fixpass.lowering.relayout import hint
from fixpass.passes.rewrite import call

aten = torch.ops.aten


@dataclass(frozen=True)
class Editor:
    """Inserts nodes in front of `anchor`, which also lends its trace metadata."""

    graph: fx.Graph
    anchor: fx.Node

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        val: Any = None,
    ) -> fx.Node:
        """A new node calling `target`.

        Its value is `val`, and what the call gives on fake tensors where that is None.
        """
        with self.graph.inserting_before(self.anchor):
            node = call(self.graph, target, args, kwargs or {})
        node.meta = {**self._lent, "val": _run(node) if val is None else val}
        return node

    @cached_property
    def _lent(self) -> dict[str, Any]:
        return {k: v for k, v in self.anchor.meta.items() if k in _LENT}

    def size(self, node: fx.Node, dim: int) -> Any:
        """The size of a dimension: an int, or a node that reads a symbolic one."""
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, (node, dim))

    def clone(self, node: fx.Node, order: tuple[int, ...] | None = None) -> fx.Node:
        """A copy in dense storage, its dimensions in `order`, outermost first."""
        dense = {"memory_format": torch.contiguous_format}
        if order is None or order == tuple(range(len(order))):
            return self.call(aten.clone.default, (node,), dense)
        inverse = [order.index(dim) for dim in range(len(order))]
        moved = self.call(aten.permute.default, (node, list(order)))
        copy = self.call(aten.clone.default, (moved,), dense)
        return self.call(aten.permute.default, (copy, inverse))

    def with_strides_of(self, node: fx.Node, wanted: torch.Tensor) -> fx.Node:
        """`node`, copied where its strides are not proved to be those of `wanted`."""
        layout = Layout.of(wanted)
        if Layout.of(node.meta["val"]).has_stride(layout.stride) is True:
            return node
        return self.clone(node, dense_order(layout))


# What a node made for another keeps of it: where it came from, not what it was.
_LENT = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "original_aten",
    "from_node",
    "seq_nr",
)


def copy_of(val: FakeTensor) -> FakeTensor:
    """A fake tensor with the layout of `val` in a storage of its own.

    No operation is run: on symbolic shapes that costs ten times as much. No fake tensor mode may be
    active. The storage has the size that was seen while tracing.
    """
    shape, stride = val.shape, val.stride()
    steps = [(hint(size) - 1) * hint(step) for size, step in zip(shape, stride, strict=True)]
    size = max(0, 1 + sum(steps) + hint(val.storage_offset()))
    storage = torch.empty(size, dtype=val.dtype, device="meta")
    return FakeTensor(
        val.fake_mode, storage.as_strided(shape, stride, val.storage_offset()), val.device
    )


@contextmanager
def guards_suppressed(values: Any) -> Iterator[None]:
    """Run operations on fake tensors under their own mode without adding a guard."""
    leaves = (v for v in pytree.tree_leaves(values) if isinstance(v, FakeTensor))
    fake = next(leaves, None)
    if fake is None:
        yield
        return
    env = fake.fake_mode.shape_env
    with fake.fake_mode, env.suppress_guards() if env is not None else nullcontext():
        yield


def _run(node: fx.Node) -> Any:
    target: Any = node.target
    args, kwargs = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    with guards_suppressed(args):
        return target(*args, **kwargs)
