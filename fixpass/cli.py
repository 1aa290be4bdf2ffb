"""The command line: `python -m fixpass COMMAND`; each command is a function with its options."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fixpass import explain_command
from fixpass.config import Config
from fixpass.installation import findings, known_kernels
from fixpass.lowering.contract_table import rows_of
from fixpass.lowering.target import CPU, TARGETS
from fixpass.model_loading import load_function
from fixpass.passes import default_passes, entry_passes
from fixpass.pipelines import installed_passes, known_targets
from fixpass.runtime.errors import ConfigError, FixpassError
from fixpass.runtime.weights.audit import audit
from fixpass.runtime.weights.checkpoint_diff import diff
from fixpass.runtime.weights.doctor import check
from fixpass.runtime.weights.mapping import Mapping


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `python -m fixpass`. None takes those of this process.

    Returns:
        The exit status: 0; 1 where `check` or `audit` finds faults or `diff` differences; 2 where
        the command cannot be carried out.
    """
    arguments = _parser().parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
    except FixpassError as error:
        print(f"fixpass: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as `head`, closed the pipe. Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fixpass")
    commands = parser.add_subparsers(required=True, metavar="command")
    names = ", ".join(target.name for target in TARGETS)

    def command(name: str, run: Callable[..., int], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "explain", explain_command.run, "report how fixpass would change a model, and why not more"
    )
    explain_command.add_arguments(sub, names)
    function = "FILE.py:FUNCTION or MODULE:FUNCTION"
    sub = command("check", _check, "say what is wrong with a checkpoint for a model, from headers")
    sub.add_argument("checkpoint", help="a safetensors file, index, folder or pattern, and others")
    sub.add_argument("model", help=f"{function}; it returns the model, and is run on device meta")
    sub.add_argument("--mapping", help=f"{function}; it returns a fixpass.weights.Mapping")
    sub.add_argument("--cast", action="store_true", help="the load may round between float dtypes")
    sub = command("diff", _diff, "compare the values of two checkpoints")
    sub.add_argument("first", help="a checkpoint")
    sub.add_argument("second", help="another checkpoint")
    for side in ("first", "second"):
        sub.add_argument(f"--mapping-{side}", help=f"{function}; the mapping of the {side} one")
    sub.add_argument("--sampled", action="store_true", help="read 12,000 values of each tensor")
    sub = command("audit", _audit, "run post-processing twice and an update, and list the faults")
    sub.add_argument("model", help=f"{function}; it returns (model, process)")
    sub = command("bisect", _bisect, "find the pass and the change that make a model wrong")
    sub.add_argument("model", help="as for explain")
    sub.add_argument(
        "--passes", action="append", default=[], help="FILE.py:CLASS, a pass that no package offers"
    )
    sub.add_argument("--script", default="fixpass_fault.py", help="the program that is written")
    command("passes", _passes, "list the passes in the order in which they run")
    for name, run, about in (
        ("targets", _targets, "list the targets and the kernels of each, the preferred one first"),
        ("kernels", _kernels, "list the kernels, and the source that shows what each one needs"),
    ):
        sub = command(name, run, about)
        sub.add_argument("--full", action="store_true", help="list the constraints of each kernel")
    sub = command("doctor", _doctor, "say what works on this machine, and the way out for the rest")
    sub.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _bisect(arguments: argparse.Namespace) -> int:
    from fixpass.bisection import find_fault, load_trial, script_for

    fault = find_fault(load_trial(arguments.model, arguments.passes))
    if fault is None:
        print(f"{arguments.model} computes the same values with fixpass as without a compiler")
        return 0
    print(fault.text)
    if not fault.is_ours:
        return 1
    Path(arguments.script).write_text(script_for(fault, arguments.model, arguments.passes))
    print(f"python {arguments.script} shows the fault")
    return 1


def _check(arguments: argparse.Namespace) -> int:
    with torch.device("meta"):
        model = load_function(arguments.model)()
    model = model[0] if isinstance(model, tuple) else model
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"{arguments.model} returned a {type(model).__name__}, not a module")
    found = check(arguments.checkpoint, model, _mapping(arguments.mapping), cast=arguments.cast)
    print(found)
    return int(bool(found.faults))


def _diff(arguments: argparse.Namespace) -> int:
    mappings = _mapping(arguments.mapping_first), _mapping(arguments.mapping_second)
    found = diff(arguments.first, arguments.second, mappings, sampled=arguments.sampled)
    print(found)
    return int(not found.is_equal)


def _mapping(name: str | None) -> Mapping:
    found = Mapping() if name is None else load_function(name)()
    if not isinstance(found, Mapping):
        raise ConfigError(f"{name} returned a {type(found).__name__}, not a Mapping")
    return found


def _audit(arguments: argparse.Namespace) -> int:
    given = load_function(arguments.model)()
    if not isinstance(given, tuple) or len(given) != 2 or not callable(given[1]):
        raise ConfigError(
            f"{arguments.model} has to return (model, process): a model with loaded weights, and a "
            "function of it, such as a loop over process_weights_after_loading"
        )
    found = audit(*given)
    print(found)
    return int(bool(found))


def _passes(_: argparse.Namespace) -> int:
    stages = {
        "on Dynamo's graph": entry_passes(),
        "on the ATen graph": default_passes(CPU),
        "installed": installed_passes(),
    }
    for stage, steps in stages.items():
        print(stage)
        for step in steps:
            about = (type(step).__doc__ or "").partition("\n")[0]
            print(f"    {step.name:<22} {about}")
    return 0


def _kernels(arguments: argparse.Namespace) -> int:
    for kernel in known_kernels():
        print(f"{kernel.name} computes {kernel.op}  [{kernel.contract.source}]")
        for constraint in kernel.contract.constraints if arguments.full else ():
            print(f"    {constraint}")
    return 0


def _targets(arguments: argparse.Namespace) -> int:
    known_kernels()
    groups: dict[tuple[str, ...], list[str]] = {}
    for target in known_targets(Config.resolve()) + TARGETS:
        groups.setdefault(target.kernels, []).append(target.name)
    for kernels, names in groups.items():
        print(f"{', '.join(names)}\n    {', '.join(kernels)}")
        for row in (row for name in kernels for row in rows_of(name) if arguments.full):
            constraints = "; ".join(map(str, row.contract.constraints)) or "any layout"
            print(f"        {row.name} of {row.op}: {constraints}")
    return 0


_STATES = {"works": "works", "absent": "not installed", "broken": "does not work"}


def _doctor(arguments: argparse.Namespace) -> int:
    found = list(findings())
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
        return 0
    for state, title in _STATES.items():
        chosen = [finding for finding in found if finding.state == state]
        if chosen:
            print(title)
        for finding in chosen:
            print(f"    {finding.name:<16} {finding.detail}")
            if finding.way_out:
                label = "to use it" if state == "absent" else "to do"
                print(f"    {'':<16} {label}: {finding.way_out}")
    return 0
