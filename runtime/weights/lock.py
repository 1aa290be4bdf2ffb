"""The lock of a model's weights: calls share it, an update has it alone; and the weights' version.

A read lock costs a quarter of a microsecond, and a thread may nest several. An update waits for the
calls under way and holds back new ones, so that no call sees half of it. Calls that take no read
lock are not held back, and kernels that a device still runs are not waited for.

A call takes no mutex. It enters, and then looks whether the lock is busy; an update makes the lock
busy first, and then looks who is inside. So one of the two sees the other, as long as Python's
global lock orders their steps. A Python without it takes the mutex at every call.
"""

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from fixpass.runtime.errors import PoisonedError, UpdateError, VersionError
from fixpass.runtime.modules import unwrapped
from fixpass.runtime.weights.targets import tensors_of

Covers = Callable[[], Iterable[Tensor]]

_mutex = threading.Condition(threading.Lock())
"""One for all locks: an update takes several in one step. With a mutex each that could deadlock."""

_IS_ORDERED: bool = getattr(sys, "_is_gil_enabled", lambda: True)()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.token = object()


_thread = _Thread()
"""Tells threads apart. An ident would not: a new thread may get that of one that has ended."""

_SLICE = 1.0
"""Seconds after which a waiting thread looks again, in case an interrupt swallowed its wake-up."""


class WeightsLock:
    """A lock over some parameters."""

    def __init__(self, covers: Covers = tuple) -> None:
        self.covers = covers
        """Gives the parameters as they are now."""
        self.version = 0
        """Of the weights; 0 before any update."""
        self.updating = False
        """Whether an update is open, which holds calls back only as it commits."""
        self._readers: dict[_ReadLock, object] = {}
        """The thread that entered each of them."""
        self._writer: object | None = None
        self._waiting: set[object] = set()
        """The threads whose updates wait for the end of calls."""
        self._poisoned = ""
        self._busy = not _IS_ORDERED
        _LOCKS.add(ref(self, _LOCKS.discard))

    @property
    def poisoned(self) -> str:
        """Why the weights are a mixture that no call may use; empty where they are whole."""
        return self._poisoned

    @poisoned.setter
    def poisoned(self, why: str) -> None:
        with _mutex:
            self._poisoned = why
            self._update_busy()

    def read_lock(self) -> AbstractContextManager[int]:
        """A context for one call; its value is the version of the weights that the call sees."""
        return _ReadLock(self)

    def write_lock(self, timeout: float | None = None) -> AbstractContextManager[None]:
        """See `closed`."""
        return closed((self,), timeout)

    def _update_busy(self) -> None:
        """Say whether calls have to take the mutex, which the caller holds."""
        needed = bool(self._waiting) or self._writer is not None or bool(self._poisoned)
        self._busy = needed or not _IS_ORDERED

    def _enter_busy(self, reader: "_ReadLock", me: object) -> int:
        """Step back, and enter again when no update is in the way."""
        with _mutex:
            del self._readers[reader]
            _mutex.notify_all()
            while self._keeps_out(me):
                _mutex.wait(_SLICE)
            if self._poisoned and self._writer is None:
                raise PoisonedError(self._poisoned)
            self._readers[reader] = me
            return self.version

    def _keeps_out(self, me: object) -> bool:
        if self._writer is not None:
            return self._writer is not me
        # The update waits for a thread that is in any lock already: that thread must not wait too.
        return bool(self._waiting) and not _is_inside(me, _locks())


class _ReadLock:
    """One reader, of one `with` statement."""

    __slots__ = ("_lock",)

    def __init__(self, lock: WeightsLock) -> None:
        self._lock = lock

    # Written out for speed: each call of a compiled graph comes here.
    def __enter__(self) -> int:
        lock = self._lock
        lock._readers[self] = _thread.token
        if not lock._busy:
            return lock.version
        try:
            return lock._enter_busy(self, _thread.token)
        # Also an interrupt: a call that does not enter must not count as a reader.
        except BaseException:
            lock._readers.pop(self, None)
            raise

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        lock = self._lock
        del lock._readers[self]
        if lock._busy:
            with _mutex:
                _mutex.notify_all()


_LOCKS: "set[ref[WeightsLock]]" = set()
_OF_MODULES: WeakKeyDictionary[nn.Module, WeightsLock] = WeakKeyDictionary()


def _drop_lost_readers(locks: Iterable[WeightsLock]) -> None:
    """Drop readers whose `with` statement an interrupt ended before `__exit__` could run."""
    lone = {_ReadLock(COMPILED): 0}
    unheld = max(_reference_counts(list(lone)))
    for lock in locks:
        readers = list(lock._readers)
        for reader, count in zip(readers, _reference_counts(readers), strict=True):
            if count <= unheld:
                lock._readers.pop(reader, None)


