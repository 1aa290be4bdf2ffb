"""`derive`: declare a tensor as a function of weights, which each update then computes again.

    derive(attention, "W_UV", split_values, of=["kv_b_proj.weight"])

An update computes the new values before it changes a byte, from a copy of the weights with the
update's bytes in it. So an error of the function leaves all as it was, in every mode. The commit
copies the new values into the memory that is there.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fixpass.runtime.errors import UpdateError, WeightError
from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights.files import Batch
from fixpass.runtime.weights.options import Options
from fixpass.runtime.weights.reachable import resolve
from fixpass.runtime.weights.read import Work
from fixpass.runtime.weights.targets import MemoryRanges, WeightTarget, local_part, same_part

Value = Tensor | float
Function = Callable[..., Value]


@dataclass(frozen=True)
class Derivation:
    """A declared tensor or number: where it is, and how it follows from weights."""

    order: int
    """Derivations are refreshed in the order of their declaration."""
    name: str
    function: Function
    of: tuple[str, ...]


class _Derivations(dict[str, Derivation]):
    """The derivations of a module, in its dict: they live as long as the module.

    Copies and pickles of the module have none, as functions need not be picklable.
    """

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Derivations, ()


_KEY = "_fixpass_derivations"
_COUNT = itertools.count()

DECLARED: WeakSet[nn.Module] = WeakSet()
"""Modules with derivations."""
SEARCHED: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""The tensors of a model that updates leave stale, see stale. A declaration changes them."""


def derive(module: nn.Module, name: str, fn: Function, of: Sequence[str]) -> None:
    """Declare that a tensor of `module` is a function of weights, and compute it.

    From now on each `load`, `update` and `reload` that writes one of the weights also refreshes
    the tensor: in place, at the same address, in the same transaction. A number is set again.
    Declaring a name again replaces the function.

    Args:
        module: the module that the names start from.
        name: the path of the tensor or number, as `census` prints it: "W_UV", "config.scale",
            "tables['cos']", "act<table>" for a variable of a closure. An attribute that is not
            there is made.
        fn: called with the tensors of `of`, without gradients; it returns the value, with the same
            shape and dtype each time. It should not hold the module.
        of: paths of the weights, or of tensors that were declared before.

    Raises:
        WeightError: a path leads nowhere, the value does not fit the tensor, or the tensor is a
            view of a weight, which follows by itself.

    Example:
        >>> derive(attn, "scale_inv", lambda scale: 1 / scale, of=["scale"])

    """
    found = Derivation(next(_COUNT), name, fn, tuple(of))
    sources = _sources(module, found)
    value = _computed(found, sources)
    if name.isidentifier() and not _has(module, name):
        setattr(module, name, value)
    held = resolve(module, name)[1]
    if isinstance(held, Tensor) and MemoryRanges.of(sources).holds(held):
        raise WeightError(f"{name!r} is a view of one of {', '.join(of)}: it follows by itself")
    _Refresh(module, found, held, _fitting(module, found, held, value)).put(value)
    vars(module).setdefault(_KEY, _Derivations())[name] = found
    DECLARED.add(module)
    SEARCHED.clear()


def declared(module: nn.Module) -> list[Derivation]:
    """The derivations of a module."""
    return list(vars(module).get(_KEY, {}).values())


def declared_in(model: nn.Module) -> tuple[set[int], set[str]]:
    """The ids of the tensors that were declared in a model's modules, and the paths of all."""
    ids, names = set(), set()
    for path, module in model.named_modules() if DECLARED else ():
        for one in declared(module):
            ids.add(id(resolve(module, one.name)[1]))
            names.add(f"{path}.{one.name}".removeprefix("."))
    return ids, names


def without_declared(
    model: nn.Module, live: Sequence[WeightTarget], options: Options
) -> tuple[list[WeightTarget], Options]:
    """The targets of a checkpoint without declared tensors, which a checkpoint may have or not."""
    ids, _ = declared_in(model)
    names = [target.name for target in live if id(target.tensor) in ids]
    if not names:
        return list(live), options
    mapping = replace(options.mapping, filters=(*options.mapping.filters, *names))
    kept = [target for target in live if target.name not in names]
    return kept, replace(options, mapping=mapping)


def _has(module: nn.Module, name: str) -> bool:
    registered = (module._parameters, module._buffers, module._modules, vars(module))
    return any(name in held for held in registered) or name in dir(type(module))


def _sources(module: nn.Module, derivation: Derivation) -> list[Tensor]:
    found = [resolve(module, name)[1] for name in derivation.of]
    if bad := [n for n, t in zip(derivation.of, found, strict=True) if not isinstance(t, Tensor)]:
        raise WeightError(f"{derivation.name!r} is derived of {', '.join(bad)}, which is no tensor")
    return found


def _computed(derivation: Derivation, sources: Sequence[Tensor]) -> Value:
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
        value = derivation.function(*(source.detach() for source in sources))
        return value.detach().clone() if isinstance(value, Tensor) else value


