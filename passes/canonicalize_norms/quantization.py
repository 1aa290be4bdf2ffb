"""What a graph does between a norm and its codes, read backwards from the codes.

    codes = cast(clamp(round(y / scale), low, high)),  scale = max(max(amax(|y|), a) / limit, b)

`fixpass.passes.canonicalize_norms.quantized` builds the op from it. Nothing is changed here.
"""

from dataclasses import dataclass, field
from numbers import Real
from operator import getitem
from typing import Any

import torch
from torch import fx

import fixpass.runtime.ops  # noqa: F401  (defines torch.ops.fixpass)
from fixpass.lowering.layout import dtype_name, known, known_equal
from fixpass.passes.canonicalize_norms.scale import CONVERT, FLOATS, aten, peel_upcast
from fixpass.passes.rewrite import RESHAPES, arg, differ, dtype_of, is_call

NORMS = (torch.ops.fixpass.rms_norm.default, torch.ops.fixpass.add_rms_norm.default)
SHAPES = (*RESHAPES, aten.unsqueeze.default, aten.squeeze.dim)


@dataclass
class Reading:
    """What was found on the way back from the codes to the norm."""

    steps: dict[str, Any]
    owned: list[fx.Node]
    """The nodes that nothing else may read."""
    tail: dict[str, Any] = field(default_factory=dict)
    """Bounds, rounding and conversion between the scaled values and the codes."""

    def peel(self, node: Any, *ops: Any) -> Any:
        """The value behind these ops; the ops are owned from now on."""
        while is_call(node, *ops):
            self.owned.append(node)
            node = arg(node, 0)
        return node

    def source(self, node: Any) -> Any:
        """The value behind reshapes and conversions that lose nothing."""
        while is_call(node, *SHAPES) or peel_upcast(node) is not node:
            self.owned.append(node)
            node = arg(node, 0)
        return node

    def clamp_min(self, node: Any, step: str) -> Any:
        """The value behind an optional lower bound in float32."""
        is_bound = is_call(node, aten.clamp_min.default) and isinstance(arg(node, 1), Real)
        if not is_bound or dtype_of(node) != torch.float32:
            return node
        self.steps[step] = float(arg(node, 1))
        self.owned.append(node)
        return arg(node, 0)


def read_codes(node: Any, reading: Reading) -> Any:
    """The scaled values behind bounds and rounding, which may come in any order."""
    names: dict[Any, str] = {
        aten.clamp_max.default: "high",
        aten.clamp_min.default: "low",
        aten.round.default: "rounds",
        CONVERT: "converts",
    }
    while is_call(node, *names):
        name = names[node.target]
        if name in reading.tail and name != "converts":
            break
        reading.tail.setdefault(name, arg(node, 1) if len(node.args) > 1 else True)
        reading.owned.append(node)
        node = arg(node, 0)
    return node


