"""One norm in a graph, as kernels see it: the layouts of its operands and its rounding steps.

A site holds facts only. `Site.of` reads them from a `fixpass::` node's `meta["val"]`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fixpass.lowering.layout import Layout, known
from fixpass.runtime.norms import default_compute_dtype

OPS = (
    "rms_norm",
    "layer_norm",
    "add_rms_norm",
    "qk_norm",
    "qk_norm_rope",
    "rms_norm_quant",
    "gated_rms_norm",
)
# Positions of the tensor arguments in the schemas of `fixpass.runtime.ops`.
OPERANDS: Mapping[str, tuple[str, ...]] = {
    "rms_norm": ("x", "weight", "bias"),
    "layer_norm": ("x", "weight", "bias"),
    "add_rms_norm": ("x", "residual", "weight", "bias"),
    "qk_norm": ("q", "k", "q_weight", "k_weight"),
    "qk_norm_rope": ("q", "k", "q_weight", "k_weight", "cos", "sin"),
    "rms_norm_quant": ("x", "residual", "weight", "bias", "scale"),
    "gated_rms_norm": ("x", "gate", "weight"),
    # A linear layer is an ATen op: its pass reads the operands, the weight (K, N) as mm takes it.
    "linear": ("x", "weight", "bias"),
}
_COPIES = (torch.ops.aten.clone.default,)
_RESHAPES = (torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)
# Operands that have one row for each row of x; q and k have rows of their own.
ROW_OPERANDS = ("x", "residual", "gate", "out")
PARAMETERS = ("weight", "bias")


@dataclass(frozen=True)
class Site:
    """A norm's op, the layout of each operand and of `out`, and its rounding steps."""

    op: str
    layouts: Mapping[str, Layout]
    device_type: str
    steps: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(node: fx.Node) -> "Site":
        op = op_name(node)
        layouts = {
            name: _layout_of(arg)
            for name, arg in zip(OPERANDS[op], node.args, strict=False)
            if isinstance(arg, fx.Node)
        }
        out = first_result(node.meta["val"])
        layouts["out"] = Layout.of(out)
        return Site(op, layouts, out.device.type, dict(node.kwargs))

    @property
    def x(self) -> Layout:
        """The first operand, whose dtype and rows the others are compared with."""
        return self.layouts[OPERANDS[self.op][0]]

    @property
    def rows(self) -> tuple[str, ...]:
        """The operands that have one row for each row of x, and `out`."""
        return tuple(name for name in ROW_OPERANDS if name in self.layouts)

    @property
    def loose_parameters(self) -> tuple[str, ...]:
        """The weight and bias that a copy would change: not dense, or not at a storage's start."""
        layouts = ((name, self.layouts[name]) for name in PARAMETERS if name in self.layouts)
        return tuple(
            name
            for name, layout in layouts
            if layout.is_dense() is not True or known(layout.offset == 0) is not True
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype | None = self.steps.get("compute_dtype")
        return dtype or default_compute_dtype(self.x.dtype)

    @property
    def rounds_before_weight(self) -> bool:
        """Whether the normalised value is rounded to x's dtype before the weight is applied."""
        norm_dtype = self.steps.get("norm_dtype")
        return norm_dtype is not None and norm_dtype != self.compute_dtype

    def with_layouts(self, **layouts: Layout) -> "Site":
        return replace(self, layouts={**self.layouts, **layouts})


def _layout_of(node: fx.Node) -> Layout:
    """The recorded layout, with the offset that remains when Inductor drops copies.

    Inductor drops a clone whose strides are those of its input, and then reads the input where it
    starts. Such clones are looked for behind views.
    """
    layout = Layout.of(node.meta["val"])
    offset = layout.offset
    source: Any = node
    while isinstance(source, fx.Node) and _moves_no_data(source.target):
        copied, source = source, source.args[0]
        if copied.target not in _COPIES or not isinstance(source, fx.Node):
            continue
        val = source.meta.get("val")
        if not isinstance(val, torch.Tensor):
            break
        if Layout.of(copied.meta["val"]).has_stride(val.stride()) is False:
            break
        offset = offset + val.storage_offset()
    return layout if offset is layout.offset else replace(layout, offset=offset)


def _moves_no_data(op: Any) -> bool:
    if op in _COPIES or op in _RESHAPES:
        return True
    return isinstance(op, torch._ops.OpOverload) and op.is_view


def op_name(node: fx.Node) -> str:
    """`rms_norm` for a `fixpass::rms_norm` node, and the empty string for any other node."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    namespace, _, name = node.target._schema.name.partition("::")
    return name if namespace == "fixpass" and name in OPS else ""


def first_result(val: Any) -> torch.Tensor:
    """The normalised tensor of an op that returns one tensor or a tuple."""
    result: torch.Tensor = val[0] if isinstance(val, (tuple, list)) else val
    return result
