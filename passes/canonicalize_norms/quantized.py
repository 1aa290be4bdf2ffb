"""A norm whose only reader quantises it becomes `fixpass::rms_norm_quant`.

The scale is given, or made from each row or each group of a row. Its constants and dtypes, and the
way it is applied, are read from the graph by `fixpass.passes.canonicalize_norms.quantization`.
"""

from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fixpass.lowering.layout import Layout, dtype_name, known, known_equal
from fixpass.passes.canonicalize_norms.norm import op_overload
from fixpass.passes.canonicalize_norms.quantization import (
    NORMS,
    Reading,
    norm_of,
    read_codes,
    read_scale,
    read_scaled,
    wrong_codes,
)
from fixpass.passes.canonicalize_norms.scale import CONVERT, FLOATS, aten
from fixpass.passes.rewrite import (
    NO_REMARK,
    RESHAPES,
    Editor,
    Match,
    Missed,
    Rewrite,
    arg,
    copy_of,
    differ,
    is_call,
    shape_of,
    sole_user,
    val_of,
)
from fixpass.runtime.quantized_norm import QUANTIZED


@dataclass(frozen=True)
class Quantized(Match):
    """A quantised norm: `replaced` are the codes, then the scales and the sum where they exist."""

    norm: fx.Node = field(kw_only=True)
    y: fx.Node = field(kw_only=True)
    """The normalised value."""
    scale: fx.Node | None = field(kw_only=True)
    """The given scale."""
    has_scales: bool = field(kw_only=True)
    steps: dict[str, Any] = field(kw_only=True)


@dataclass(frozen=True)
class QuantizedNorm(Rewrite):
    """Anchored at the conversion to codes; the norm is looked for behind it."""

    anchors = (CONVERT,)

    def match(self, anchor: fx.Node) -> Quantized | Missed:
        if arg(anchor, 1) not in QUANTIZED:
            return NO_REMARK
        reading = Reading({"quant_dtype": arg(anchor, 1)}, [])
        scaled = read_codes(arg(anchor, 0), reading)
        found = read_scaled(scaled, reading)
        if found is None:
            return NO_REMARK
        y, values, scale = found
        wrong = wrong_codes(reading, scaled) or _wrong_norm(y)
        if wrong:
            return Missed(wrong)
        given = not read_scale(scale, y, values, reading)
        wrong = _wrong_given(scale, norm_of(y), values, scaled) if given else ""
        wrong = wrong or _wrong_readers(y, anchor, scale, reading)
        if wrong:
            return Missed(wrong)
        return _quantized(anchor, y, scale, given, reading.steps)

    def replace(self, graph: fx.Graph, match: Match) -> tuple[fx.Node, ...]:
        assert isinstance(match, Quantized)
        norm, edit = match.norm, Editor(graph, match.norm)
        x, *others, eps = norm.args
        residual = others.pop(0) if norm.target is NORMS[1] else None
        args = (x, residual, *others, match.scale, eps)
        with unset_fake_temporarily():
            val = _value(match)
        new = edit.call(op_overload("rms_norm_quant"), args, match.steps, val)
        totals = len(match.replaced) - 1 - match.has_scales
        results = []
        for old, part in zip(
            match.replaced, (0, *[1] * match.has_scales, *[2] * totals), strict=True
        ):
            result = edit.call(getitem, (new, part), None, new.meta["val"][part])
            results.append(_in_shape_of(graph, old, result))
        return tuple(results)


def _value(match: Quantized) -> tuple[torch.Tensor, ...] | None:
    """The results' fake tensors, those that are replaced; None where one has another shape.

    Running the op on fake tensors costs ten times as much, and copies of them a third of a match.
    """
    y = match.y.meta["val"]
    codes, *others = (node.meta["val"] for node in match.replaced)
    x = arg(match.norm, 0).meta["val"]
    scales = others.pop(0) if match.has_scales else _nothing(y, torch.float32)
    if match.norm.target is NORMS[1] and not others:
        return None
    total = others.pop(0) if others else _nothing(y, x.dtype)
    if match.has_scales and (
        "group_size" in match.steps or differ(scales.shape[:-1], y.shape[:-1])
    ):
        return None
    if any(Layout.of(val).is_dense() is not True for val in (y, scales, total)):
        return None
    return _own(codes) if _is_like(codes, y) else copy_of(y, dtype=codes.dtype), _own(scales), total


