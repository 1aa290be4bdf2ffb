"""Run the commit of an update in a thread of its own, so that no interrupt can split it.

Signals and PyThreadState_SetAsyncExc hit the thread that called the update. That thread only waits
for the section, and raises the interrupt when the section has ended. Up to two interrupts in a row
are held back so; the section itself runs to its end in any case.
"""

from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class _Section:
    """A function that runs once, and the end of its run."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._inference = torch.is_inference_mode_enabled()
        self._tickets: list[None] = [None]
        self._running = allocate_lock()
        self._running.acquire()
        self.is_over = False
        self.result: object = None
        self.error: BaseException | None = None

    def take(self) -> bool:
        """Take the right to run the function, which exists once; whether it was there."""
        try:
            self._tickets.pop()
        except IndexError:
            return False
        return True

    def run(self) -> None:
        if not self.take():
            return
        try:
            with torch.inference_mode(self._inference), torch.no_grad():
                self.result = self._function()
        # Raised again in the thread that waits.
        except BaseException as error:
            self.error = error
        finally:
            self.is_over = True
            self._running.release()

    def wait(self) -> None:
        """Wait for the end, also where an interrupt ends the waiting."""
        try:
            while not self.is_over:
                with self._running:
                    pass
        finally:
            if not self.is_over:
                try:
                    self.wait()
                finally:
                    if not self.is_over:
                        self.wait()


def run_section(function: Callable[[], T]) -> T:
    """Call a function in another thread, without gradients, and wait for its end.

    Raises the exception of the function. An interrupt of the calling thread is raised when the
    function has ended; a note says how that was.
    """
    section = _Section(function)
    try:
        start_new_thread(section.run, ())
        section.wait()
    except BaseException as interrupt:
        # The thread may not have begun yet: without the ticket it never will.
        if section.take():
            raise
        section.wait()
        if section.error is None:
            interrupt.add_note("the update was finished first: its weights are in place")
        else:
            interrupt.add_note(f"the update failed: {section.error!r}")
        raise
    if section.error is not None:
        raise section.error
    return section.result  # type: ignore[return-value]
