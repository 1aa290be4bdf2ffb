"""The gate: calls of a model go through together, an update of its weights goes through alone.

Reading costs a quarter of a microsecond and may be nested in a thread; writing waits for the calls
that are under way and holds back new ones, so that no call sees half an update. It keeps out only
who asks: a call that enters no gate is not held. Kernels that a device still runs are not waited
for.

A call takes no lock. It enters, and then asks whether the gate is busy; an update first makes it
busy, and then asks who is inside. So one of the two sees the other, as long as Python's own lock
puts their steps in one order.
"""

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident
from types import TracebackType
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from fixpass.runtime.errors import PoisonedError, UpdateError
from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights.targets import walk

Covers = Callable[[], Iterable[Tensor]]

# One lock for all gates: an update closes several in one step, and a call may be in several, one
# inside the other. A lock for each could not do that without a deadlock.
_state = threading.Condition(threading.Lock())
# Without Python's lock each call has to take that of the gates.
_IS_ORDERED: bool = getattr(sys, "_is_gil_enabled", lambda: True)()

# Seconds after which who waits looks again, should an interrupt have taken the wake-up.
_SLICE = 1.0


class WeightsLock:
    """A gate over parameters.

    covers: gives the parameters as they are now. version: of their weights; 0 before any update.
    poisoned: why the weights are a mixture that no call may use; empty where they are whole.
    updating: whether an update is open, which says nothing of whether calls are held back.
    """

    def __init__(self, covers: Covers = tuple) -> None:
        self.covers = covers
        self.version = 0
        self.updating = False
        # How often each thread is inside; each changes its own number only.
        self._readers: dict[int, int] = {}
        self._writer: int | None = None
        self._waiting = 0
        self._poisoned = ""
        self._busy = not _IS_ORDERED
        self._reading = _Reading(self)
        _GATES.add(ref(self, _GATES.discard))

    @property
    def poisoned(self) -> str:
        return self._poisoned

    @poisoned.setter
    def poisoned(self, why: str) -> None:
        with _state:
            self._poisoned = why
            self._settle()

    def read_lock(self) -> AbstractContextManager[int]:
        """A context for a call; its value is the version of the weights that the call sees.

        Raises PoisonedError where an update failed and could not be undone.
        """
        return self._reading

    def write_lock(self, timeout: float | None = None) -> AbstractContextManager[None]:
        """A context in which no other thread reads.

        timeout: in seconds; None waits as long as it takes. Raises UpdateError where it runs out,
        and where the thread itself is in a call.
        """
        return closed((self,), timeout)

    def _settle(self) -> None:
        """Say whether calls have to look closer; whoever changes the state does, with the lock."""
        needed = self._waiting > 0 or self._writer is not None or bool(self._poisoned)
        self._busy = needed or not _IS_ORDERED

    def _enter_busy(self, me: int, depth: int) -> int:
        """Enter once nothing is in the way. The thread has been counted, `depth` times before."""
        with _state:
            self._count(me, depth)
            _state.notify_all()
            while self._keeps_out(me):
                _state.wait(_SLICE)
            if self._poisoned and self._writer is None:
                raise PoisonedError(self._poisoned)
            self._count(me, depth + 1)
            return self.version

    def _keeps_out(self, me: int) -> bool:
        if self._writer is not None:
            return self._writer != me
        # Who is in a gate already goes on: the update waits for it, so it must not wait in turn.
        return self._waiting > 0 and not any(me in gate._readers for gate in _gates())

    def _count(self, me: int, depth: int) -> None:
        if depth:
            self._readers[me] = depth
        else:
            self._readers.pop(me, None)


class _Reading(AbstractContextManager[int]):
    """What Gate.reading gives, made once a gate: it holds nothing of its own."""

    __slots__ = ("_gate",)

    def __init__(self, gate: WeightsLock) -> None:
        self._gate = gate

    # Written out for speed: each call of a compiled graph comes here.
    def __enter__(self) -> int:
        gate, me = self._gate, get_ident()
        depth = gate._readers.get(me, 0)
        gate._readers[me] = depth + 1
        if not gate._busy:
            return gate.version
        try:
            return gate._enter_busy(me, depth)
        # Also an interrupt: who does not enter must not be counted.
        except BaseException:
            gate._count(me, depth)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        gate, me = self._gate, get_ident()
        depth = gate._readers[me]
        if depth > 1:
            gate._readers[me] = depth - 1
        else:
            del gate._readers[me]
        if gate._busy:
            with _state:
                _state.notify_all()


