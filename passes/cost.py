"""Counts the bytes that a norm moves if Inductor fuses it, and if an opaque kernel computes it.

A pointwise producer that only the norm reads, and pointwise consumers whose other inputs are at
hand, run in one loop with a norm that Inductor compiles. An opaque kernel reads and writes these
tensors in memory. `select-norm-kernel` decides by the counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from fixpass.lowering.relayout import hint
from fixpass.lowering.site import OPERANDS, op_name
from fixpass.passes.drop_dead_copies.dead_copy import copied_operands
from fixpass.passes.rewrite import RESHAPES, is_call, val_of

aten = torch.ops.aten
# Views that have each element of their source once.
WHOLE_VIEWS = (
    *RESHAPES,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
)
VIEWS = (
    *WHOLE_VIEWS,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.split_with_sizes.default,
    getitem,
)
# The ops that normalise two tensors.
PAIRS = ("qk_norm", "qk_norm_rope")
# Not tagged pointwise, but Inductor computes it element by element in the same loop.
POINTWISE = (torch.ops.prims.convert_element_type.default, aten.cat.default, aten.clone.default)


@dataclass(frozen=True)
class Fusion:
    """The operations that would fuse, and the bytes over the norm's border with and without."""

    names: tuple[str, ...]
    fused_bytes: int
    opaque_bytes: int


def launches_of_inductor(op: str) -> int:
    """How many kernels Inductor generates for `op`: one for each tensor that is normalised."""
    return 2 if op in PAIRS else 1


def fusion_of(norm: fx.Node) -> Fusion:
    """Count the bytes of `norm`, fused with its pointwise neighbours and alone."""
    names: list[str] = []
    opaque = fused = 0
    # A copy in front of the norm is no producer: whatever kernel is chosen may read its source.
    sources = copied_operands(norm)
    for i, name in enumerate(OPERANDS[op_name(norm)]):
        operand = sources.get(i, norm.args[i])
        if not isinstance(operand, fx.Node) or name.endswith(("weight", "bias", "scale")):
            continue
        num_bytes = bytes_of(operand)
        opaque += num_bytes
        producer = source_of(operand)
        # Every layer reads the tables of a rotation, so they are written whatever reads them.
        if name in ("cos", "sin") or not is_pointwise(producer):
            fused += num_bytes
            continue
        names.append(producer.name)
        if has_one_reader(producer):
            # Written by the producer and read by the kernel: neither happens when they fuse.
            opaque += num_bytes
    for result in results_of(norm):
        num_bytes = bytes_of(result)
        near, far = split_readers(result, norm)
        names += near
        opaque += num_bytes * (2 if near else 1)
        fused += num_bytes if far or not near else 0
    return Fusion(tuple(names), fused, opaque)


def results_of(norm: fx.Node) -> Iterator[fx.Node]:
    """The normalised tensors: the node itself, or the parts of what it returns that are norms."""
    if isinstance(norm.meta["val"], torch.Tensor):
        yield norm
        return
    # The second result of add_rms_norm is the sum, which is written either way.
    normalised = (0, 1) if op_name(norm) in PAIRS else (0,)
    yield from (user for user in norm.users if user.args[1] in normalised)


def split_readers(result: fx.Node, norm: fx.Node) -> tuple[list[str], bool]:
    """The readers of `result`, through views, that fuse with the norm, and whether others exist."""
    near: dict[fx.Node, None] = {}
    others = False
    queue = [(result, user) for user in result.users]
    while queue:
        source, user = queue.pop(0)
        if is_call(user, *VIEWS):
            queue += [(source, reader) for reader in user.users]
        elif is_pointwise(user) and is_at_hand(user, norm, near):
            near[user] = None
        else:
            others = True
    return [node.name for node in near], others


def is_at_hand(node: fx.Node, norm: fx.Node, near: dict[fx.Node, None]) -> bool:
    """Whether every input of `node` exists before the norm, or comes from it by pointwise steps."""
    for operand in node.all_input_nodes:
        source = source_of(operand)
        if source in near or source is norm or source < norm:
            continue
        if not is_pointwise(source) or not is_at_hand(source, norm, near):
            return False
    return True


def source_of(node: fx.Node) -> fx.Node:
    """The node that computed what `node` is a view of."""
    while is_call(node, *VIEWS) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def is_pointwise(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target in POINTWISE


def has_one_reader(node: fx.Node) -> bool:
    return len(node.users) == 1


def bytes_of(node: fx.Node) -> int:
    val = val_of(node)
    return 0 if val is None else hint(val.numel()) * val.dtype.itemsize
