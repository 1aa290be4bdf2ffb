"""Run an opaque norm kernel in eager code, with its operands laid out as its contract asks.

`wrapped` gives the wrapper. It plans a call once for each combination of layouts and remembers
the plan, so that a call whose contract holds costs one more Python call. The planner is handed in:
nothing here knows a contract. Dynamo sees the kernel itself, because passes serve compiled graphs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fixpass.runtime import ops
from fixpass.runtime.errors import KernelError
from fixpass.runtime.opaque_norms import READ, ROWS, SENSITIVE, WRITTEN, OpaqueNorm

# Layouts remembered for one kernel: serving meets a new one with each new number of tokens.
MOST_PLANS = 4096
# A base address matters to kernels at most modulo so many elements: vectors have 16 bytes.
OFFSETS = 16
PARAMETERS = ("weight", "bias")


@dataclass(frozen=True)
class CallPlan:
    """The change that makes a call legal: roles to copy dense, and whether rows are viewed 2-D."""

    copied: frozenset[str] = frozenset()
    as_rows: bool = False


NOTHING = CallPlan()
"""The kernel's contract holds."""
MISSING: Any = object()

Planner = Callable[[Mapping[str, Tensor]], CallPlan | None]
"""From operands by role to the plan; None where no layout makes the kernel right."""


def wrapped(
    kernel: Callable[..., Any], call: OpaqueNorm, plan: Planner, *, aligned: bool = False
) -> Callable[..., Any]:
    """`kernel` for operands of any shape and strides; where it has no plan, the reference runs.

    x is (..., hidden_size); residual, out and total have as many rows as x, in any shape. Raises
    KernelError where they have not: a kernel would read or write behind their end.
    aligned: the kernel's contract asks where in its storage a row operand starts.
    """
    rows = tuple(dict.fromkeys(call.position(role) for role in ROWS if role in call.roles))
    read = _reader(call, rows, aligned)
    plans: dict[Any, CallPlan | None] = {}

    @wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        # Dynamo sees the kernel itself, for the passes to find.
        if is_dynamo_compiling():
            return kernel(*args, **kwargs)
        if kwargs:
            args, kwargs = _positional(call, args, kwargs)
        try:
            key = read(args)
            found = plans.get(key, MISSING)
        except (AttributeError, IndexError, TypeError):
            # An operand is missing or no tensor, which the kernel says in its own words; or a size
            # is symbolic, and nothing is known.
            return kernel(*args, **kwargs)
        if found is NOTHING:
            return kernel(*args, **kwargs)
        if found is MISSING:
            found = _remember(plans, key, plan(_operands(call, args)))
        return _run(kernel, call, found, args, kwargs)

    return run


Reader = Callable[[tuple[Any, ...]], tuple[Any, ...]]


