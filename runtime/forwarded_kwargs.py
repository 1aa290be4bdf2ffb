"""Where a function passes its `**kwargs` on, read from its source.

Seen are calls with `**kwargs` of a name, or of attributes of a name: `step(x, **kwargs)`,
`self.scheduler.step(x, **kwargs)`. Any other use (a copy, a loop, a nested function) means that
nothing is known. The source is parsed, never run.
"""

import ast
import builtins
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

Path = tuple[str, ...]


@dataclass(frozen=True)
class Forwards:
    """What becomes of `**kwargs`.

    callees: dotted names that get all of them, each with the keywords that the call gives too.
    read: keywords that the function itself takes out of them.
    """

    callees: tuple[tuple[Path, frozenset[str]], ...]
    read: frozenset[str]


def forwards(function: Callable[..., Any], kwargs: str) -> Forwards | None:
    """What `function` does with its `**kwargs`; None where the source does not show it."""
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
    """The keyword that `kwargs.get("x")`, `kwargs.pop("x")` or `kwargs["x"]` is about."""
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
