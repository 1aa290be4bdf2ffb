"""Two norms over parts of one packed tensor, with one eps and one rule, become `fixpass::qk_norm`.

Anchored at the first of the two, where the views of the second are made again if they come
later. Norms that Inductor fuses with their neighbours are left to it: joined, they would move more
bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)
from fixpass.lowering.contract_table import kernel_of
from fixpass.lowering.layout import Layout
from fixpass.lowering.site import Site
from fixpass.passes.base import Choice, module_path
from fixpass.passes.canonicalize_norms.norm import Norm, build_norm
from fixpass.passes.cost import VIEWS, fusion_of, source_of
from fixpass.passes.rewrite import NO_REMARK, Editor, Match, Missed, Rewrite, call, is_call

KERNEL, JOINED = "strided_rms_norm", "strided_qk_norm"
aten = torch.ops.aten


@dataclass(frozen=True)
class QkNorm(Rewrite):
    """Anchored at a norm of a view; the other norm is looked for behind the same tensor."""

    kernels: tuple[str, ...] = (KERNEL,)
    """The kernels whose norms may be joined."""

    anchors = (torch.ops.fixpass.rms_norm.default,)

    def match(self, anchor: fx.Node) -> Norm | Missed:
        packed = _packed(anchor)
        if packed is None or not self._is_ours(anchor):
            return NO_REMARK
        later = [n for n in _norms_of(packed) if anchor < n and n.kwargs == anchor.kwargs]
        alike = (n for n in later if n.args[2] is None and n.args[3] == anchor.args[3])
        other = next((n for n in alike if self._is_ours(n)), None)
        if other is None or anchor.args[2] is not None:
            return NO_REMARK
        wrong = _wrong(anchor, other)
        if wrong:
            return Missed(f"not joined with {other.name}: {wrong}")
        q, k = _operand(anchor), _operand(other)
        choice = Choice(JOINED, -1, sites=(module_path(anchor), module_path(other)))
        layouts = f"{Layout.of(q.meta['val'])} and {Layout.of(k.meta['val'])}"
        return Norm(
            (anchor, other),
            f"{anchor.name} and {other.name} of {layouts} became one launch",
            0,
            "qk_norm",
            (q, k, _weight(anchor), _weight(other)),
            _eps(anchor),
            {**anchor.kwargs, "kernel_name": JOINED},
            choice=choice,
        )

    def _is_ours(self, norm: fx.Node) -> bool:
        """Whether our kernel would move no more bytes than the kernel that was chosen."""
        kernel = norm.kwargs.get("kernel_name")
        if kernel == KERNEL or kernel not in self.kernels:
            return kernel == KERNEL
        fusion = fusion_of(norm)
        return fusion.opaque_bytes <= fusion.fused_bytes

    def replace(self, graph: fx.Graph, match: Match) -> tuple[fx.Node, ...]:
        assert isinstance(match, Norm)
        first, second = match.replaced
        edit = Editor(graph, first)
        q, k, *weights = match.inputs
        assert k is not None
        inputs = (q, hoist(edit, k), *weights)
        joined = Norm((first,), match.text, 0, match.op, inputs, match.eps, match.steps)
        pair = build_norm(graph, joined, first, (first.meta["val"], second.meta["val"]))
        with graph.inserting_after(pair):
            parts = [call(graph, getitem, (pair, i)) for i in (1, 0)][::-1]
        for part, old in zip(parts, match.replaced, strict=True):
            part.meta = {**old.meta}
        return tuple(parts)


def _wrong(first: fx.Node, second: fx.Node) -> str:
    """Why the two cannot be one launch; empty when they can."""
    weights = [_weight(first), _weight(second)]
    if (weights[0] is None) != (weights[1] is None):
        return "one has a weight and the other has none"
    for node in (*_views_after(second, first), weights[1]):
        if node is not None and not node < first and not is_call(node, *VIEWS):
            return f"{node.name} is computed after {first.name}"
    vals = {"q": _operand(first), "k": _operand(second)}
    names = zip(("q_weight", "k_weight"), weights, strict=True)
    vals |= {name: node for name, node in names if node is not None}
    layouts = {name: Layout.of(node.meta["val"]) for name, node in vals.items()}
    layouts["out"] = Layout.of(first.meta["val"])
    if weights[0] is not None and layouts["q_weight"].dtype != layouts["k_weight"].dtype:
        return "their weights differ in dtype"
    kernel = kernel_of(JOINED, "qk_norm")
    assert kernel is not None
    verdict = kernel.check(Site("qk_norm", layouts, "cuda", dict(first.kwargs)))
    return "" if verdict else str(verdict)


def _packed(norm: fx.Node) -> fx.Node | None:
    """The tensor that the norm's input is a part of, or None when it is no view."""
    operand = _operand(norm)
    source = source_of(operand)
    return None if source is operand else source


def _norms_of(packed: fx.Node) -> Iterator[fx.Node]:
    """Every norm that our kernel computes over a view of `packed`, in no order."""
    queue = list(packed.users)
    while queue:
        node = queue.pop(0)
        if is_call(node, torch.ops.fixpass.rms_norm.default):
            if source_of(_operand(node)) is packed:
                yield node
        elif is_call(node, *VIEWS):
            queue += node.users


def _views_after(norm: fx.Node, first: fx.Node) -> Iterator[fx.Node]:
    """What the norm's input is made of behind `first`: views, and sizes that they are given."""
    queue = [_operand(norm)]
    while queue:
        node = queue.pop()
        if not node < first:
            yield node
            queue += node.all_input_nodes


def hoist(edit: Editor, node: fx.Node) -> fx.Node:
    """`node`, or a copy of the views that make it where they come behind the editor's place."""
    if node < edit.anchor:
        return node
    args = fx.node.map_arg(node.args, lambda source: hoist(edit, source))
    return edit.call(node.target, args, dict(node.kwargs))


def _operand(norm: fx.Node) -> fx.Node:
    assert isinstance(norm.args[0], fx.Node)
    return norm.args[0]


def _weight(norm: fx.Node) -> fx.Node | None:
    weight = norm.args[1]
    return weight if isinstance(weight, fx.Node) else None


def _eps(norm: fx.Node) -> float:
    eps: Any = norm.args[3]
    return float(eps)