def _reader(call: OpaqueNorm, rows: tuple[int, ...], aligned: bool) -> Reader:
    """The key of a call's layouts. Written out, because a loop costs half as much again."""
    weight = call.position("weight")
    # Three rows read the first twice: nothing is lost but a little time.
    first, second, third, fourth = (*rows, *[rows[0]] * (4 - len(rows)))

    def one(args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, w = args[first], args[weight]
        return x.shape, x.stride(), x.dtype, w.dtype, w.stride(), w.storage_offset() % OFFSETS

    def two(args: tuple[Any, ...]) -> tuple[Any, ...]:
        a, b, w = args[first], args[second], args[weight]
        return (
            a.shape, a.stride(), a.dtype, b.shape, b.stride(), b.dtype, w.dtype, w.stride(),
            w.storage_offset() % OFFSETS,
        )  # fmt: skip

    def four(args: tuple[Any, ...]) -> tuple[Any, ...]:
        a, b, c, d, w = args[first], args[second], args[third], args[fourth], args[weight]
        return (
            a.shape, a.stride(), a.dtype, b.shape, b.stride(), b.dtype, c.shape, c.stride(),
            c.dtype, d.shape, d.stride(), d.dtype, w.dtype, w.stride(),
            w.storage_offset() % OFFSETS,
        )  # fmt: skip

    read: Reader = one if len(rows) == 1 else two if len(rows) == 2 else four
    read = _with_bias(read, call.position("bias")) if "bias" in call.roles else read
    return _with_offsets(read, rows) if aligned else read


def _with_bias(read: Reader, position: int) -> Reader:
    def biased(args: tuple[Any, ...]) -> tuple[Any, ...]:
        b = args[position]
        if b is None:
            return read(args)
        return (*read(args), b.dtype, b.stride(), b.storage_offset() % OFFSETS)

    return biased


def _with_offsets(read: Reader, rows: tuple[int, ...]) -> Reader:
    def aligned(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*read(args), *[args[row].storage_offset() % OFFSETS for row in rows])

    return aligned


def _remember(plans: dict[Any, CallPlan | None], key: Any, plan: CallPlan | None) -> Any:
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = NOTHING if plan == NOTHING else plan
    return plans[key]


def _positional(
    call: OpaqueNorm, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with each parameter that follows without a gap by position."""
    left = dict(kwargs)
    moved = list(args)
    for name in call.arguments[len(args) :]:
        if name not in left:
            break
        moved.append(left.pop(name))
    return tuple(moved), left


def _operands(call: OpaqueNorm, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """The tensors of a call by role."""
    given = {role: args[call.position(role)] for role in call.roles if role != "eps"}
    return {role: value for role, value in given.items() if value is not None}


def _run(
    kernel: Callable[..., Any],
    call: OpaqueNorm,
    plan: CallPlan | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if plan is None:
        return _run_reference(call, args, kwargs)
    if plan is NOTHING:
        return kernel(*args, **kwargs)
    return _run_relaid(kernel, call, plan, args, kwargs)


def _run_relaid(
    kernel: Callable[..., Any],
    call: OpaqueNorm,
    plan: CallPlan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Copy, view, call, and give what was written and returned its own shape again."""
    given, laid = _operands(call, args), list(args)
    for role in PARAMETERS:
        if role in plan.copied:
            laid[call.position(role)] = given[role].clone(memory_format=torch.contiguous_format)
    done: set[int] = set()
    for role in ROWS:
        position = call.position(role) if role in given else -1
        # An operand that is read and written is laid out once, as the one that is read.
        if position >= 0 and position not in done:
            laid[position] = _laid_out(given[role], plan, role)
            done.add(position)
    result = kernel(*laid, **kwargs)
    for role in WRITTEN:
        if role in given and laid[call.position(role)].data_ptr() != given[role].data_ptr():
            given[role].copy_(laid[call.position(role)].view(given[role].shape))
    return _given_back(result, args, laid, given["x"])


def _laid_out(x: Tensor, plan: CallPlan, role: str) -> Tensor:
    if role in plan.copied:
        # What is only written has nothing to copy.
        empty = role in WRITTEN
        x = x.new_empty(x.shape) if empty else x.clone(memory_format=torch.contiguous_format)
    return x.view(_num_rows(x), x.shape[-1]) if plan.as_rows else x


def _given_back(result: Any, args: tuple[Any, ...], laid: list[Any], x: Tensor) -> Any:
    """What the kernel returned: arguments as the caller gave them, rows in the shape of x."""
    if isinstance(result, (tuple, list)):
        return type(result)(_given_back(part, args, laid, x) for part in result)
    for mine, theirs in zip(args, laid, strict=True):
        if result is theirs:
            return mine
    if not isinstance(result, Tensor) or result.dim() == x.dim():
        return result
    return result.view(*x.shape[:-1], result.shape[-1])


def _run_reference(call: OpaqueNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the op means, for operands that the kernel cannot be given: also no rows at all."""
    given = _operands(call, args)
    x = given["x"]
    _check_rows(call, given)
    _check_known(call, args, kwargs)
    rows = [given[role].reshape(_num_rows(x), x.shape[-1]) for role in READ if role in given]
    named = {**dict(zip(call.arguments, args, strict=False)), **kwargs}
    eps = named.get(call.eps, call.default_eps)
    steps = call.steps(x.dtype, named)
    results = ops.REFERENCES[call.op](*rows, given["weight"], given.get("bias"), eps, **steps)
    results = results if isinstance(results, tuple) else (results,)
    if "out" not in given:
        shaped = tuple(result.view(x.shape) for result in results)
        return shaped if len(shaped) > 1 else shaped[0]
    for role, result in zip(WRITTEN, results, strict=False):
        given[role].copy_(result.view(given[role].shape))
    return None


def _check_known(call: OpaqueNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where an argument asks for what the reference does not know."""
    known = {*call.roles.values(), SENSITIVE, *call.ignored}
    named = {**dict(zip(call.arguments, args, strict=False)), **kwargs}
    for name, value in named.items():
        if name not in known and (isinstance(value, Tensor) or value):
            raise KernelError(
                f"{call.op}: the kernel's contract does not hold, and the reference does not know "
                f"{name}: lay the operands out as dense rows, or leave it out"
            )


def _check_rows(call: OpaqueNorm, given: Mapping[str, Tensor]) -> None:
    wanted = given["x"].numel(), given["x"].shape[-1:]
    for role in ROWS:
        if role in given and (given[role].numel(), given[role].shape[-1:]) != wanted:
            shapes = f"{tuple(given[role].shape)}, and x {tuple(given['x'].shape)}"
            raise KernelError(
                f"{call.op}: {role} ({call.roles[role]}) has the shape {shapes}: give both the "
                "same number of rows of one size"
            )


def _num_rows(x: Tensor) -> int:
    """Counted, because -1 says nothing where the rows are empty."""
    return math.prod(x.shape[:-1])
