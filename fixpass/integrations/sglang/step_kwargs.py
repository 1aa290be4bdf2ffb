"""Which keywords a function takes, and where its `**kwargs` end up.

A signature with `**kwargs` promises nothing: often they are passed on to a function that takes
few. So the source of the function is parsed for calls with `**kwargs`, of a name or of attributes
of a name: `step(x, **kwargs)`, `self.scheduler.step(x, **kwargs)`. After any other use (a copy, a
loop, a nested function) the answer is None, not True. Nothing is called.
"""

import ast
import builtins
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fixpass.runtime.modules import unwrapped

Path = tuple[str, ...]


@dataclass(frozen=True)
class Forwards:
    """How a function uses its `**kwargs`."""

    callees: tuple[tuple[Path, frozenset[str]], ...]
    """Dotted names that get all of them, each with the other keywords of that call."""
    read: frozenset[str]
    """Keywords that the function itself takes out of them."""


# Functions that pass keywords on to functions that pass them on; a cycle ends here too.
DEPTH = 8

_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class AcceptedKwargs:
    """The keywords that a function takes."""

    names: frozenset[str]
    """The keywords in its signature."""
    var_keyword: bool = False
    """Whether it has `**kwargs`."""
    inner: "AcceptedKwargs | None" = None
    """The keywords of the function that gets `**kwargs`; None where that is not known."""
    ignored: bool = False
    """Whether `**kwargs` are taken and not used."""

    def accepts(self, name: str) -> bool | None:
        """Whether a call with the keyword `name` is taken; None where that is not known."""
        if name in self.names or self.ignored:
            return True
        if not self.var_keyword:
            return False
        return None if self.inner is None else self.inner.accepts(name)

    @property
    def strict(self) -> bool | None:
        """Whether an unknown keyword is refused in the end; None where that is not known."""
        if self.ignored:
            return False
        if not self.var_keyword:
            return True
        return None if self.inner is None else self.inner.strict


@dataclass(frozen=True)
class _Signature:
    names: tuple[str, ...]
    positional: tuple[str, ...]
    var_keyword: bool
    forwards: Forwards | None


# A weak key: an id() is used again by the next function, and would find what was the last one's.
_SIGNATURES: WeakKeyDictionary[Callable[..., Any], _Signature] = WeakKeyDictionary()


def accepted_kwargs(function: Callable[..., Any]) -> AcceptedKwargs:
    """The keywords of a function, method, partial, callable object or module, wrapped or not.

    Example:
        `accepted_kwargs(scheduler.step).accepts("generator")` is True, False or None for unknown.

    """
    return _accepted(function, DEPTH)


def _accepted(function: Callable[..., Any], depth: int) -> AcceptedKwargs:
    found = _underlying(function)
    if found is None or depth == 0:
        return AcceptedKwargs(frozenset(), var_keyword=True)
    plain, bound, taken = found
    signature = _signature(plain)
    if signature is None:
        return AcceptedKwargs(frozenset(), var_keyword=True)
    # An argument that is given by position cannot be given by name.
    gone = signature.positional[: len(bound)]
    names = frozenset(signature.names).difference(gone) | taken
    if not signature.var_keyword:
        return AcceptedKwargs(names)
    known = dict(zip(signature.positional, bound, strict=False))
    return _through(plain, names, signature.forwards, known, depth)


def _through(
    plain: Callable[..., Any],
    names: frozenset[str],
    passed: Forwards | None,
    known: Mapping[str, Any],
    depth: int,
) -> AcceptedKwargs:
    """Follow `**kwargs` to the one function that they are passed to, if that can be seen."""
    if passed is None:
        return AcceptedKwargs(names, var_keyword=True)
    names |= passed.read
    if not passed.callees:
        return AcceptedKwargs(names, var_keyword=True, ignored=True)
    inner = None
    for callee, given in passed.callees:
        target = resolve(callee, plain, known)
        if target is None:
            return AcceptedKwargs(names, var_keyword=True)
        one = _accepted(target, depth - 1)
        # What the call gives by itself cannot be given again.
        one = AcceptedKwargs(one.names - given, one.var_keyword, one.inner, one.ignored)
        inner = one if inner is None else _both(inner, one)
    return AcceptedKwargs(names, var_keyword=True, inner=inner)


