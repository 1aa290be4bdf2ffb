"""Constraints on dtypes, rounding and quantisation: of operands, and of each step."""

from dataclasses import dataclass

import torch

from fixpass.lowering.constraints import Constraint, OperandConstraint
from fixpass.lowering.layout import Known, all_known, dtype_name, either, known
from fixpass.lowering.site import Site


@dataclass(frozen=True)
class DtypeIn(OperandConstraint):
    """The operand's dtype."""

    dtypes: tuple[torch.dtype, ...]

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        return layout is None or layout.dtype in self.dtypes

    def __str__(self) -> str:
        return f"{self.operand}.dtype in ({', '.join(map(dtype_name, self.dtypes))})"


@dataclass(frozen=True)
class SameDtype(OperandConstraint):
    """The operand, where there is one, has the dtype of x."""

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        return layout is None or layout.dtype == site.x.dtype

    def __str__(self) -> str:
        return f"{self.operand}.dtype == x.dtype"


@dataclass(frozen=True)
class Alike(OperandConstraint):
    """Two operands are both there, in one dtype, or neither is."""

    other: str

    def holds(self, site: Site) -> Known:
        first, second = site.layouts.get(self.operand), site.layouts.get(self.other)
        return (first and first.dtype) == (second and second.dtype)

    def __str__(self) -> str:
        return f"{self.operand} and {self.other} have one dtype, or neither is there"


@dataclass(frozen=True)
class ComputesIn(Constraint):
    """The dtype in which squares are summed and rows are scaled."""

    dtype: torch.dtype

    def holds(self, site: Site) -> Known:
        return site.compute_dtype == self.dtype

    def __str__(self) -> str:
        return f"computed in {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class WeightRule(Constraint):
    """Whether the value is rounded to x's dtype before the weight, and the offset of the weight."""

    rounds_before: tuple[bool, ...]
    offsets: tuple[float, ...] = (0.0,)

    def holds(self, site: Site) -> Known:
        offset, dtype = site.steps.get("weight_offset", 0.0), site.steps.get("weight_dtype")
        if offset not in self.offsets or dtype not in (None, torch.float32, site.x.dtype):
            return False
        weight = site.layouts.get("weight")
        # In 16 bits the sum 1 + weight is rounded, which the kernel does not do.
        if offset and torch.float32 not in (dtype, weight and weight.dtype):
            return False
        if site.steps.get("norm_dtype") not in (None, site.compute_dtype, site.x.dtype):
            return False
        if site.x.dtype == site.compute_dtype:
            return True
        return site.rounds_before_weight in self.rounds_before

    def __str__(self) -> str:
        places = " or ".join("before" if before else "after" for before in self.rounds_before)
        offsets = " or ".join(
            f"{offset:g} + weight in f32" if offset else "weight" for offset in self.offsets
        )
        return f"rounded {places} the multiply by {offsets}"


@dataclass(frozen=True)
class RoundsTo(Constraint):
    """The dtypes to which the steps of the op round."""

    dtypes: tuple[torch.dtype, ...]

    def holds(self, site: Site) -> Known:
        names = ("norm", "weight", "normed", "gate", "rope", "result")
        steps = (site.steps.get(f"{name}_dtype") for name in names)
        return all(dtype in (None, *self.dtypes) for dtype in steps)

    def __str__(self) -> str:
        return f"each step rounds to {' or '.join(map(dtype_name, self.dtypes))}"


@dataclass(frozen=True)
class OneNumber(OperandConstraint):
    """The operand is one number in float32."""

    def holds(self, site: Site) -> Known:
        layout = site.layouts.get(self.operand)
        return layout is None or (layout.dtype == torch.float32 and known(layout.numel == 1))

    def __str__(self) -> str:
        return f"{self.operand} is one f32 number"


@dataclass(frozen=True)
class GroupDivides(Constraint):
    """The values of a row that belong together are the whole row, or a part that divides it."""

    power_of_two: bool = True

    def holds(self, site: Site) -> Known:
        size = site.steps.get("group_size", 0)
        if not size:
            return True
        if self.power_of_two and size & (size - 1):
            return False
        return known(site.x.shape[-1] % size == 0)

    def __str__(self) -> str:
        return f"group_size {'is a power of two that ' * self.power_of_two}divides hidden_size"


@dataclass(frozen=True)
class RotaryTables(Constraint):
    """cos and sin have one dtype, and a column for each rotated value, or for each pair."""

    def holds(self, site: Site) -> Known:
        size = site.steps.get("rotary_dim", 0)
        cos, sin = site.layouts["cos"], site.layouts["sin"]
        if cos.dtype != sin.dtype or not (cos.rank and sin.rank and site.x.rank):
            return False
        head, hidden = site.steps.get("head_size", 0), site.x.shape[-1]
        columns = [known(cos.shape[-1] == wanted) for wanted in (size, size // 2)]
        whole = known(hidden % head == 0) if head else True
        fits = all_known((size % 2 == 0, known(size <= (head or hidden)), whole))
        same = known(sin.shape[-1] == cos.shape[-1])
        return all_known((fits, either(*columns), same))

    def __str__(self) -> str:
        return "cos and sin have one dtype and rotary_dim columns, or half as many"


@dataclass(frozen=True)
class SameHead(Constraint):
    """k has heads of the size of q's."""

    def holds(self, site: Site) -> Known:
        q, k = site.layouts["q"], site.layouts["k"]
        if not (q.rank and k.rank):
            return False
        size = site.steps.get("head_size", 0)
        return known(k.shape[-1] % size == 0 if size else k.shape[-1] == q.shape[-1])

    def __str__(self) -> str:
        return "k has heads of the size of q's"


@dataclass(frozen=True)
class QuantizedAs(Constraint):
    """How vLLM's kernels quantise: the largest code, the smallest scale, and how it is applied."""

    apply: str
    group_sizes: tuple[int, ...] = (0,)
    """The values that share a scale; 0 is a row. Nothing where one scale is given."""

    def holds(self, site: Site) -> Known:
        steps, code = site.steps, site.layouts["out"].dtype
        high = 127.0 if code == torch.int8 else _LARGEST.get(code)
        if high is None:
            return False
        wanted = {"low": -128.0 if code == torch.int8 else -high, "high": high}
        if self.group_sizes:
            least = 2.0**-23 if code == torch.int8 else 1 / (512 * high)
            wanted |= {"limit": high, "scale_min": least}
        if any(abs(steps.get(name, 0.0) / value - 1) > 1e-7 for name, value in wanted.items()):
            return False
        # The kernel rounds to x's dtype before it quantises; without this step the codes differ.
        if steps.get("weight_dtype") not in (None, site.x.dtype) or steps.get("amax_min"):
            return False
        if steps.get("out_dtype") not in (None, site.x.dtype, torch.float32):
            return False
        if self.group_sizes and steps.get("group_size", 0) not in self.group_sizes:
            return False
        return steps.get("apply") == self.apply and steps.get("scale_dtype") is None

    def __str__(self) -> str:
        groups = f" in groups of {self.group_sizes}" if any(self.group_sizes) else ""
        return f"quantised as vLLM does: {self.apply}{groups}"


_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 224.0}