def read_scaled(node: Any, reading: Reading) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The norm, its values as they are scaled, and the scale; None where no norm is scaled."""
    if not is_call(node, aten.div.Tensor, aten.mul.Tensor) or node.kwargs:
        return None
    reading.owned.append(node)
    pairs = [(arg(node, 0), arg(node, 1))]
    if node.target is aten.mul.Tensor:
        pairs.append((arg(node, 1), arg(node, 0)))
    for values, factor in pairs:
        behind = Reading({}, [])
        y = behind.source(values)
        if not is_norm(y) or not isinstance(factor, fx.Node):
            continue
        reading.owned += behind.owned
        reading.steps["apply"] = "divide" if node.target is aten.div.Tensor else "multiply"
        while is_call(factor, aten.mul.Tensor) and arg(factor, 1) == 1.0:
            factor = reading.peel(factor, aten.mul.Tensor)
        if is_call(factor, aten.reciprocal.default) and reading.steps["apply"] == "multiply":
            reading.steps["apply"] = "reciprocal"
            reading.owned.append(factor)
            factor = arg(factor, 0)
        return y, values, factor
    return None


def is_norm(node: Any) -> bool:
    if is_call(node, getitem) and arg(node, 1) == 0:
        return is_call(arg(node, 0), NORMS[1])
    return is_call(node, NORMS[0])


def norm_of(y: fx.Node) -> fx.Node:
    norm: fx.Node = arg(y, 0) if is_call(y, getitem) else y
    return norm


def wrong_codes(reading: Reading, scaled: fx.Node) -> str:
    code, tail = reading.steps["quant_dtype"], reading.tail
    name = dtype_name(code)
    if dtype_of(scaled) != torch.float32:
        return f"scaled in {dtype_name(dtype_of(scaled))}, not in f32"
    if "converts" in tail:
        return f"converted to {dtype_name(tail['converts'])} before {name}"
    low, high = tail.get("low"), tail.get("high")
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        return f"values outside {name} are not clamped"
    if ("rounds" in tail) != (code == torch.int8):
        return f"values are {'' if 'rounds' in tail else 'not '}rounded before they become {name}"
    reading.steps |= {"low": float(low), "high": float(high)}
    limits = torch.iinfo(code) if code == torch.int8 else torch.finfo(code)
    if not limits.min <= low <= high <= limits.max:
        return f"clamped to {low:g} and {high:g}, which {name} does not hold"
    if code == torch.int8 and (low, high) != (int(low), int(high)):
        return f"clamped to {low:g} and {high:g}, which are no integers"
    return ""


def read_scale(scale: Any, y: fx.Node, values: fx.Node, reading: Reading) -> bool:
    """Whether the scale is made from the largest magnitudes of rows or groups of `y`."""
    inner = Reading({}, [])
    node = inner.clamp_min(inner.peel(scale, *SHAPES), "scale_min")
    if is_call(node, CONVERT) and arg(node, 1) == torch.float32:
        inner.owned.append(node)
        node = arg(node, 0)
    node = inner.peel(node, *SHAPES)
    if not is_call(node, aten.div.Tensor) or not isinstance(arg(node, 1), Real):
        return False
    if arg(node, 1) <= 0 or dtype_of(node) not in FLOATS[:3]:
        return False
    inner.owned.append(node)
    inner.steps["limit"] = float(arg(node, 1))
    if dtype_of(node) != torch.float32:
        inner.steps["scale_dtype"] = dtype_of(node)
    largest = inner.source(inner.clamp_min(inner.source(arg(node, 0)), "amax_min"))
    grouped = _read_amax(largest, inner)
    if grouped is None or inner.source(grouped) is not y:
        return False
    size, hidden_size = grouped.meta["val"].shape[-1], y.meta["val"].shape[-1]
    rows, column = values.meta["val"].shape, scale.meta["val"]
    if column.dtype != torch.float32 or differ((*rows[:-1], 1, size), (*column.shape, rows[-1])):
        return False
    if known_equal(hidden_size, size) is not True:
        if not isinstance(size, int) or known(hidden_size % size == 0) is not True:
            return False
        inner.steps["group_size"] = size
    if dtype_of(largest) != dtype_of(y):
        inner.steps["amax_dtype"] = dtype_of(largest)
    reading.steps |= inner.steps
    reading.owned += [each for each in inner.owned if each is not scale]
    return True


def _read_amax(node: Any, inner: Reading) -> fx.Node | None:
    """The values whose magnitudes' largest, over the last dimension, `node` is."""
    dims: Any = None
    if is_call(node, getitem) and arg(node, 1) == 0 and is_call(arg(node, 0), aten.max.dim):
        inner.owned.append(node)
        node = arg(node, 0)
        dims = [arg(node, 1)]
    elif is_call(node, aten.amax.default) and len(node.args) > 1:
        dims = arg(node, 1)
    magnitudes = arg(node, 0) if dims else None
    if not is_call(magnitudes, aten.abs.default):
        return None
    rank = magnitudes.meta["val"].dim()
    if [dim % rank for dim in dims] != [rank - 1]:
        return None
    inner.owned += [node, magnitudes]
    found: fx.Node = arg(magnitudes, 0)
    return found
