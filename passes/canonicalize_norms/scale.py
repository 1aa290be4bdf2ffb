"""The first half of a norm in a graph: from the reciprocal root to the normalised value.

Reads `h * rsqrt(mean(h^2) + eps)` and its spellings backwards from the root, with or without the
mean taken off, and finds x behind an upcast. What follows the normalised value, weight and bias,
is read by `fixpass.passes.canonicalize_norms.idiom`.
"""

from dataclasses import dataclass
from numbers import Real
from operator import getitem
from typing import Any

import torch
from torch import fx

from fixpass.lowering.layout import all_known, known_equal
from fixpass.passes.canonicalize_norms.grouped_norms import describe_channels
from fixpass.passes.rewrite import NO_REMARK, Missed, arg, is_call, sole_user, val_of

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
L2_NORM = "l2_norm"
ADDS = (aten.add.Tensor, aten.add.Scalar)
# The dtypes that type promotion accepts; it raises for float8.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOMENTS: dict[Any, str] = {aten.mean.dim: "rms_norm", aten.sum.dim_IntList: L2_NORM}
ROOTS = (aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar)


@dataclass(frozen=True)
class Scale:
    """A normalised value `y`, its x, and the nodes between them."""

    op: str
    x: fx.Node
    y: fx.Node
    eps: float
    compute_dtype: torch.dtype
    own: set[fx.Node]
    """The nodes that nothing but the norm reads, up to `y`."""


@dataclass(frozen=True)
class _Root:
    """A root of `variance`, or its inverse, at `scale`; `owned` are the nodes up to there."""

    variance: fx.Node
    scale: fx.Node
    owned: tuple[fx.Node, ...]
    is_inverse: bool


@dataclass(frozen=True)
class _Moment:
    """A mean of squares of `centred`; `base` is the value before its mean was taken off."""

    op: str
    base: fx.Node
    centred: fx.Node | None
    owned: tuple[fx.Node, ...]


def read_scale(root: fx.Node) -> Scale | Missed:
    """The norm around `root`, a reciprocal square root in one of its spellings."""
    found = _read_root(root)
    if isinstance(found, Missed):
        return found
    variance, scale, owned = found.variance, found.scale, found.owned
    moment_node, eps, added = _read_eps(variance)
    moment = _read_moment(moment_node)
    if isinstance(moment, Missed):
        return moment if root.target == aten.rsqrt.default else NO_REMARK
    y = sole_user(scale)
    if y is None:
        return Missed(_shared(scale, "the scale"))
    numerator = _numerator(y, found)
    if numerator is None:
        return Missed(f"the scale goes to {y.name}, which is not a multiply of the input by it")
    if not _is_base(numerator, moment):
        return Missed(f"{y.name} does not scale what was squared")
    if not _is_column(scale, moment.base):
        return Missed(f"{scale.name} is not one value a row of {moment.base.name}")
    owned = (*owned, *added, *moment.owned, *_centred_nodes(numerator, moment))
    inside = {*owned, y}
    for node in owned:
        if not inside.issuperset(node.users):
            return Missed(_shared(node, node.name, inside))
    return _finish(moment, y, eps, inside)


def _finish(moment: _Moment, y: fx.Node, eps: float, own: set[fx.Node]) -> Scale | Missed:
    base, result = val_of(moment.base), val_of(y)
    if base is None or result is None or base.layout != torch.strided:
        return Missed("its values are not known strided tensors")
    if not base.dtype.is_floating_point or result.dtype != base.dtype:
        return Missed(f"it computes in {base.dtype} and gives {result.dtype}")
    return Scale(moment.op, peel_upcast(moment.base), y, eps, base.dtype, own)


def _read_root(root: fx.Node) -> _Root | Missed:
    variance = arg(root, 0)
    if not isinstance(variance, fx.Node):
        return NO_REMARK
    if root.target == aten.pow.Tensor_Scalar and arg(root, 1) != -0.5:
        return NO_REMARK
    passed: tuple[fx.Node, ...] = (root,)
    is_inverse = root.target != aten.sqrt.default
    while (user := sole_user(passed[-1])) is not None:
        is_one = is_call(user, aten.mul.Tensor) and arg(user, 1) == 1.0
        if not is_one and not is_call(user, aten.reciprocal.default, aten.unsqueeze.default):
            break
        is_inverse ^= is_call(user, aten.reciprocal.default)
        passed = (*passed, user)
    return _Root(variance, passed[-1], passed, is_inverse)


def _read_eps(node: fx.Node) -> tuple[fx.Node, float, tuple[fx.Node, ...]]:
    """The mean of squares, eps, and the nodes passed on the way."""
    passed: tuple[fx.Node, ...] = ()
    eps = 0.0
    for _ in range(3):
        if is_call(node, *ADDS) and isinstance(arg(node, 1), Real) and not node.kwargs and not eps:
            eps = float(arg(node, 1))
        elif not is_call(node, aten.unsqueeze.default):
            break
        passed = (*passed, node)
        node = _node(arg(node, 0))
    return node, eps, passed


def _read_moment(node: fx.Node) -> _Moment | Missed:
    if is_call(node, getitem) and is_call(arg(node, 0), aten.var_mean.correction):
        return _read_var_mean(node)
    if is_call(node, aten.var.correction):
        return _read_var(node)
    if is_call(node, *ADDS) and is_call(arg(node, 0), aten.mean.dim):
        return Missed(f"{node.name} adds no constant eps to the mean of squares")
    if not is_call(node, *MOMENTS):
        return Missed(f"{node.name} under the root is not a mean of squares")
    wrong = _wrong_dims(node)
    if wrong:
        return Missed(wrong)
    square = _node(arg(node, 0))
    h = _squared(square)
    if h is None:
        return Missed(f"{square.name} under the mean is not a square")
    centred = _read_centred(h)
    if centred is None:
        return _Moment(MOMENTS[node.target], h, None, (node, square))
    if node.target != aten.mean.dim:
        return Missed(f"{node.name} is a sum of squares, and a layer norm needs their mean")
    base, mean = centred
    return _Moment("layer_norm", base, h, (node, square, h, mean))