def _reference_counts(readers: list[_ReadLock]) -> list[int]:
    return [sys.getrefcount(reader) for reader in readers]


def _locks() -> list[WeightsLock]:
    """All locks. The copy is one step, as other threads may make or drop locks meanwhile."""
    return [lock for weak in _LOCKS.copy() if (lock := weak()) is not None]


def _is_inside(me: object, locks: Iterable[WeightsLock]) -> bool:
    """Whether the thread reads any of these locks."""
    return any(me in list(lock._readers.values()) for lock in locks)


def lock_of(module: nn.Module) -> WeightsLock:
    """The lock of a model, the same for all of its wrappers; a submodule has a lock of its own.

    An update of either takes both: see `over`.
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
    """A context for one call of a model, which no update interrupts; its value is the version.

    Threads may take turns at a generator that holds it; updates wait for its end. PoisonedError is
    raised where an update failed and could not be undone.

    Example:
        >>> with fixpass.weights.read_lock(model) as version:
        ...     tokens = model.generate(prompt)

    """
    return lock_of(module).read_lock()


def write_lock(module: nn.Module, timeout: float | None = None) -> AbstractContextManager[None]:
    """A context in which no other thread is in a call of a model, or of one that shares weights.

    For loads other than `load`, `update` and `reload`, which take the lock themselves. UpdateError
    is raised after `timeout` seconds, and where this thread is in a call itself.
    """
    return closed({lock_of(module), *over(tensors_of(module))}, timeout)


def over(tensors: Iterable[Tensor]) -> tuple[WeightsLock, ...]:
    """All locks that cover one of these tensors: of models, of submodules, of compiled graphs."""
    return over_ids([id(tensor) for tensor in tensors])


def over_ids(ids: Iterable[int], known: WeightsLock | None = None) -> tuple[WeightsLock, ...]:
    """As `over`, for the ids of tensors; the lock `known` is one of them without a look at it."""
    wanted = frozenset(ids)
    return tuple(
        lock
        for lock in _locks()
        if lock is known or not wanted.isdisjoint(id(tensor) for tensor in lock.covers())
    )


def version(model: nn.Module) -> int:
    """The version of the weights of `model`: 0 before any update."""
    return lock_of(model).version


def bump(
    model: nn.Module, to: int | None = None, others: Collection[WeightsLock] | None = None
) -> int:
    """Raise the version of `model` by one, or to `to`; returns it.

    Those of `others`, by default of all models that share a parameter with it, rise by one.
    """
    own = lock_of(model)
    if to is not None and to <= own.version:
        raise VersionError(f"version {to} does not follow version {own.version}")
    for lock in over(tensors_of(model)) if others is None else others:
        if lock is not own:
            lock.version += 1
    own.version = own.version + 1 if to is None else to
    return own.version


COMPILED = WeightsLock()
"""The lock of all compiled graphs that read weights: every update of any model takes it. A graph
cannot know which updates concern it: it must hold no reference to weights between its calls, since
`swap_tensors` refuses tensors with weak references."""


@contextmanager
def closed(locks: Collection[WeightsLock], timeout: float | None = None) -> Iterator[None]:
    """A context in which no other thread is in these locks; see `write_lock`. It may be nested."""
    me = _thread.token
    with _mutex:
        rest = [lock for lock in {*locks, COMPILED} if lock._writer is not me]
    try:
        _close(rest, me, timeout)
        yield
    finally:
        try:
            _open(rest, me)
        finally:  # An interrupt may have split the first.
            _open(rest, me)


def _open(locks: Sequence[WeightsLock], me: object) -> None:
    with _mutex:
        for lock in locks:
            lock._waiting.discard(me)
            if lock._writer is me:
                lock._writer = None
            lock._update_busy()
        _mutex.notify_all()


def _close(locks: Sequence[WeightsLock], me: object, timeout: float | None) -> None:
    """Close the locks. The caller opens them, also after an exception or an interrupt."""
    end = None if timeout is None else time.monotonic() + timeout
    with _mutex:
        if any(lock._readers for lock in locks):
            _drop_lost_readers(locks)
            if _is_inside(me, locks):
                raise UpdateError("weights cannot be updated inside a call of their own model")
        for lock in locks:
            lock._waiting.add(me)
            lock._update_busy()
        while any(lock._readers or lock._writer is not None for lock in locks):
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                threads = {thread for lock in locks for thread in list(lock._readers.values())}
                raise UpdateError(
                    f"{len(threads)} calls of the model did not end within {timeout} s: give "
                    "a longer timeout, or look for a call that hangs"
                )
            if not _mutex.wait(_SLICE if left is None else min(left, _SLICE)):
                _drop_lost_readers(locks)
        for lock in locks:
            lock._writer = me
            lock._waiting.discard(me)
            lock._update_busy()
