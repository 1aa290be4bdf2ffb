"""`python -m benchmarks [NAME ...] [--quick] [--out DIR]`: run benchmarks, print and write them.

Full runs go to `benchmarks/results`; a quick run, which only shows that everything works, is
written where --out says and nowhere otherwise. The exit status is 1 where a bound is missed.
`python -m benchmarks gpu` checks and measures on a GPU; its options are its own.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import (
    all_reduce,
    compile_time,
    decode,
    fold,
    fold_decode,
    guards,
    linear,
    load,
    machine_code,
    matching,
    reload,
    row_parallel,
    run_time,
    strided_norm,
    vllm_serving,
)
from benchmarks.gpu import command
from benchmarks.results import Result

BENCHMARKS: dict[str, Callable[[bool], Result]] = {
    "matching": matching.run,
    "compile-time": compile_time.run,
    "run-time": run_time.run,
    "strided-norm": strided_norm.run,
    "load": load.run,
    "all-reduce": all_reduce.run,
    "row-parallel": row_parallel.run,
    "vllm-serving": vllm_serving.run,
    "vllm-start": vllm_serving.run_starts,
    "guards": guards.run,
    "fold": fold.run,
    "fold-decode": fold_decode.run,
    "linear": linear.run,
    "decode": decode.run,
    "reload": reload.run,
    "reload-many": reload.run_many,
}
# What needs more than `make` installs runs only where it is named.
BY_NAME = frozenset({"vllm-serving", "vllm-start"})
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str]) -> int:
    # These take options of their own.
    if argv[:1] == ["gpu"]:
        return command.main(argv[1:])
    if argv[:1] == ["machine_code"]:
        return machine_code.main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [*BENCHMARKS, "gpu", "machine_code", "all"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)} (default)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the tables")
    arguments = parser.parse_args(argv)
    chosen = set(arguments.names or ["all"])
    if chosen - set(names):
        parser.error(f"unknown benchmark {min(chosen - set(names))!r}; known: {', '.join(names)}")
    out = arguments.out or (None if arguments.quick else RESULTS)
    # Two threads on a machine that others use would measure the others.
    torch.set_num_threads(1)
    held = True
    for name, run in BENCHMARKS.items():
        if name in chosen or ("all" in chosen and name not in BY_NAME):
            result = run(arguments.quick)
            print(result.text(), flush=True)
            if out is not None:
                result.write(out)
            held = held and all(check.holds for check in result.checks)
    if "machine_code" in chosen:
        machine_code.main([])
    return 0 if held or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
