"""Time alternatives side by side: each round runs all of them, every other round backwards.

Rounds are what makes a ratio fair on a machine that others use: what slows one sample down slows
its neighbours too. CPU seconds are used where one thread does the work.
"""

import time
from collections.abc import Callable, Mapping

Clock = Callable[[], float]


def interleave(
    alternatives: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    clock: Clock = time.process_time,
) -> dict[str, list[float]]:
    """Seconds a call of each alternative, one sample a round; the first round is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in alternatives}
    names = list(alternatives)
    for index in range(rounds + 1):
        for name in names if index % 2 else reversed(names):
            run = alternatives[name]
            start = clock()
            for _ in range(calls):
                run()
            elapsed = clock() - start
            if index:
                samples[name].append(elapsed / calls)
    return samples


def calls_for(run: Callable[[], object], seconds: float, clock: Clock = time.process_time) -> int:
    """How many calls take about `seconds`."""
    run()
    start = clock()
    run()
    return max(1, round(seconds / max(clock() - start, 1e-6)))
