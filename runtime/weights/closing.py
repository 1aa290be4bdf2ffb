"""The moment of an update in which live weights change: gates closed, checked, a new version.

What it writes, and what undoes that, is the caller's affair. Outside of it calls go on.
"""

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fixpass.runtime.errors import VersionError
from fixpass.runtime.weights.lock import WeightsLock, bump, closed, lock_of, tensors_of
from fixpass.runtime.weights.options import Options
from fixpass.runtime.weights.state_file import SavedState, write_state


@dataclass(frozen=True)
class Closing:
    """The end of an update of `model` that began at version `base`.

    check: raises UpdateError where more than values is different; its argument says whether
    addresses may be.
    """

    model: nn.Module
    base: int
    options: Options
    check: Callable[[bool], None]

    @contextmanager
    def closed(self, gates: Iterable[WeightsLock]) -> Iterator[float]:
        """The closed gate, with the state file around it; the value is when it was closed."""
        gate = lock_of(self.model)
        with closed({*gates, gate}, self.options.timeout):
            began = time.perf_counter()
            before, to = gate.version, self.options.version or gate.version + 1
            if before != self.base:
                raise VersionError(
                    f"the weights became version {before} while an update of version {self.base} "
                    "was open: begin it again"
                )
            self._save("committing", before, to)
            try:
                yield began
            except BaseException:
                # Of weights that are whole after all, old or new, the file says so.
                if not gate.poisoned:
                    self._save("committed", gate.version, gate.version)
                raise
            self._save("committed", gate.version, gate.version)

    def forward(self, gates: Collection[WeightsLock], write: Callable[[], object]) -> None:
        """Write over the old bytes with new ones that are at hand, whatever interrupts it."""
        interrupt = None
        try:
            write()
        except BaseException as error:
            interrupt = error
            # The old bytes are gone and the new ones at hand: the only way to be whole is forward.
            try:
                write()
            except BaseException as again:
                self.poison(gates, again)
                raise
        try:
            self.finish(gates)
        except BaseException as error:
            self.poison(gates, error)
            raise
        if interrupt is not None:
            interrupt.add_note("the update was finished first: its weights are in place")
            raise interrupt

    def finish(self, gates: Collection[WeightsLock], *, moved: bool = False) -> None:
        """Check that nothing but values changed, and give them their version."""
        self.check(moved)
        poisoned = [gate for gate in gates if gate.poisoned]
        if poisoned and self.options.scope == "model":
            mine = {id(tensor) for tensor in tensors_of(self.model)}
            for gate in poisoned:
                # Whoever covers more may still have a mixture.
                if mine.issuperset(id(tensor) for tensor in gate.covers()):
                    gate.poisoned = ""
        bump(self.model, self.options.version, gates)

    def poison(self, gates: Iterable[WeightsLock], error: BaseException) -> None:
        """Let calls raise until all weights are written again."""
        text = (
            f"an update failed in mid-commit ({error!r}) and its weights are a mixture: update "
            "all weights of the model"
        )
        for gate in (*gates, lock_of(self.model)):
            gate.poisoned = text

    def _save(self, state: Literal["committed", "committing"], version: int, to: int) -> None:
        if self.options.state_file is not None:
            write_state(
                self.options.state_file,
                SavedState(state, version, to, self.options.mode, os.getpid()),
            )