def _fitting(module: nn.Module, derivation: Derivation, held: Value, value: Value) -> Value:
    """`value`, if it can replace `held`; else raises WeightError."""
    what = f"{type(module).__name__}: {derivation.name!r} is {_facts(held)}, and its function gives"
    if isinstance(held, Tensor) is not isinstance(value, Tensor) or _facts(held) != _facts(value):
        raise WeightError(f"{what} {_facts(value)}")
    return value


def _facts(value: Value) -> str:
    if not isinstance(value, Tensor):
        return "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    sharded = f", {value.placements}" if isinstance(value, DTensor) else ""
    return f"{value.dtype} {tuple(value.shape)} on {value.device}{sharded}"


class _Refresh(NamedTuple):
    """A new value that waits to take its place."""

    module: nn.Module
    derivation: Derivation
    held: Value
    value: Value

    def put(self, value: Value) -> None:
        """Copy a tensor `value` into `held`; otherwise set `value` under its name."""
        if isinstance(self.held, Tensor) and isinstance(value, Tensor):
            # torch writes a tensor of inference mode only in that mode.
            with torch.inference_mode(self.held.is_inference()), torch.no_grad():
                local_part(self.held).copy_(local_part(value))
        else:
            resolve(self.module, self.derivation.name)[0](value)


class Staged:
    """The new values of derived tensors, computed before an update changes a byte."""

    def __init__(self, written: Iterable[Tensor], work: Work) -> None:
        """Compute them. Raises UpdateError where a function raises or its value does not fit."""
        self._refreshes: list[_Refresh] = []
        changed = {id(tensor) for tensor in written}
        new: dict[int, Tensor] = {}
        pairs = [(one, module) for module in list(DECLARED) for one in declared(module)]
        for derivation, module in sorted(pairs, key=lambda pair: pair[0].order):
            sources = _sources(module, derivation)
            if changed.isdisjoint(map(id, sources)):
                continue
            fresh = [source for source in sources if id(source) in changed - new.keys()]
            new.update(zip(map(id, fresh), _with_update(fresh, work), strict=True))
            self._refreshes.append(self._computed(module, derivation, sources, new))
            held, value = self._refreshes[-1][2:]
            if isinstance(held, Tensor) and isinstance(value, Tensor):
                changed.add(id(held))
                new[id(held)] = value

    def _computed(
        self,
        module: nn.Module,
        derivation: Derivation,
        sources: Sequence[Tensor],
        new: dict[int, Tensor],
    ) -> _Refresh:
        what = f"{type(module).__name__}: {derivation.name!r}, of {', '.join(derivation.of)}, "
        try:
            value = _computed(derivation, [new.get(id(source), source) for source in sources])
            held = resolve(module, derivation.name)[1]
            return _Refresh(module, derivation, held, _fitting(module, derivation, held, value))
        except Exception as error:
            raise UpdateError(
                f"{what}could not be derived ({type(error).__name__}: {error}): nothing was changed"
            ) from error

    def names(self, model: nn.Module) -> tuple[str, ...]:
        """The names of the derived tensors in a model; of the class, where they are not in it."""
        paths = {id(module): path for path, module in unwrapped(model).named_modules()}
        return tuple(
            f"{paths.get(id(refresh.module), type(refresh.module).__name__)}."
            f"{refresh.derivation.name}".removeprefix(".")
            for refresh in self._refreshes
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the new values in place; bring the old ones back where the context raises."""
        old = [r.held.clone() if isinstance(r.held, Tensor) else r.held for r in self._refreshes]
        try:
            for refresh in self._refreshes:
                refresh.put(refresh.value)
            yield
        except BaseException:
            for refresh, value in zip(self._refreshes, old, strict=True):
                refresh.put(value)
            raise


def _with_update(tensors: Sequence[Tensor], work: Work) -> list[Tensor]:
    """Copies of some live tensors with the bytes that an update will write."""
    storages = (local_part(tensor).untyped_storage() for tensor in tensors)
    copies = {storage.data_ptr(): storage.clone() for storage in storages}

    def place(tensor: Tensor) -> Tensor:
        copy = copies.get(tensor.untyped_storage().data_ptr())
        return torch.empty(0) if copy is None else same_part(tensor, copy)

    wanted = {
        position
        for position, tensor in enumerate(work.tensors)
        if tensor.untyped_storage().data_ptr() in copies
    }
    parts = [copy for copy in work.copies if copy.position in wanted]
    batches = [part for batch in work.batches for part in _parts_of(batch, wanted)]
    replace(work, batches=batches, copies=parts).elsewhere(place).run(threads=1)
    return [_like(tensor, place(local_part(tensor).detach())) for tensor in tensors]


def _parts_of(batch: Batch, wanted: set[int]) -> Iterator[Batch]:
    """The parts of a batch for some of the tensors, each by itself."""
    columns = zip(
        batch.sources, batch.starts, batch.positions, batch.inner, batch.sizes, strict=True
    )
    for source, start, position, inner, size in columns:
        if position in wanted:
            yield Batch(size, (source,), (start,), (position,), (inner,), (size,))


def _like(tensor: Tensor, local: Tensor) -> Tensor:
    """The local part as a DTensor, where the tensor is one."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
