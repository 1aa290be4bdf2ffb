"""A norm and its gate become `fixpass::gated_rms_norm`.

    y = norm(x) * weight * activation(gate)         the gate behind the norm
    y = norm(x * activation(gate)) * weight         the gate in front of it

The activation, its place, every dtype and the groups of a row are read from the graph by
`fixpass.passes.canonicalize_norms.gate`. The gate may have any strides; it is not copied.
"""

from typing import Any

import torch
from torch import fx

from fixpass.lowering.layout import Layout, dtype_name
from fixpass.passes.canonicalize_norms.gate import Gate, NormedRows, gate_of, read_rows
from fixpass.passes.canonicalize_norms.norm import Norm, build_norm, out_steps
from fixpass.passes.canonicalize_norms.scale import CONVERT, FLOATS, peel_upcast
from fixpass.passes.rewrite import (
    NO_REMARK,
    RESHAPES,
    Match,
    Missed,
    Rewrite,
    arg,
    differ,
    dtype_of,
    is_call,
    sole_user,
    val_of,
)


class GatedNorm(Rewrite):
    """Anchored at a norm; the gate is looked for in front of it and behind it."""

    anchors = (torch.ops.fixpass.rms_norm.default,)

    def match(self, anchor: fx.Node) -> Norm | Missed:
        rows = read_rows(anchor)
        if isinstance(rows, Missed):
            return rows if _gate_in_front(arg(arg(anchor, 0), 0)) else NO_REMARK
        gate = _gate_in_front(rows.x)
        if gate is not None:
            return _in_front(anchor, rows, gate)
        gate = _gate_behind(rows.last)
        return NO_REMARK if gate is None else _behind(anchor, rows, gate)

    def replace(self, graph: fx.Graph, match: Match) -> tuple[fx.Node, ...]:
        assert isinstance(match, Norm)
        last = match.replaced[-1]
        return (build_norm(graph, match, last, last.meta["val"]),)


def _gate_in_front(x: Any) -> Gate | None:
    source = x
    while is_call(source, *RESHAPES):
        source = arg(source, 0)
    return gate_of(peel_upcast(source))


def _gate_behind(norm: fx.Node) -> Gate | None:
    for user in norm.users:
        is_cast = is_call(user, CONVERT)
        gate = gate_of(sole_user(user) if is_cast else user)
        if gate is not None and peel_upcast(gate.other) is norm:
            return gate
    return None


def _in_front(anchor: fx.Node, rows: NormedRows, gate: Gate) -> Norm | Missed:
    """The gate is applied to x, and the norm reads the product."""
    product = gate.product
    if peel_upcast(rows.x) is not product:
        return Missed(f"the gated {product.name} is viewed in front of the norm")
    steps = {**rows.steps, "gate_first": True}
    x = peel_upcast(gate.other)
    shared = _shared((product, *rows.owned, *gate.owned), {anchor, rows.x, *rows.owned, product})
    inputs = (x, gate.gate, rows.weight)
    return Missed(shared) if shared else _joined(anchor, inputs, gate, x, rows.last, steps)


def _behind(anchor: fx.Node, rows: NormedRows, gate: Gate) -> Norm | Missed:
    """The gate is applied to the norm with its weight; a cast may follow."""
    product, steps = gate.product, dict(rows.steps)
    if dtype_of(rows.last) != dtype_of(rows.x):
        steps["normed_dtype"] = dtype_of(rows.last)
    last, cast = product, sole_user(product)
    if is_call(cast, CONVERT) and arg(cast, 1) in FLOATS[:3]:
        # A wider result would only be written in more bytes.
        last = product if peel_upcast(cast) is product else cast
    shared = _shared((rows.last, gate.other, *gate.owned), {gate.other, product})
    if peel_upcast(gate.gate) is rows.last:
        return Missed(f"{rows.last.name} is its own gate")
    inputs = (rows.x, gate.gate, rows.weight)
    return Missed(shared) if shared else _joined(anchor, inputs, gate, rows.last, last, steps)


def _joined(
    anchor: fx.Node,
    inputs: tuple[fx.Node, fx.Node, fx.Node | None],
    gate: Gate,
    factor: fx.Node,
    last: fx.Node,
    steps: dict[str, Any],
) -> Norm | Missed:
    """The op of these inputs in place of `last`; `factor` is multiplied by the activation."""
    x, out = val_of(inputs[0]), val_of(last)
    wrong = _wrong(anchor, inputs, gate, factor)
    if wrong or x is None or out is None:
        return Missed(wrong)
    results = out_steps(x, out)
    if isinstance(results, Missed):
        return results
    if gate.dtype != torch.float32:
        steps["gate_dtype"] = gate.dtype
    place = "in front of it" if "gate_first" in steps else "behind it"
    size = steps.get("group_size")
    groups = f", over groups of {size} of {x.shape[-1]}" if size else ""
    scale = f"{gate.activation} of {Layout.of(gate.gate.meta['val'])}"
    return Norm(
        (last,),
        f"{anchor.name} of {Layout.of(x)} joined with {scale} {place}{groups}",
        op="gated_rms_norm",
        inputs=inputs,
        eps=arg(anchor, 3),
        steps={"activation": gate.activation, **steps, **results},
        owner=anchor,
    )


def _wrong(anchor: fx.Node, inputs: tuple[Any, ...], gate: Gate, factor: fx.Node) -> str:
    """What stops the op; empty when nothing does."""
    x, values = inputs[0], (val_of(each) for each in inputs if each is not None)
    if kernel := anchor.kwargs.get("kernel_name"):
        return f"the model asks for {kernel}, which has no gate"
    if arg(anchor, 2) is not None:
        return "a bias stands between the norm and its gate"
    if any(value is None or value.dtype not in FLOATS[:3] for value in values):
        return "the gate, x and the weight are not all f16, bf16 or f32"
    for name, dtype in (("norm", dtype_of(arg(anchor, 0))), ("activation", gate.dtype)):
        if dtype not in FLOATS[:3]:
            return f"the {name} is computed in {dtype_name(dtype)}"
    layouts = [Layout.of(node.meta["val"]) for node in (x, gate.gate, gate.product)]
    if any(differ(layout.shape, layouts[0].shape) for layout in layouts):
        return f"{gate.product.name} broadcasts x {layouts[0]} or its gate {layouts[1]}"
    product, wanted = layouts[2].dtype, torch.promote_types(dtype_of(factor), gate.dtype)
    if product != wanted:
        return f"{gate.product.name} is computed in {dtype_name(product)}, not {dtype_name(wanted)}"
    return ""


def _shared(nodes: tuple[fx.Node, ...], inside: set[fx.Node]) -> str:
    """Why one of `nodes` stays: something outside of the norm and its gate reads it."""
    inside = {*inside, *nodes}
    for node in nodes:
        others = [user.name for user in node.users if user not in inside]
        if others:
            return f"{node.name} is also read by {', '.join(others)}, so its gate stays"
    return ""
