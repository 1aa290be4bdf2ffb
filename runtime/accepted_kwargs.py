"""Which keywords a function takes, and where its `**kwargs` end up.

A signature that says `**kwargs` promises nothing: often they are passed on to a function that
takes few. What the source shows of that is followed; what it does not show is None, not True.
Nothing is called.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fixpass.runtime.forwarded_kwargs import Forwards, forwards, resolve
from fixpass.runtime.modules import unwrapped

# Functions that pass keywords on to functions that pass them on; a cycle ends here too.
DEPTH = 8

_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class AcceptedKwargs:
    """The keywords of a function.

    names: those in its signature. var_keyword: it has `**kwargs`. inner: what those are passed on
    to takes; None where that is not known, or where there is no `**kwargs`. ignored: they are
    taken and used for nothing.
    """

    names: frozenset[str]
    var_keyword: bool = False
    inner: "AcceptedKwargs | None" = None
    ignored: bool = False

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
    """The keywords of a function, method, partial, callable object or module, wrapped or not."""
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
    """What two functions both take, where that can be written down."""
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
