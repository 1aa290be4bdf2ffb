"""Ways to give a model the weights of a folder: that each does, and what memory it takes.

A benchmark's module has `WAYS` by name and `build(quick)`, the model. Nothing is timed here.
"""

import gc
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

Way = Callable[[Any, Path], object]


def check(name: str, model: Any, way: Way, folder: Path) -> None:
    """Every way loads every byte; it is timed after."""
    want = [param.sum(dtype=torch.float64) for param in model.parameters()]
    for param in model.parameters():
        param.zero_()
    way(model, folder)
    for got, before in zip(model.parameters(), want, strict=True):
        assert torch.equal(got.sum(dtype=torch.float64), before), name


def peak(module: str, name: str, folder: Path, quick: bool) -> tuple[float, float]:
    """Peak MiB over the parameters, all of it and the process's own, in a process of its own.

    Pages of mapped files count in the first alone.
    """
    print(f"{module}: memory of {name}", file=sys.stderr, flush=True)
    command = [sys.executable, "-P", "-W", "ignore", "-c", "import sys; sys.path.insert(0, '.');"]
    call = f"print_peak({module!r}, {name!r}, {str(folder)!r}, {quick})"
    command[-1] += f"from benchmarks.ways import print_peak; {call}"
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    resident, own = out.split()[-2:]
    return float(resident), float(own)


def print_peak(module: str, name: str, folder: str, quick: bool) -> None:
    """What the process of `peak` does. A small model before pays for imports."""
    torch.set_num_threads(1)
    benchmark = import_module(module)
    build, way = benchmark.build, benchmark.WAYS[name]
    model = build(quick)
    with tempfile.TemporaryDirectory() as small:
        tiny = build(True)
        tiny.save_pretrained(small)
        way(tiny, Path(small))
        del tiny
    gc.collect()
    before = _status()
    highest = dict(before)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            for key, value in _status().items():
                highest[key] = max(highest[key], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    way(model, Path(folder))
    done.set()
    watcher.join()
    print(*(highest[key] - before[key] for key in ("VmRSS", "RssAnon")))


def _status() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {key: int(found[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon")}