def _is_like(val: torch.Tensor, y: torch.Tensor) -> bool:
    return not differ(val.shape, y.shape) and Layout.of(val).has_stride(y.stride()) is True


def _own(val: FakeTensor) -> FakeTensor:
    """`val`, whose node goes, or a copy where it lies in the storage of another node."""
    return copy_of(val) if val._is_view() else val


def _nothing(like: FakeTensor, dtype: torch.dtype) -> FakeTensor:
    return FakeTensor(like.fake_mode, torch.empty(0, dtype=dtype, device="meta"), like.device)


def _in_shape_of(graph: fx.Graph, old: fx.Node, result: fx.Node) -> fx.Node:
    """The result, viewed where `old` has its rows in groups."""
    shape, ours = shape_of(old), shape_of(result)
    if not differ(ours, shape):
        return result
    edit, sizes = Editor(graph, old), []
    for dim, size in enumerate(shape):
        is_same = dim < len(ours) and known_equal(size, ours[dim]) is True
        unknown = edit.size(result, dim) if is_same else -1
        sizes.append(size if isinstance(size, int) else unknown)
    return edit.call(aten.reshape.default, (result, sizes))


def _wrong_norm(y: fx.Node) -> str:
    norm, layout = norm_of(y), Layout.of(y.meta["val"])
    if norm.kwargs.get("kernel_name"):
        return f"the model asks for {norm.kwargs['kernel_name']}, which does not quantise"
    if norm.kwargs.get("order") is not None or layout.is_dense() is not True:
        return f"the norm {layout} is not contiguous"
    return "" if layout.dtype in FLOATS[:3] else f"the norm is {layout}"


def _wrong_given(scale: fx.Node, norm: fx.Node, values: fx.Node, scaled: fx.Node) -> str:
    val = val_of(scale)
    if val is None or known(val.numel() == 1) is not True or val.dtype != torch.float32:
        return f"the scale {scale.name} is neither one f32 number nor amax / constant of a row"
    if differ(shape_of(values), shape_of(scaled)):
        return f"the scale {scale.name} adds dimensions"
    if not scale < norm:
        return f"the scale {scale.name} is computed after the norm"
    return ""


def _wrong_readers(y: fx.Node, codes: fx.Node, scale: fx.Node, reading: Reading) -> str:
    inside = {*reading.owned, codes, scale}
    if y is not norm_of(y) and [arg(user, 1) for user in norm_of(y).users].count(0) > 1:
        return f"{y.name} is also read through another getitem"
    for node in (y, *reading.owned):
        others = [user.name for user in node.users if user not in inside]
        if others and node is not scale:
            return f"{node.name} is also read by {', '.join(others)}"
    return ""


def _quantized(
    anchor: fx.Node, y: fx.Node, scale: fx.Node, given: bool, steps: dict[str, Any]
) -> Quantized:
    norm = norm_of(y)
    last, user = anchor, sole_user(anchor)
    # Groups are viewed as rows again behind the conversion.
    if is_call(user, *RESHAPES) and not differ(shape_of(user), shape_of(y)):
        last = user
    totals = [user for user in norm.users if arg(user, 1) == 1] if y is not norm else []
    kind = f"{steps['group_size']} values" if "group_size" in steps else "row"
    how = "with a given scale" if given else f"with a scale for each {kind}"
    layout = Layout.of(arg(norm, 0).meta["val"])
    return Quantized(
        (last, *([] if given else [scale]), *totals),
        f"{norm.name} of {layout} joined with its quantisation to "
        f"{dtype_name(steps['quant_dtype'])} {how}",
        norm=norm,
        y=y,
        scale=scale if given else None,
        has_scales=not given,
        steps={**{k: v for k, v in norm.kwargs.items() if k != "order"}, **steps},
    )
