"""Triton's interpreter as a context: kernels compiled before and after it are untouched.

TRITON_INTERPRET decides at import for a whole process. The context
switches `@triton.jit` functions to the interpreter on entry and back on exit.
The context also corrects the interpreter:
float32 becomes bfloat16 by rounding to the nearest, where Triton 3.7 truncates.

It records nothing by itself (see trace.py), and calls no kernel.
"""

import ast
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, Protocol

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

MISSING = object()


class Watcher(Protocol):
    """Receives every launch, and decides about every access."""

    def launch(self, kernel: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None: ...
    def start_program(self, program: int) -> None: ...
    def access(self, kind: str, addresses: Any, mask: Any, itemsize: int) -> Any: ...


@contextmanager
def interpreted(watcher: Watcher) -> Iterator[None]:
    """Run every kernel launched inside in the interpreter, with `watcher` told of each access."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernel_memory interprets by itself: unset TRITON_INTERPRET")
    builder = interpreter.interpreter_builder
    patches = _Patches()
    try:
        vars(triton.knobs.runtime)["interpret"] = True  # assigning would set the environment
        patches.set(builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False))
        patches.set(JITFunction, "run", _runner(watcher))
        patches.set(JITFunction, "__call__", lambda self, *a, **k: _body(self)(*a, **k))
        _correct_arithmetic(patches)
        _watch_memory(patches, watcher)
        scope = interpreter._patch_lang(_sees_the_language)
        try:
            with np.errstate(all="ignore"):
                yield
        finally:
            scope.restore()
    finally:
        vars(triton.knobs.runtime).pop("interpret", None)
        patches.undo()


class _Patches:
    def __init__(self) -> None:
        self.changes: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        self.changes.append((owner, name, vars(owner).get(name, MISSING)))
        setattr(owner, name, value)

    def undo(self) -> None:
        for owner, name, before in reversed(self.changes):
            if before is MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self.changes.clear()


def _sees_the_language() -> tuple[Any, Any]:
    """The interpreter patches the language modules it finds among a function's globals."""
    return tl, core


core = tl.core
_bodies: dict[Any, Any] = {}  # by function: the hash of a JITFunction reads the language


def _body(jit: JITFunction) -> Any:
    """The Python function the interpreter runs, in a copy of the kernel's globals."""
    if jit.fn not in _bodies:
        tree = interpreter.ASTTransformer().visit(ast.parse(jit.src))
        ast.fix_missing_locations(tree)
        decorators = next(i for i, line in enumerate(jit.raw_src) if line.lstrip()[:4] == "def ")
        ast.increment_lineno(tree, jit.starting_line_number + decorators - 1)
        namespace = {**vars(interpreter), **jit.get_capture_scope()}
        exec(compile(tree, inspect.getfile(jit.fn), "exec"), namespace)
        _bodies[jit.fn] = namespace[jit.fn.__name__]
    return _bodies[jit.fn]


def _runner(watcher: Watcher) -> Any:
    def run(jit: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if warmup:
            return
        named = {name: value for name, value in kwargs.items() if name in jit.arg_names}
        bound = jit.signature.bind(*args, **named)
        bound.apply_defaults()
        sizes = grid(bound.arguments) if callable(grid) else grid
        sizes = (*sizes, *(1,) * (3 - len(sizes)))
        watcher.launch(jit.fn.__name__, sizes, bound.arguments)
        constants = {param.name for param in jit.params if param.is_constexpr}
        converted = {
            name: value if name in constants else interpreter._implicit_cvt(value)
            for name, value in bound.arguments.items()
        }
        builder, body = interpreter.interpreter_builder, _body(jit)
        builder.set_grid_dim(*sizes)
        for program, index in enumerate(product(*map(range, sizes))):
            builder.set_grid_idx(*index)
            watcher.start_program(program)
            body(**converted)

    return run


def _watch_memory(patches: _Patches, watcher: Watcher) -> None:
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def seen(kind: str, pointers: Any, mask: Any) -> Any:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        return interpreter.TensorHandle(watcher.access(kind, pointers.data, mask, size), tl.int1)

    def watched_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **more: Any) -> Any:
        return load(self, ptrs, seen("load", ptrs, mask.data), other, *rest, **more)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        return store(self, ptrs, value, seen("store", ptrs, mask.data), *rest, **more)

    def watched_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        return rmw(self, op, ptr, val, seen("atomic", ptr, mask.data), *rest)

    def watched_cas(self: Any, ptr: Any, compare: Any, val: Any, *rest: Any) -> Any:
        safe = seen("atomic", ptr, np.ones_like(ptr.data, dtype=bool))
        if not safe.data.all():  # an unmasked operation outside storage cannot be performed
            return compare
        return cas(self, ptr, compare, val, *rest)

    patches.set(builder, "create_masked_load", watched_load)
    patches.set(builder, "create_masked_store", watched_store)
    patches.set(builder, "create_atomic_rmw", watched_rmw)
    patches.set(builder, "create_atomic_cas", watched_cas)


def bf16_bits(values: Any) -> Any:
    """The bfloat16 nearest to each float32, ties to even, as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    quiet_nan = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(values), quiet_nan, rounded)


def bf16_values(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _correct_arithmetic(patches: _Patches) -> None:
    builder = interpreter.InterpreterBuilder
    cast, convert, binary = builder.cast_impl, builder.create_fp_to_fp, builder.binary_op

    def corrected_cast(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source != tl.bfloat16 and target != tl.bfloat16:
            return cast(self, src, dst_type)
        values = bf16_values(src.data) if source == tl.bfloat16 else src.data.astype(np.float32)
        if target == tl.bfloat16:
            return interpreter.TensorHandle(bf16_bits(values), target)
        return interpreter.TensorHandle(values.astype(interpreter._get_np_dtype(target)), target)

    def corrected_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return corrected_cast(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def corrected_binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16 or rhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        result = op(bf16_values(lhs.data), bf16_values(rhs.data))
        data = result if result.dtype == np.bool_ else bf16_bits(result)
        return interpreter.TensorHandle(data, lhs.dtype.scalar)

    patches.set(builder, "cast_impl", corrected_cast)
    patches.set(builder, "create_fp_to_fp", corrected_fp_to_fp)
    patches.set(builder, "binary_op", corrected_binary)
