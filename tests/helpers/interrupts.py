"""Reloads that interrupts hit at random moments: `python -m helpers.interrupts SEED MODE COUNT`.

After each of them the weights are of one version, which `version` says, or calls are refused.
"""

import _thread
import contextlib
import random
import statistics
import sys
import threading
import time

import torch
from torch import nn

from fixpass.runtime.weights import tile_copy
from fixpass.runtime.weights.load import reload
from fixpass.runtime.weights.lock import lock_of, version
from fixpass.runtime.weights.parameter_layout import set_layout

LAYOUTS = ("aiter_16x16", "transposed_dense")
"""Of the first weights; the C++ writes the bytes of the first of them."""
WARM_UP = 20
"""Reloads without interrupts, which are timed."""


def reload_with_interrupts(seed, mode, count):
    """The faults, in words, and the number of reloads that were interrupted."""
    # The C++ writes small weights too.
    tile_copy.MIN_BYTES = 0
    randomly = random.Random(seed)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(20))).requires_grad_(False)
    for index, layout in enumerate(LAYOUTS):
        set_layout(model[index].weight, layout)
    longest = 1.5 * statistics.median(timed(model, mode) for _ in range(WARM_UP))
    values, wrong, interrupted = {WARM_UP: {0.0}}, [], 0
    for number in range(1, count + 1):
        before, new = version(model), full(model, number)
        timer = threading.Timer(randomly.random() * longest, _thread.interrupt_main)
        try:
            timer.start()
            reload(model, new, mode, progress=False)
        except KeyboardInterrupt:
            interrupted += 1
        with contextlib.suppress(KeyboardInterrupt):
            timer.join()
            time.sleep(0.001)
        found = {float(x) for p in model.parameters() for x in (p.min(), p.max())}
        if lock_of(model).poisoned:
            wrong.append(f"reload {number}: {lock_of(model).poisoned}")
        expected = values[before] if version(model) == before else {float(number)}
        if found != expected or version(model) not in (before, before + 1):
            wrong.append(f"reload {number}: version {version(model)} has the values {found}")
        values[version(model)] = found
    return wrong, interrupted


def timed(model, mode):
    new, began = full(model, 0), time.perf_counter()
    reload(model, new, mode, progress=False)
    return time.perf_counter() - began


def full(model, value):
    return {name: torch.full_like(p, float(value)) for name, p in model.state_dict().items()}


if __name__ == "__main__":
    seed, mode, count = sys.argv[1:]
    torch.set_num_threads(1)
    wrong, interrupted = reload_with_interrupts(int(seed), mode, int(count))
    print(f"{mode}, seed {seed}: {count} reloads, {interrupted} interrupted, {len(wrong)} wrong")
    sys.exit("\n".join(wrong) or None)
