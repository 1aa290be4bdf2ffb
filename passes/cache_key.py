"""Cache keys of a third party's objects: the hash of their source and of all their options.

A key holds the source of the class, of its bases and of the modules that they import, and the
value of every attribute. An object that cannot be described completely has no key: the reason is
given, and nothing is cached. Modules that are imported by a computed name are not seen.
"""

import ast
import ctypes
import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache, cached_property
from pathlib import Path, PurePath
from types import FunctionType, ModuleType
from typing import Any

import torch

from fixpass.passes.base import Pass

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), range, slice, PurePath)
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch._ops.OpOverload)
_SKIPPED = sys.stdlib_module_names | {"torch", "fixpass"}


class UnnamedError(Exception):
    """A value or a module that no key can hold; the message says which."""


def key_of(value: Any) -> str:
    """A text that is equal for equal values only.

    Raises:
        UnnamedError: a part of the value has no such text.

    """
    if isinstance(value, Enum) or type(value) in _PLAIN or isinstance(value, (*_TORCH, PurePath)):
        return f"{type(value).__qualname__}:{value!r}"
    if type(value) in (list, tuple, torch.Size):
        return f"{type(value).__name__}({', '.join(map(key_of, value))})"
    if type(value) in (set, frozenset):
        return f"set({', '.join(sorted(map(key_of, value)))})"
    if type(value) is dict:
        return f"dict({', '.join(f'{key_of(k)}={key_of(v)}' for k, v in value.items())})"
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, FunctionType):
        return _function(value)
    if isinstance(value, type):
        return f"{value.__qualname__} of {sources(*(base.__module__ for base in value.__mro__))}"
    if is_dataclass(value):
        return f"{key_of(type(value))}({key_of(attributes(value))})"
    if isinstance(value, re.Pattern):
        return repr(value)
    # numpy is no requirement: without it no option holds an array.
    numpy: Any = sys.modules.get("numpy")
    is_array = numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))
    if is_array and not value.dtype.hasobject:
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    raise UnnamedError(f"a {type(value).__name__}")


def pass_key(step: Pass) -> str:
    """The key of a pass: its own `cache_key`, or its options; and its source, where it has one.

    Raises:
        UnnamedError: the pass cannot be named completely.

    """
    own = step.cache_key()
    try:
        source = key_of(type(step))
    except UnnamedError:
        if own is None:
            raise
        source = type(step).__qualname__
    if own is not None:
        return f"{source} {own}"
    named = []
    for name, value in attributes(step).items():
        try:
            named.append(f"{name}={key_of(value)}")
        except (UnnamedError, RecursionError) as error:
            raise UnnamedError(f"its option {name} holds {error}") from error
    return f"{source} {named}"


def attributes(value: Any) -> dict[str, Any]:
    """Every attribute of a dataclass's instance, also those that its `repr` leaves out."""
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    for name, item in getattr(value, "__dict__", {}).items():
        if not isinstance(getattr(type(value), name, None), cached_property):
            found[name] = item
    return found


def sources(*modules: str) -> str:
    """The hash of the modules, and of all that they import."""
    digest = hashlib.sha256()
    for source in _sources([name for name in dict.fromkeys(modules) if not _is_skipped(name)]):
        digest.update(hashlib.sha256(source).digest())
    return digest.hexdigest()


def _sources(names: list[str]) -> Iterator[bytes]:
    own = {name.partition(".")[0] for name in names}
    for name in names:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if module is None or file is None or not Path(file).is_file():
            if getattr(module, "__path__", None):
                continue  # A namespace package has no code.
            raise UnnamedError(f"module {name}, which has no source file")
        source, imports = _read(file, Path(file).stat().st_mtime_ns)
        yield source
        # Another installed package counts with the modules that are imported directly.
        if name.partition(".")[0] in own or "site-packages" not in Path(file).parts:
            found = (inner for item in imports for inner in _loaded(module, *item))
            names += dict.fromkeys(inner for inner in found if inner not in names)


@cache
def _read(file: str, _: int) -> tuple[bytes, tuple[tuple[str, int], ...]]:
    """The bytes of a file, and the modules that it may import with their levels of dots."""
    source = Path(file).read_bytes()
    if not file.endswith(".py"):
        return source, ()
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found.append((base, node.level))
            found += [(f"{base}.{alias.name}".strip("."), node.level) for alias in node.names]
    return source, tuple(dict.fromkeys(found))


def _loaded(module: ModuleType, name: str, level: int) -> Iterator[str]:
    """The loaded modules that an import statement of `module` names, packages included."""
    if level:
        parts = (module.__package__ or "").split(".")
        name = ".".join([*parts[: len(parts) - level + 1], *([name] if name else [])])
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        found = ".".join(parts[:end])
        if found in sys.modules and not _is_skipped(found):
            yield found


def _is_skipped(name: str) -> bool:
    return name.partition(".")[0] in _SKIPPED


def _tensor(value: torch.Tensor) -> str:
    is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_quantized
    if not is_plain or value.layout != torch.strided or value.is_meta:
        raise UnnamedError(f"a {type(value).__name__} whose values are not at hand")
    dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    data = ctypes.string_at(dense.data_ptr(), dense.numel() * dense.itemsize)
    layout = (value.dtype, tuple(value.shape), value.stride(), value.device)
    return f"{layout} {hashlib.sha256(data).hexdigest()}"


def _function(value: FunctionType) -> str:
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    parts = [value.__defaults__, value.__kwdefaults__, *cells]
    place = f"{value.__qualname__}:{value.__code__.co_firstlineno}"
    return f"{place} {sources(value.__module__)} {key_of(parts)}"
