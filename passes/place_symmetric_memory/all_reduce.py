"""An all-reduce and the node that computes its input become one op over symmetric memory.

The producer of the input decides the form. A matmul writes where the other ranks read. An opaque op
runs with an allocator whose memory the other ranks read. The result of any other node is copied
there. `decide` tells whether a group uses symmetric memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from fixpass.lowering.layout import Layout, known
from fixpass.passes.cost import WHOLE_VIEWS, bytes_of
from fixpass.passes.place_symmetric_memory.collectives import COLLECTIVES, Collective, find_overload
from fixpass.passes.rewrite import (
    NO_REMARK,
    RESHAPES,
    Editor,
    Match,
    Missed,
    Rewrite,
    is_call,
    sole_user,
    val_of,
)
from fixpass.runtime.symmetric_memory.op_call_codec import encode_call
from fixpass.runtime.symmetric_memory.policy import Decision
from fixpass.runtime.symmetric_memory.process_group import SUMMED
from fixpass.runtime.symmetric_memory.settings import Settings

if dist.is_available():
    import fixpass.runtime.symmetric_memory.collective_ops  # noqa: F401  (defines what the rewrite calls)

aten = torch.ops.aten
MATMULS = (aten.mm.default, aten.bmm.default)
BIASED_MATMULS = (aten.addmm.default, aten.baddbmm.default)


@dataclass(frozen=True)
class Reduction(Match):
    """An all-reduce that will use symmetric memory: `op` called with `args`, then `views`."""

    op: Any = None
    args: tuple[Any, ...] = ()
    views: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class RowParallel(Rewrite):
    """Anchored at an all-reduce. `decide` judges a group by its name."""

    device_type: str
    decide: Callable[[str], Decision]

    @property
    def anchors(self) -> tuple[Any, ...]:  # type: ignore[override]
        found = (find_overload(each.name) for each in COLLECTIVES)
        return tuple(overload for overload in found if overload is not None)

    def match(self, anchor: fx.Node) -> Match | Missed:
        collective = Collective.of(anchor)
        value, result = val_of(anchor.args[0]), collective.result(anchor)
        if value is None or value.device.type != self.device_type:
            return NO_REMARK
        if isinstance(result, Missed):
            return result
        why = _unsummable(collective.reduce_op(anchor), value)
        group = str(anchor.args[collective.group])
        decision = self.decide(group)
        if why or not decision:
            return Missed(why or decision.reason)
        return self._shape(anchor, result, group)

    def _shape(self, anchor: fx.Node, result: fx.Node, group: str) -> Reduction:
        """The op and its arguments for this producer."""
        source = anchor.args[0]
        assert isinstance(source, fx.Node)
        producer, views, bias = _producer(source)
        how, effects = ("sum", group), (result, anchor)
        where = f"symmetric memory of group {group!r}"
        layout = str(Layout.of(producer.meta["val"]))
        is_matmul = is_call(producer, *MATMULS, *BIASED_MATMULS) and sole_user(producer)
        if self.device_type == "cpu" and is_matmul:
            text = f"{producer.name} writes {layout} into {where}"
            args = (*_operands(producer, bias), *how)
            op = torch.ops.fixpass.matmul_all_reduce.default
            return Reduction((result,), text, bytes_of(producer), op, args, views, effects=effects)
        packed = _packed_opaque(producer) if self._wants_context(producer) else None
        if packed is not None:
            text = f"{producer.name} is called where {layout} is allocated in {where}"
            tensors, arguments = packed
            args = (str(_overload(producer)), tensors, arguments, *how)
            op = torch.ops.fixpass.call_all_reduce.default
            return Reduction((result,), text, bytes_of(producer), op, args, views, effects=effects)
        op = torch.ops.fixpass.all_reduce.default
        return Reduction(
            (result,), self._staged(source, where), 0, op, (source, *how), effects=effects
        )

    def _wants_context(self, producer: fx.Node) -> bool:
        # A result that fits a slot is copied there anyway, so the op may allocate it anywhere.
        small = Settings().slot_bytes
        num_bytes = producer.meta["val"].numel() * producer.meta["val"].dtype.itemsize
        return self.device_type != "cpu" or known(num_bytes <= small) is not True

    def _staged(self, source: fx.Node, where: str) -> str:
        layout = Layout.of(source.meta["val"])
        if self.device_type == "cpu":
            return f"{layout} of {source.name} is copied into {where}"
        outside = "it stays outside of CUDA-graph capture, which is not proved safe"
        if all(isinstance(size, int) for size in layout.shape):
            return f"{source.name} writes {layout} into {where}; {outside}"
        return f"{layout} of {source.name}, of symbolic size, is copied into {where}; {outside}"

    def replace(self, graph: fx.Graph, match: Match) -> tuple[fx.Node, ...]:
        assert isinstance(match, Reduction)
        (old,) = match.replaced
        edit = Editor(graph, old)
        node = edit.call(match.op, match.args)
        for view in match.views:
            node = edit.call(view.target, (node, *view.args[1:]), dict(view.kwargs))
        return (edit.with_strides_of(node, old.meta["val"]),)


def _unsummable(reduce_op: str, value: torch.Tensor) -> str:
    if reduce_op != "sum":
        return f"only sums are made in symmetric memory, not {reduce_op!r}"
    if value.dtype not in SUMMED:
        return f"{Layout.of(value)} is not summed in symmetric memory: float32, bf16 or fp16 are"
    return ""


def _producer(source: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...], fx.Node | None]:
    """The producer of the reduced tensor, the views behind it in order, and a bias added to it.

    A node that something else reads too is the producer.
    """
    node, views = source, []
    while sole_user(node) is not None:
        if is_call(node, *WHOLE_VIEWS) and isinstance(node.args[0], fx.Node):
            views.append(node)
            node = node.args[0]
            continue
        added = _added_bias(node)
        if added is None:
            break
        rows, bias = added
        base, inner, _ = _producer(rows)
        if not _is_matmul_of_rows(base, inner, node) or sole_user(base) is None:
            break
        return base, (*inner, *reversed(views)), bias
    return node, tuple(reversed(views)), None


def _added_bias(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(rows, bias) of a plain sum of rows and a vector, else None."""
    if not is_call(node, aten.add.Tensor) or node.kwargs or len(node.args) != 2:
        return None
    vals = [val_of(operand) for operand in node.args]
    for rows, vector in ((0, 1), (1, 0)):
        x, bias = vals[rows], vals[vector]
        if x is None or bias is None or bias.dim() != 1 or x.dim() < 2 or x.dtype != bias.dtype:
            continue
        if known(x.shape[-1] == bias.shape[0]) is True:
            return node.args[rows], node.args[vector]  # type: ignore[return-value]
    return None


