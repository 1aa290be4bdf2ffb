"""Find every tensor that a model reaches: registered, in attributes, containers or closures.

Names are paths from the model: `layers.0.attn.W_UV`, `config.scales['k']`, `act<table>` for the
variable `table` of a closure, `cached<0>` for a result that `functools.lru_cache` keeps. `resolve`
follows them. Not followed: objects of torch other than modules, generators, weak references, numpy
arrays, and memory that only C++ code holds.
"""

import functools
import gc
import re
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import FunctionType, MappingProxyType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fixpass.runtime.errors import WeightError
from fixpass.runtime.weights.targets import PLAIN, is_freed, local_part


class Held(NamedTuple):
    """A tensor or a number that a model reaches."""

    name: str
    """The path from the model."""
    value: Tensor | float
    module: str
    """The name of the innermost module on the path."""


Item = tuple[str, Any]

_ATOMS = frozenset((str, bytes, bytearray, int, bool, complex, type(None)))
_SKIPPED = frozenset(("builtins", "torch", "fixpass", "logging", "threading", "numpy", "weakref"))
"""Packages whose objects are not followed, unless they are modules, containers or functions."""
_REGISTERED = frozenset(("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"))
_CONTAINERS = frozenset((dict, OrderedDict, list, tuple, set, frozenset))


def reachable(model: nn.Module, *, module_globals: bool = False) -> Iterator[Held]:
    """Tensors and floats that `model` reaches, the nearest first; a tensor under each name.

    Args:
        model: where the search starts.
        module_globals: also global variables of the Python modules in which the classes of the
            model's modules and objects are written.

    """
    seen: dict[int, Any] = {}
    """Values that were followed. They are held, so that no new one gets the id of one."""
    waiting: deque[tuple[str, Any, str]] = deque([("", model, "")])
    while waiting:
        name, value, module = waiting.popleft()
        if isinstance(value, Tensor) or type(value) is float:
            yield Held(name, value, module)
        if type(value) is float or id(value) in seen:
            continue
        seen[id(value)] = value
        within = name if isinstance(value, nn.Module) else module
        found: list[Item] = [*_parts_of(value)]
        owner = type(value)
        if id(owner) not in seen and not _is_skipped(owner):
            seen[id(owner)] = owner
            found.extend(_of_class(owner))
            if module_globals:
                waiting.extend((part, item, "") for part, item in _of_globals(owner, seen))
        for part, item in found:
            if type(item) not in _ATOMS and not (type(item) in _CONTAINERS and not item):
                waiting.append((f"{name}{part}".removeprefix("."), item, within))


def resolve(module: nn.Module, name: str) -> tuple[Callable[[Any], None], Any]:
    """A function that sets the value of a path from `module`, and the value.

    Raises WeightError where the path leads nowhere.
    """
    tokens = _TOKEN.findall(name)
    if not tokens or "".join(token for token, *_ in tokens) not in (name, f".{name}"):
        raise WeightError(f"{name!r} is not a path such as attn.W_UV, scales['k'] or act<table>")
    owner: Any = module
    try:
        for token in tokens[:-1]:
            owner = _get(owner, *token[1:])
        last = tokens[-1][1:]
        return functools.partial(_set, owner, *last), _get(owner, *last)
    except (AttributeError, LookupError, ValueError, TypeError, StopIteration) as error:
        raise WeightError(
            f"{type(module).__name__} has no {name!r} ({error}); a value in an lru_cache has no "
            "path: call cache_clear of that function after an update"
        ) from error


# An attribute, a key or an index in brackets, or a variable of a closure.
_TOKEN = re.compile(
    r"""(\.?([A-Za-z_0-9]+)|\[((?:'(?:[^'\\]|\\.)*'|\[[^\]]*\]|[^\[\]'])+)\]|<(\w+)>)"""
)


def _get(owner: Any, attribute: str, item: str, variable: str) -> Any:
    if attribute:
        if isinstance(owner, nn.Module) and attribute in owner._modules:
            return owner._modules[attribute]
        return getattr(owner, attribute)
    return owner[_key(owner, item)] if item else _cell(owner, variable).cell_contents


def _set(owner: Any, attribute: str, item: str, variable: str, value: Any) -> None:
    if attribute:
        setattr(owner, attribute, value)
    elif item:
        owner[_key(owner, item)] = value
    else:
        _cell(owner, variable).cell_contents = value


def _key(owner: Any, item: str) -> Any:
    """The index of a sequence, or the key of a dict that prints as `item`."""
    if not isinstance(owner, dict):
        return int(item)
    return next(key for key in owner if repr(key) == item)