_GATES: "set[ref[WeightsLock]]" = set()
_OF_MODULES: WeakKeyDictionary[nn.Module, WeightsLock] = WeakKeyDictionary()


def _gates() -> list[WeightsLock]:
    """All gates. Copied in one step, as others may make gates meanwhile, or let them go."""
    return [gate for weak in _GATES.copy() if (gate := weak()) is not None]


def lock_of(module: nn.Module) -> WeightsLock:
    """The gate of a model, the same for all of its wrappers; of a part of it, one of its own.

    An update of a model closes the gates of its parts too, and that of a part those of the models
    that have it: see `over`.
    """
    inside: nn.Module = unwrapped(module)
    found = _OF_MODULES.get(inside)
    if found is None:
        weak = ref(inside)

        def covers() -> Iterable[Tensor]:
            alive = weak()
            return () if alive is None else tensors_of(alive)

        found = _OF_MODULES.setdefault(inside, WeightsLock(covers))
    return found


def read_lock(module: nn.Module) -> AbstractContextManager[int]:
    """A context for a call of a model, which no update interrupts; its value is the version."""
    return lock_of(module).read_lock()


def write_lock(module: nn.Module, timeout: float | None = None) -> AbstractContextManager[None]:
    """A context in which no call of a model, or of what shares its weights, goes on elsewhere.

    For loads that are not an update. timeout: in seconds; UpdateError where it runs out.
    """
    return closed({lock_of(module), *over(tensors_of(module))}, timeout)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module; one that is tied, more than once."""
    found, transient = walk(module)
    yield from (target.tensor for target in found)
    yield from transient


def over(tensors: Iterable[Tensor]) -> tuple[WeightsLock, ...]:
    """All gates that cover one of these tensors, of models, of parts and of compiled graphs."""
    return over_ids([id(tensor) for tensor in tensors])


def over_ids(ids: Iterable[int], known: WeightsLock | None = None) -> tuple[WeightsLock, ...]:
    """As `over`, of tensors by their ids; `known` is one of the gates, and is not looked at."""
    wanted = frozenset(ids)
    return tuple(
        gate
        for gate in _gates()
        if gate is known or not wanted.isdisjoint(id(tensor) for tensor in gate.covers())
    )


COMPILED = WeightsLock()
"""The gate of all compiled graphs that read weights: every update closes it, of whichever model.

A graph gets its weights anew at each call, and no weak reference may stand for them, with which
`swap_tensors` would refuse them: so none knows of which update it has to keep clear.
"""


@contextmanager
def closed(gates: Collection[WeightsLock], timeout: float | None = None) -> Iterator[None]:
    """A context in which no other thread reads any of these gates, or is in a compiled graph.

    See `Gate.writing`.
    """
    me = get_ident()
    with _state:
        mine = [gate for gate in {*gates, COMPILED} if gate._writer == me]
    rest = [gate for gate in {*gates, COMPILED} if gate not in mine]
    try:
        _close(rest, me, timeout)
        yield
    finally:
        # Opening twice is opening once: an interrupt may split the first.
        try:
            _open(rest, me)
        finally:
            _open(rest, me)


def _open(gates: Sequence[WeightsLock], me: int) -> None:
    with _state:
        for gate in gates:
            if gate._writer == me:
                gate._writer = None
                gate._settle()
        _state.notify_all()


def _close(gates: Sequence[WeightsLock], me: int, timeout: float | None) -> None:
    end = None if timeout is None else time.monotonic() + timeout
    with _state:
        if any(me in gate._readers for gate in gates):
            raise UpdateError("weights cannot be updated inside a call of their own model")
        for gate in gates:
            gate._waiting += 1
            gate._settle()
        try:
            while any(gate._readers or gate._writer is not None for gate in gates):
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    # One call may be in several of them.
                    count = len({thread for gate in gates for thread in tuple(gate._readers)})
                    raise UpdateError(
                        f"{count} calls of the model did not end within {timeout} s: give a "
                        "longer timeout, or look for a call that hangs"
                    )
                _state.wait(_SLICE if left is None else min(left, _SLICE))
            for gate in gates:
                gate._writer = me
        finally:
            for gate in gates:
                gate._waiting -= 1
                gate._settle()
            _state.notify_all()