def _is_matmul_of_rows(base: fx.Node, views: tuple[fx.Node, ...], total: fx.Node) -> bool:
    """Whether `total` is a matmul's rows, reshaped at most, plus a bias."""
    if not is_call(base, aten.mm.default) or any(view.target not in RESHAPES for view in views):
        return False
    columns = base.meta["val"].shape[-1]
    return known(columns == total.meta["val"].shape[-1]) is True


def _operands(matmul: fx.Node, bias: fx.Node | None) -> tuple[Any, ...]:
    """(a, b, bias, beta, alpha)."""
    if is_call(matmul, *MATMULS):
        return (*matmul.args[:2], bias, 1, 1)
    first, a, b = matmul.args[:3]
    return (a, b, first, matmul.kwargs.get("beta", 1), matmul.kwargs.get("alpha", 1))


def _packed_opaque(producer: fx.Node) -> tuple[list[Any], str] | None:
    """The encoded call of an opaque op that only this reduction reads, or None."""
    overload = producer.target
    if not isinstance(overload, torch._ops.OpOverload) or sole_user(producer) is None:
        return None
    fuses = overload.namespace in ("aten", "prims", "fixpass", "_c10d_functional")
    returns = overload._schema.returns
    opaque = not fuses or overload is aten._scaled_mm.default
    if not opaque or overload._schema.is_mutable or len(returns) != 1:
        return None
    packed = encode_call(producer.args, dict(producer.kwargs))
    return packed if packed is not None and packed[0] else None


def _overload(producer: fx.Node) -> str:
    target = producer.target
    assert isinstance(target, torch._ops.OpOverload)
    return f"{target._schema.name}.{target._overloadname}"