def _cell(function: Any, variable: str) -> Any:
    plain: Any = function.__func__ if isinstance(function, MethodType) else function
    return plain.__closure__[plain.__code__.co_freevars.index(variable)]


def _parts_of(value: Any) -> Iterable[Item]:
    """What a value holds, and how that is reached from it."""
    if isinstance(value, nn.Module):
        return _of_module(value)
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, MethodType):
        return ((".__func__", value.__func__), (".__self__", value.__self__))
    if isinstance(value, functools.partial):
        return ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    if isinstance(value, functools._lru_cache_wrapper):
        held = [item for item in gc.get_referents(value) if not isinstance(item, type)]
        return ((f"<{index}>", item) for index, item in enumerate(held))
    return (*_of_container(value), *_of_object(value))


def _of_module(module: nn.Module) -> Iterator[Item]:
    for registered in (module._parameters, module._buffers, module._modules):
        yield from ((f".{key}", item) for key, item in registered.items())
    yield from ((f".{key}", item) for key, item in vars(module).items() if key not in _REGISTERED)


def _of_function(function: FunctionType) -> Iterator[Item]:
    for variable, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=True
    ):
        try:
            yield f"<{variable}>", cell.cell_contents
        # The variable has no value yet.
        except ValueError:
            continue
    yield ".__defaults__", function.__defaults__
    yield ".__kwdefaults__", function.__kwdefaults__
    yield from ((f".{key}", item) for key, item in vars(function).items())


def _of_container(value: Any) -> Iterator[Item]:
    if isinstance(value, dict | MappingProxyType):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, list | tuple | deque):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from ((f"<{index}>", item) for index, item in enumerate(value))


def _of_object(value: Any) -> Iterator[Item]:
    """Attributes of an instance, in its dict and in slots."""
    if isinstance(value, type | ModuleType) or _is_skipped(type(value)):
        # Attributes that were set on a tensor are the user's.
        own = vars(value) if isinstance(value, Tensor) else {}
        yield from ((f".{key}", item) for key, item in own.items())
        return
    # Many objects have no dict. `vars` would run an object's own `__getattr__`, which may raise.
    with suppress(AttributeError):
        own = object.__getattribute__(value, "__dict__")
        yield from ((f".{key}", item) for key, item in own.items())
    for base in type(value).__mro__:
        for key, descriptor in vars(base).items():
            if isinstance(descriptor, MemberDescriptorType) and key != "__dict__":
                try:
                    yield f".{key}", descriptor.__get__(value)
                # The slot is empty.
                except AttributeError:
                    continue


def _of_class(owner: type) -> Iterator[Item]:
    """Attributes of a class and of its bases: caches may lie there."""
    for base in owner.__mro__:
        if _is_skipped(base):
            continue
        for key, item in vars(base).items():
            item = item.__func__ if isinstance(item, staticmethod | classmethod) else item
            if not isinstance(item, type | MemberDescriptorType):
                yield f".{key}", item


def _of_globals(owner: type, seen: dict[int, Any]) -> Iterator[Item]:
    python_module = sys.modules.get(owner.__module__)
    if python_module is None or id(python_module) in seen:
        return
    seen[id(python_module)] = python_module
    for key, item in list(vars(python_module).items()):
        if not key.startswith("__") and not isinstance(item, type | ModuleType):
            yield f"{owner.__module__}:{key}", item


def _is_skipped(owner: type) -> bool:
    return owner.__module__.partition(".")[0] in _SKIPPED


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_READABLE = frozenset((*_FLOATS, *_FLOAT8, *_INTEGERS))
"""Dtypes that torch can index, cast and compare; others are compared as bytes."""


def plain_values(value: Tensor | float) -> Tensor:
    """The values on this rank; a number as a tensor, other dtypes as bytes."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64)
    plain = local_part(value).detach()
    if plain.dtype in _READABLE or not _has_values(plain) or not plain.is_contiguous():
        return plain
    return plain.reshape(plain.shape or (1,)).view(torch.uint8)


def can_compare(plain: Tensor) -> bool:
    """Whether plain values can be read and compared."""
    return _has_values(plain) and plain.dtype in _READABLE


def place_of(value: Tensor | float) -> int:
    """The address of the memory that a tensor lies in; 0 where it has none of its own."""
    plain = local_part(value).detach() if isinstance(value, Tensor) else None
    return plain.untyped_storage().data_ptr() if plain is not None and _has_values(plain) else 0


def _has_values(plain: Tensor) -> bool:
    """Not those of subclasses, which have no memory of their own."""
    is_strided = type(plain) in PLAIN and plain.layout == torch.strided
    return is_strided and not (plain.is_meta or plain.is_quantized or is_freed(plain))
