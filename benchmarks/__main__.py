"""`python -m benchmarks [NAME ...] [--quick] [--out DIR]`: run benchmarks, print and write them.

Full runs go to `benchmarks/results`; a quick run, which only shows that everything works, is
written where --out says and nowhere otherwise. The exit status is 1 where a bound is missed.
`--compare OLD.json` says for each row of an earlier result whether it is better or worse now.
`python -m benchmarks gpu` checks and measures on a GPU; its options are its own.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
from benchmarks.compare import comparison, load_result, verdicts
from benchmarks.gpu import command
from benchmarks.results import Result
from fixpass.report.tables import progress, show_json

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
NAMES = (*BENCHMARKS, "gpu", "machine_code", "all")
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str]) -> int:
    # These take options of their own.
    if argv[:1] == ["gpu"]:
        return command.main(argv[1:])
    if argv[:1] == ["machine_code"]:
        return machine_code.main(argv[1:])
    parser = _parser()
    arguments = parser.parse_args(argv)
    # Two threads on a machine that others use would measure the others.
    torch.set_num_threads(1)
    if arguments.compare:
        if arguments.names or arguments.out:
            parser.error("--compare takes the benchmark's name from OLD.json, and writes nothing")
        return _compare(parser, arguments)
    chosen = set(arguments.names or ["all"])
    if chosen - set(NAMES):
        parser.error(f"unknown benchmark {min(chosen - set(NAMES))!r}; known: {', '.join(NAMES)}")
    out = arguments.out or (None if arguments.quick else RESULTS)
    names = [name for name in BENCHMARKS if name in chosen or _is_in_all(name, chosen)]
    results = [
        _run(name, arguments, f"{number} of {len(names)}: ", out)
        for number, name in enumerate(names, 1)
    ]
    if arguments.json:
        show_json([result.facts() for result in results])
    if "machine_code" in chosen:
        machine_code.main([])
    held = all(check.holds for result in results for check in result.checks)
    return 0 if held or arguments.quick else 1


def _parser() -> argparse.ArgumentParser:
    epilog = "example: python -m benchmarks strided-norm --quick"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog=epilog
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the tables")
    parser.add_argument("--json", action="store_true", help="print JSON")
    compared = "run the benchmark of this result again; the exit status is 1 where a row is worse"
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help=compared)
    other = "with --compare: take the new result from this file, and run nothing"
    parser.add_argument("--with", dest="other", type=Path, metavar="NEW.json", help=other)
    return parser


def _is_in_all(name: str, chosen: set[str]) -> bool:
    return "all" in chosen and name not in BY_NAME


def _run(name: str, arguments: argparse.Namespace, place: str, out: Path | None) -> Result:
    """Run one benchmark; print its tables, and write it where `out` says."""
    with progress("benchmarks") as say:
        say(f"{place}{name}")
        result = BENCHMARKS[name](arguments.quick)
    if not (arguments.json or arguments.compare):
        result.show()
    if out is not None:
        result.write(out)
    return result


def _compare(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        old = load_result(arguments.compare)
        new = load_result(arguments.other) if arguments.other else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if old["name"] not in BENCHMARKS or (new and new["name"] != old["name"]):
        parser.error(f"{arguments.compare} is of {old['name']!r}, and the other result is not")
    if new is None:
        arguments.quick = old["quick"]
        new = _run(old["name"], arguments, "", None).facts()
    found = verdicts(old, new)
    if arguments.json:
        show_json([asdict(verdict) for verdict in found])
    else:
        comparison(old, new).show()
    return int(any(verdict.verdict in ("worse", "missing") for verdict in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