def _read_var_mean(node: fx.Node) -> _Moment | Missed:
    pair = _node(arg(node, 0))
    wrong = "the root is over the mean" if arg(node, 1) != 0 else _wrong_variance(pair)
    if wrong:
        return Missed(wrong)
    return _Moment("layer_norm", _node(arg(pair, 0)), None, (node, pair, *pair.users))


def _read_var(node: fx.Node) -> _Moment | Missed:
    wrong = _wrong_variance(node)
    return Missed(wrong) if wrong else _Moment("layer_norm", _node(arg(node, 0)), None, (node,))


def _wrong_variance(node: fx.Node) -> str:
    if node.kwargs.get("correction", 1) != 0:
        return f"{node.name} is an unbiased variance"
    return _wrong_dims(node)


def _wrong_dims(node: fx.Node) -> str:
    """Why the reduction is not over the last dimension alone; empty when it is."""
    source = val_of(arg(node, 0))
    dims = arg(node, 1) if len(node.args) > 1 else None
    if source is None or not isinstance(dims, (list, tuple)):
        return f"{node.name} reduces every dimension"
    if [d % max(source.dim(), 1) for d in dims] != [source.dim() - 1]:
        groups = describe_channels(_node(arg(node, 0)), dims)
        which = groups or f"reduces dimensions {list(dims)} of {source.dim()}, not the last alone"
        return f"{node.name} {which}"
    if node.kwargs.get("dtype") not in (None, source.dtype):
        return f"{node.name} accumulates in {node.kwargs['dtype']}"
    return ""


def _squared(node: fx.Node) -> fx.Node | None:
    if is_call(node, aten.pow.Tensor_Scalar) and arg(node, 1) == 2:
        return _node(arg(node, 0))
    if is_call(node, aten.mul.Tensor) and arg(node, 0) is arg(node, 1):
        return _node(arg(node, 0))
    return None


def _read_centred(h: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(base, mean) when `h` is base minus its mean over the last dimension."""
    if not is_call(h, aten.sub.Tensor) or h.kwargs:
        return None
    base, mean = h.args
    if not is_call(mean, aten.mean.dim) or arg(mean, 0) is not base or _wrong_dims(mean):
        return None
    return (base, mean) if isinstance(base, fx.Node) and _is_column(mean, base) else None


def _numerator(y: fx.Node, root: _Root) -> fx.Node | None:
    """What `y` multiplies by the inverse root, or divides by the root."""
    scale = root.scale
    if not root.is_inverse:
        is_quotient = is_call(y, aten.div.Tensor) and arg(y, 1) is scale and not y.kwargs
        return _node(arg(y, 0)) if is_quotient else None
    if not is_call(y, aten.mul.Tensor) or arg(y, 0) is arg(y, 1):
        return None
    other = arg(y, 1) if arg(y, 0) is scale else arg(y, 0)
    return other if isinstance(other, fx.Node) else None


def _is_base(numerator: fx.Node, moment: _Moment) -> bool:
    if moment.op != "layer_norm":
        return peel_upcast(numerator) is peel_upcast(moment.base)
    if numerator is moment.centred:
        return True
    if not is_call(numerator, aten.sub.Tensor) or numerator.kwargs:
        return False
    base, mean = numerator.args
    if peel_upcast(base) is not peel_upcast(moment.base):
        return False
    # In a narrower dtype, the difference from the mean is rounded, and the op does not round it.
    if numerator.meta["val"].dtype != moment.base.meta["val"].dtype:
        return False
    if is_call(mean, getitem):
        is_mean = arg(mean, 0) in moment.owned and arg(mean, 1) == 1
        return is_mean and _is_column(mean, moment.base)
    return is_call(mean, aten.mean.dim) and _read_centred(numerator) is not None


def _is_column(node: fx.Node, base: fx.Node) -> bool:
    """Whether `node` has the shape of `base` with a last size of 1, and so scales whole rows."""
    column, rows = val_of(node), val_of(base)
    if column is None or rows is None or column.dim() != rows.dim():
        return False
    wanted = (*rows.shape[:-1], 1)
    return all_known(known_equal(a, b) for a, b in zip(column.shape, wanted, strict=True)) is True


def _centred_nodes(numerator: fx.Node, moment: _Moment) -> tuple[fx.Node, ...]:
    if moment.op != "layer_norm":
        return ()
    mean = arg(numerator, 1)
    return (numerator, mean) if isinstance(mean, fx.Node) else (numerator,)


def peel_upcast(node: Any) -> Any:
    """The value before a conversion to a wider floating dtype, which loses nothing."""
    source = val_of(arg(node, 0)) if is_call(node, CONVERT) else None
    if source is None or source.dtype not in FLOATS or arg(node, 1) not in FLOATS:
        return node
    if torch.promote_types(source.dtype, arg(node, 1)) != arg(node, 1):
        return node
    return arg(node, 0)


def _shared(node: fx.Node, name: str, owned: Any = ()) -> str:
    others = [user for user in node.users if user not in owned]
    if any(user.op == "output" for user in others):
        return f"{name} is also a result of the graph (saved for the backward pass)"
    return f"{name} is also read by {', '.join(user.name for user in others) or 'nothing'}"


def _node(arg: Any) -> fx.Node:
    if not isinstance(arg, fx.Node):
        raise TypeError(f"expected a node, found {arg!r}")
    return arg
