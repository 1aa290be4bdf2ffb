"""Updates that every rank of a group makes, or none of them: two-phase commit over a Store.

    rank 0          rank 1          the store, where a rank has one key for its step
    join            join            rank/<rank> = joined, with the process
    stage           stage           rank/<rank> = staged: all is validated and in memory
    close the lock  close the lock
    vote            vote            rank/<rank> = voted, with the versions
    decide          wait            decision/<attempt>, written once, by compare_set
    write           write
    confirm         confirm         rank/<rank> = done

A rank that sees the votes of all decides "commit". A rank that raises decides "abort", and so does
a rank that waits too long. The first decision is the only one. `docs/ranks.md` has the cases, and
what is not promised.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import torch.distributed as dist

from fixpass.runtime.errors import UpdateError
from fixpass.runtime.weights.lock import WeightsLock
from fixpass.runtime.weights.options import Options
from fixpass.runtime.weights.processes import state_of
from fixpass.runtime.weights.update_group import COUNTED, GroupDecision, Progress, Step, UpdateGroup

_STAGED = ("buffered", "double_buffer")
_CHECK = 0.25
"""Seconds between two looks at the processes of this host."""
_SPIN = 2e-3
"""Seconds for which a rank waits without sleep. The kernel adds about 50 us to any sleep."""

_REPLACED = GroupDecision(False, 0, "a rank was replaced by another process while it took part")

T = TypeVar("T")


@contextmanager
def taking_part(
    group: "dist.ProcessGroup | UpdateGroup", options: Options, lock: WeightsLock
) -> Iterator[Options]:
    """The options of an update that commits only where all ranks of its group do.

    Raises:
        UpdateError: a rank raised, did not vote in time, or ended. The weights are those of before.

    """
    if options.mode not in _STAGED:
        raise UpdateError(f"group=... needs one of the modes {', '.join(_STAGED)}")
    attempt = Attempt(UpdateGroup.of(group))
    timeout = attempt.ranks.timeout if options.timeout is None else options.timeout
    try:
        attempt.join()
        yield replace(options, attempt=attempt, timeout=timeout)
    except BaseException as error:
        found = attempt.refuse(error)
        if found is not None and found.commit:
            attempt.missed(found.version, lock.version, error)
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
class Attempt:
    """One update of a group, as this rank takes part in it."""

    ranks: UpdateGroup

    def join(self) -> None:
        with _store_lost("nothing was changed"):
            self.ranks.attempt += 1
            self.ranks.tell("joined")

    def staged(self) -> None:
        """Wait until all ranks have staged. The lock is open, so calls go on meanwhile."""
        with _store_lost("nothing was changed"):
            steps = self._all_at("staged", self.ranks.arrive("staged"))
            if steps is None:
                self._check(self._outcome("staged", "is not ready"))
            # An abort counts as all steps. Without one, the vote of this rank is missing.
            elif steps >= self._number("voted"):
                self._check(self._found() or self.ranks.decide(_REPLACED))

    def agree(self, base: int, to: int) -> None:
        """Vote to commit; UpdateError where the ranks do not."""
        with _store_lost("this rank has its old weights, and the others may have the new ones"):
            steps = self.ranks.arrive("voted", base, to)
            found = self._counted(steps, to) if steps >= self._number("voted") else None
            self._check(found or self._waited())

    def refuse(self, error: BaseException) -> GroupDecision | None:
        """Abort for all ranks; the decision that came first, or None where the store is lost."""
        why = f"rank {self.ranks.rank} raised {error!r}"
        try:
            return self.ranks.decide(GroupDecision(False, 0, why))
        except RuntimeError as lost:
            error.add_note(f"the other ranks were not told: {lost}")
            return None

    def missed(self, agreed: int, version: int, error: BaseException) -> None:
        """Say that this rank has written its weights, or what it lacks: all ranks agreed before."""
        if version != agreed:
            error.add_note(f"the other ranks have version {agreed}: load it with version={agreed}")
            return
        # An interrupt is raised when the update is finished.
        with suppress(RuntimeError):
            self.done()

    def done(self) -> int:
        """Say that this rank has written its weights; the steps of all ranks."""
        return self.ranks.arrive("done")

    def confirm(self) -> None:
        """Wait until each rank has written its weights; warn of those that have not."""
        if self._all_at("done", self.done()) is None:
            texts = self._absent("done", "has not confirmed the update")
            text = f"this rank has the new weights, and {'; '.join(texts)}"
            warnings.warn(text, stacklevel=6)

    def _check(self, found: GroupDecision) -> None:
        if not found.commit:
            raise UpdateError(f"no rank was updated: {found.why}")

    def _found(self) -> GroupDecision | None:
        return self.ranks.decision(self.ranks.attempt)

    def _number(self, step: Step) -> int:
        """The steps that ranks have made when all of them have come to a step."""
        return (COUNTED.index(step) + 1) * self.ranks.size

    def _all_at(self, step: Step, steps: int) -> int | None:
        """Wait until all ranks have come to a step; how many steps they made then, or None."""
        enough = self._number(step)

        def look() -> int | None:
            found = self.ranks.steps()
            return found if found >= enough else None

        return steps if steps >= enough else self._wait(look)

    def _behind(self, step: Step, progress: Sequence[Progress]) -> set[int]:
        """The ranks that have not come to a step of this attempt."""
        there = {each.rank for each in progress if each.reached(self.ranks.attempt, step)}
        return {*range(self.ranks.size)} - there

    def _counted(self, steps: int, to: int) -> GroupDecision | None:
        """The decision of a rank that sees the votes of all; None if it does not."""
        votes = self.ranks.progress()
        if self._behind("voted", votes):
            return None
        if steps > self._number("voted"):
            return self.ranks.decide(_REPLACED)
        if len({(vote.base, vote.to) for vote in votes}) > 1:
            texts = ", ".join(f"rank {vote.rank}: {vote.base} to {vote.to}" for vote in votes)
            why = (
                f"the ranks update different versions ({texts}): a rank that came back first loads "
                "the weights of group_version(group) by itself"
            )
            return self.ranks.decide(GroupDecision(False, 0, why))
        lost = _lost(votes, can_stop=False)
        return self.ranks.decide(GroupDecision(not lost, to, "; ".join(lost.values())))

    def _waited(self) -> GroupDecision:
        """The decision of another rank, or an abort where none comes in time."""
        return self._wait(self._found) or self._outcome("voted", "did not vote")

    def _outcome(self, step: Step, what: str) -> GroupDecision:
        """The decision, or else an abort for want of ranks that have come to a step."""
        if (found := self._found()) is not None:
            return found
        texts = self._absent(step, f"{what} within {self.ranks.timeout:g} s")
        why = "; ".join(texts) or f"no rank decided within {self.ranks.timeout:g} s"
        return self.ranks.decide(GroupDecision(False, 0, why))

    def _wait(self, look: Callable[[], T | None]) -> T | None:
        """Look until there is something, which is returned.

        None where the time is up, or where a rank has ended that has not written its weights yet.
        """
        began = time.monotonic()
        next_check = began + _CHECK
        while (found := look()) is None:
            now = time.monotonic()
            if now - began > self.ranks.timeout:
                return None
            if now > next_check:
                progress = self.ranks.progress()
                if not self._behind("done", progress).isdisjoint(_lost(progress)):
                    return look()
                next_check = now + _CHECK
            self._pause(now - began)
        return found

    def _pause(self, waited: float) -> None:
        """Let other processes run, and sleep where the wait is long already."""
        if waited < _SPIN:
            os.sched_yield()
        else:
            # The store serves one rank after another.
            time.sleep(min(waited / 8, 5e-4 * max(1.0, self.ranks.size / 8)))

    def _absent(self, step: Step, what: str) -> list[str]:
        """The ranks that have not come to a step, and what is known of them."""
        progress = self.ranks.progress()
        known, lost = {each.rank: each for each in progress}, _lost(progress, can_stop=False)
        # A process that has ended may have come to the step before.
        late = self._behind(step, progress) or {*lost}
        texts = []
        for rank in sorted(late):
            each = known.get(rank)
            began = each is not None and each.attempt >= self.ranks.attempt
            who = f"rank {rank}, {each.process['text']}," if each and began else f"rank {rank}"
            rest = "" if began else " and did not begin the update"
            texts.append(lost.get(rank, f"{who} {what}{rest}"))
        return texts


def _lost(progress: Sequence[Progress], *, can_stop: bool = True) -> dict[int, str]:
    """The ranks whose processes, on this host, do not run, in words."""
    states = {each.rank: (each.process["text"], state_of(each.process)) for each in progress}
    fine = ("runs", "is stopped") if can_stop else ("runs",)
    return {
        rank: f"rank {rank}, {text}, {state}"
        for rank, (text, state) in states.items()
        if state not in fine
    }
