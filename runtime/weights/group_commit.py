"""Updates that every rank of a group makes, or none of them: two-phase commit over a Store.

    rank 0          rank 1          store
    join            join            join/<rank>      the process, as soon as an update is open
    stage           stage           <n>/staged       a count of ranks that have validated and read
    close the lock  close the lock
    vote            vote            <n>/yes          a count; vote/<rank> has the versions
    decide          wait            <n>/decision     written once, by compare_set
    write           write                            from memory; open the lock
    confirm         confirm         <n>/done         a count

Attempts are numbered from 1: n. The last rank to vote decides "commit". A rank that raises decides
"abort", and so does a rank that waits too long. The first decision is the only one.
`docs/ranks.md` has the cases, and what is not promised.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights.lock import WeightsLock
from fixpass.runtime.weights.options import Options
from fixpass.runtime.weights.processes import has_ended, is_stopped
from fixpass.runtime.weights.update_group import Decision, UpdateGroup

_STAGED = ("buffered", "double_buffer")
_LOOK = 0.25
"""Seconds between two looks at the processes of this host."""


@contextmanager
def taking_part(options: Options, lock: WeightsLock) -> Iterator[Options]:
    """The options of an update that commits only where all ranks of its group do.

    Raises:
        UpdateError: a rank raised, did not vote in time, or ended. The weights are those of before.

    """
    if options.group is None:
        yield options
        return
    if options.mode not in _STAGED:
        raise UpdateError(f"group=... needs one of the modes {', '.join(_STAGED)}")
    attempt = _Attempt(UpdateGroup.of(options.group))
    timeout = attempt.ranks.timeout if options.timeout is None else options.timeout
    try:
        attempt.join()
        yield replace(options, staged=attempt.staged, agree=attempt.agree, timeout=timeout)
    except BaseException as error:
        attempt.refuse(error)
        # An interrupt is raised when the update is finished.
        if attempt.agreed_on == lock.version:
            with suppress(RuntimeError):
                attempt.done()
        raise
    try:
        attempt.confirm()
    except RuntimeError as error:
        text = f"this rank has the new weights, and the store of the group is lost: {error}"
        warnings.warn(text, stacklevel=5)


@contextmanager
def _store_lost(doubt: str) -> Iterator[None]:
    """Turn an error of the store, which is a RuntimeError of any class, into an UpdateError."""
    try:
        yield
    except RuntimeError as error:
        raise UpdateError(f"the store of the group is lost ({error}): {doubt}") from error


@dataclass
class _Attempt:
    """One update of a group, as this rank takes part in it."""

    ranks: UpdateGroup
    has_voted: bool = False
    agreed_on: int | None = None
    """The version that all ranks commit; None before they agree."""

    def join(self) -> None:
        with _store_lost("nothing was changed"):
            if not self.ranks.attempt:
                self.ranks.catch_up()
            self.ranks.attempt += 1
            self.ranks.note("join")

    def staged(self) -> None:
        """Wait until all ranks have staged. The lock is open, so calls go on meanwhile."""
        ranks, key = self.ranks, f"{self.ranks.attempt}/staged"
        with _store_lost("nothing was changed"):
            ranks.note("staged")
            if ranks.store.add(key, 1) >= ranks.size:
                return
            self._wait(lambda: self._is_decided() or ranks.store.add(key, 0) >= ranks.size)
            if self._is_decided() or ranks.store.add(key, 0) < ranks.size:
                self._check(self._outcome("staged", "is not ready"))

    def agree(self, base: int, to: int) -> None:
        """Vote to commit; UpdateError where the ranks do not."""
        ranks = self.ranks
        with _store_lost("this rank has its old weights, and the others may have the new ones"):
            ranks.note("vote", base=base, to=to)
            self.has_voted = True
            is_last = ranks.store.add(f"{ranks.attempt}/yes", 1) >= ranks.size
            self._check(self._counted(to) if is_last else self._waited())
            self.agreed_on = to

    def _check(self, found: Decision) -> None:
        if not found.commit:
            self.ranks.catch_up()
            raise UpdateError(f"no rank was updated: {found.why}")

    def _is_decided(self) -> bool:
        return bool(self.ranks.store.check([f"{self.ranks.attempt}/decision"]))

    def refuse(self, error: BaseException) -> None:
        """Abort for all ranks, unless this one has voted: then the decision holds."""
        if self.has_voted:
            return
        try:
            self.ranks.decide(Decision(False, 0, f"rank {self.ranks.rank} raised {error!r}"))
        except RuntimeError as lost:
            error.add_note(f"the other ranks were not told: {lost}")

    def done(self) -> bool:
        """Say that this rank has written its weights; whether all have."""
        self.ranks.note("done")
        return self.ranks.store.add(f"{self.ranks.attempt}/done", 1) >= self.ranks.size

    def confirm(self) -> None:
        """Wait until each rank has written its weights; warn of those that have not."""
        ranks, key = self.ranks, f"{self.ranks.attempt}/done"
        if not self.done() and not self._wait(
            lambda: ranks.store.add(key, 0) >= ranks.size, "done"
        ):
            texts = self._absent("done", "has not confirmed the update")
            text = f"this rank has the new weights, and {'; '.join(texts)}"
            warnings.warn(text, stacklevel=6)
        if ranks.rank == 0:
            ranks.store.set("last", str(ranks.attempt))
            for old in ("staged", "yes", "done"):
                ranks.store.delete_key(f"{ranks.attempt - 2}/{old}")

    def _counted(self, to: int) -> Decision:
        """The decision of the last rank to vote."""
        votes = self.ranks.notes("vote", of=self.ranks.attempt)
        if len(votes) < self.ranks.size:
            return self._waited()
        versions = {(vote["base"], vote["to"]) for vote in votes.values()}
        if len(versions) > 1:
            texts = (f"rank {r}: {v['base']} to {v['to']}" for r, v in sorted(votes.items()))
            return self.ranks.decide(
                Decision(
                    False,
                    0,
                    f"the ranks update different versions ({', '.join(texts)}): a rank that came "
                    "back first loads the weights of group_version(group) by itself",
                )
            )
        lost = self._lost(votes, can_stop=False)
        return self.ranks.decide(Decision(not lost, to, "; ".join(lost)))

    def _waited(self) -> Decision:
        """The decision of another rank, or an abort where none comes in time."""
        self._wait(self._is_decided)
        return self._outcome("vote", "did not vote")

    def _outcome(self, kind: str, what: str) -> Decision:
        """The decision, or else an abort for want of notes of a kind."""
        ranks = self.ranks
        if (found := ranks.decision(ranks.attempt)) is not None:
            return found
        texts = self._absent(kind, f"{what} within {ranks.timeout:g} s")
        why = "; ".join(texts) or f"no rank decided within {ranks.timeout:g} s"
        return ranks.decide(Decision(False, 0, why))

    def _wait(self, is_there: Callable[[], bool], kind: str = "") -> bool:
        """Wait for the others.

        False where the time is up, or where a rank has ended that wrote no note of this `kind`.
        """
        ranks = self.ranks
        pause, most = 5e-5, 5e-4 * max(1.0, ranks.size / 8)
        now = time.monotonic()
        end, look = now + ranks.timeout, now + _LOOK
        while not is_there():
            now = time.monotonic()
            if now > end:
                return False
            if now > look:
                safe = ranks.notes(kind, of=ranks.attempt) if kind else {}
                if self._lost({r: n for r, n in ranks.notes("join").items() if r not in safe}):
                    return is_there()
                look = now + _LOOK
            time.sleep(pause)
            pause = min(1.5 * pause, most)
        return True

    def _lost(self, notes: dict[int, Any], *, can_stop: bool = True) -> list[str]:
        """The processes of this host, among those that wrote notes, that do not run."""
        found = []
        for rank, note in sorted(notes.items()):
            if has_ended(note["process"]):
                found.append(f"rank {rank}, {note['process']['text']}, has ended")
            elif not can_stop and is_stopped(note["process"]):
                found.append(f"rank {rank}, {note['process']['text']}, is stopped")
        return found

    def _absent(self, kind: str, what: str) -> list[str]:
        """The ranks that did not write a note of a kind, and what is known of them."""
        ranks = self.ranks
        there, joined = (ranks.notes(each, of=ranks.attempt) for each in (kind, "join"))
        late = {rank: note for rank, note in ranks.notes("join").items() if rank not in there}
        found = self._lost(late, can_stop=False)
        named = {text.split(",")[0] for text in found}
        for rank in range(ranks.size):
            if rank in there or f"rank {rank}" in named:
                continue
            began = "" if rank in joined else " and did not begin the update"
            who = f", {joined[rank]['process']['text']}," if rank in joined else ""
            found.append(f"rank {rank}{who} {what}{began}")
        return found