def _both(left: AcceptedKwargs, right: AcceptedKwargs) -> AcceptedKwargs | None:
    """The keywords that two functions both take; None where AcceptedKwargs cannot express them."""
    if left.strict and right.strict and not (left.var_keyword or right.var_keyword):
        return AcceptedKwargs(left.names & right.names)
    return left if left == right else None


def _underlying(
    function: Callable[..., Any],
) -> tuple[Callable[..., Any], tuple[Any, ...], frozenset[str]] | None:
    """The plain function behind a callable, its bound arguments, and keywords of partials."""
    bound: tuple[Any, ...] = ()
    taken: frozenset[str] = frozenset()
    for _ in range(4 * DEPTH):
        if isinstance(function, functools.partial):
            bound, taken = (*function.args, *bound), taken | frozenset(function.keywords)
            function = function.func
        elif inspect.ismethod(function):
            bound, function = (function.__self__, *bound), function.__func__
        elif isinstance(function, nn.Module):
            function = unwrapped(function).forward
        elif inspect.isfunction(function):
            inner = inspect.unwrap(function)
            if inner is function:
                return function, bound, taken
            function = inner
        elif inspect.isclass(function):
            bound, function = (None, *bound), function.__init__
        elif inspect.ismethod(call := getattr(function, "__call__", None)):  # noqa: B004
            function = call
        else:
            break
    return None


def _signature(plain: Callable[..., Any]) -> _Signature | None:
    found = _SIGNATURES.get(plain)
    if found is None:
        try:
            parameters = inspect.signature(plain).parameters.values()
        except (TypeError, ValueError):
            return None
        var = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
        positional = (inspect.Parameter.POSITIONAL_ONLY, _KEYWORD[0])
        found = _Signature(
            tuple(p.name for p in parameters if p.kind in _KEYWORD),
            tuple(p.name for p in parameters if p.kind in positional),
            bool(var),
            forwards(plain, var[0]) if var else None,
        )
        _SIGNATURES[plain] = found
    return found


def forwards(function: Callable[..., Any], kwargs: str) -> Forwards | None:
    """How `function` uses its `**kwargs`; None where the source does not show it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    definition = next((node for node in ast.walk(tree) if isinstance(node, _DEFINITIONS)), None)
    if definition is None:
        return None
    callees: list[tuple[Path, frozenset[str]]] = []
    read: set[str] = set()
    understood = 0
    for node in ast.walk(definition):
        if isinstance(node, ast.Call) and any(_passes(word, kwargs) for word in node.keywords):
            path = _path(node.func)
            if path is None:
                return None
            callees.append((path, frozenset(word.arg for word in node.keywords if word.arg)))
            understood += 1
        elif (key := _key(node, kwargs)) is not None:
            read.add(key)
            understood += 1
    uses = sum(isinstance(node, ast.Name) and node.id == kwargs for node in ast.walk(definition))
    return Forwards(tuple(callees), frozenset(read)) if uses == understood else None


def resolve(path: Path, function: Callable[..., Any], known: Mapping[str, Any]) -> Any:
    """The callable that a dotted name in `function` means; None where that is not known.

    `known` are arguments that are bound already, such as self.
    """
    assert isinstance(function, FunctionType)
    scope = {**vars(builtins), **function.__globals__, **_closure(function), **known}
    first, *rest = path
    # An argument hides a global of its name, and is not known before the call.
    code = function.__code__
    if first not in known and first in code.co_varnames:
        return None
    found = scope.get(first)
    for name in rest:
        if found is None:
            return None
        found = getattr(found, name, None)
    return found if callable(found) else None


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _passes(word: ast.keyword, kwargs: str) -> bool:
    return word.arg is None and isinstance(word.value, ast.Name) and word.value.id == kwargs


def _path(node: ast.expr) -> Path | None:
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        path = _path(node.value)
        return None if path is None else (*path, node.attr)
    return None


def _key(node: ast.AST, kwargs: str) -> str | None:
    """The keyword "x" of `kwargs.get("x")`, `kwargs.pop("x")` or `kwargs["x"]`."""
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=found), attr="get" | "pop"),
            args=[ast.Constant(value=str(key)), *_],
        ) if found == kwargs:
            return key
        case ast.Subscript(value=ast.Name(id=found), slice=ast.Constant(value=str(key))) if (
            found == kwargs
        ):
            return key
    return None


def _closure(function: FunctionType) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    found = {}
    for name, cell in cells:
        try:
            found[name] = cell.cell_contents
        except ValueError:
            # A variable that is assigned later.
            continue
    return found
