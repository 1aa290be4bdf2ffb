"""The command line: `python -m fixpass COMMAND`; each command is a function with its options."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fixpass import explain_command, listing_commands
from fixpass.lowering.target import TARGETS
from fixpass.model_loading import load_function
from fixpass.report.tables import show_json
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


_FUNCTION = "FILE.py:FUNCTION or MODULE:FUNCTION"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fixpass", epilog=_example("doctor"))
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(
        name: str, run: Callable[..., int], about: str, example: str
    ) -> argparse.ArgumentParser:
        epilog = _example(f"{name} {example}".strip())
        sub = commands.add_parser(name, help=about, description=about, epilog=epilog)
        sub.set_defaults(run=run)
        return sub

    about = "report how fixpass would change a model, and why not more"
    sub = command("explain", explain_command.run, about, explain_command.EXAMPLE)
    explain_command.add_arguments(sub, ", ".join(target.name for target in TARGETS))
    _add_model_commands(command)
    for name, run, about in (
        ("passes", listing_commands.passes, "list the passes in the order in which they run"),
        ("targets", listing_commands.targets, "list the targets with the kernels of each"),
        ("kernels", listing_commands.kernels, "list the kernels with the source of each contract"),
        ("doctor", listing_commands.doctor, "say what works on this machine, and what to do"),
    ):
        with_constraints = name in ("targets", "kernels")
        sub = command(name, run, about, "--full" if with_constraints else "--json")
        _add_json(sub)
        if with_constraints:
            help_text = "list the constraints of each kernel"
            sub.add_argument("--full", action="store_true", help=help_text)
    return parser


def _example(words: str) -> str:
    return f"example: python -m fixpass {words}"


def _add_json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print JSON")


def _add_model_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that read checkpoints, or that run a model of the user."""
    about = "say what is wrong with a checkpoint for a model, from headers"
    sub = command("check", _check, about, "model.safetensors model.py:model")
    sub.add_argument("checkpoint", help="a safetensors file, index, folder or pattern, and others")
    sub.add_argument("model", help=f"{_FUNCTION}; it returns the model, and is run on device meta")
    sub.add_argument("--mapping", help=f"{_FUNCTION}; it returns a fixpass.weights.Mapping")
    sub.add_argument("--cast", action="store_true", help="the load may round between float dtypes")
    _add_json(sub)
    about = "compare the values of two checkpoints"
    sub = command("diff", _diff, about, "model.safetensors model.safetensors --sampled")
    sub.add_argument("first", help="a checkpoint")
    sub.add_argument("second", help="another checkpoint")
    for side in ("first", "second"):
        sub.add_argument(f"--mapping-{side}", help=f"{_FUNCTION}; the mapping of the {side} one")
    sub.add_argument("--sampled", action="store_true", help="read 12,000 values of each tensor")
    _add_json(sub)
    about = "run post-processing twice and an update, and list the faults"
    sub = command("audit", _audit, about, "model.py:processed")
    sub.add_argument("model", help=f"{_FUNCTION}; it returns (model, process)")
    _add_json(sub)
    about = "find the pass and the change that make a model wrong"
    sub = command("bisect", _bisect, about, "model.py:build")
    sub.add_argument("model", help="as for explain")
    sub.add_argument(
        "--passes", action="append", default=[], help="FILE.py:CLASS, a pass that no package offers"
    )
    sub.add_argument("--script", default="fixpass_fault.py", help="the program that is written")
    _add_json(sub)


def _show(found: object, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(facts)
    else:
        print(found)


def _bisect(arguments: argparse.Namespace) -> int:
    from fixpass.bisection import find_fault, load_trial, script_for

    fault = find_fault(load_trial(arguments.model, arguments.passes))
    if fault is None:
        text = f"{arguments.model} computes the same values with fixpass as without a compiler"
        _show(text, {"fault": None}, arguments.json)
        return 0
    text, script = fault.text, None
    if fault.is_ours:
        script = arguments.script
        Path(script).write_text(script_for(fault, arguments.model, arguments.passes))
        text += f"\npython {script} shows the fault"
    _show(text, {"fault": asdict(fault), "script": script}, arguments.json)
    return 1


def _check(arguments: argparse.Namespace) -> int:
    with torch.device("meta"):
        model = load_function(arguments.model)()
    model = model[0] if isinstance(model, tuple) else model
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"{arguments.model} returned a {type(model).__name__}, not a module")
    found = check(arguments.checkpoint, model, _mapping(arguments.mapping), cast=arguments.cast)
    _show(found, asdict(found), arguments.json)
    return int(bool(found.faults))


def _diff(arguments: argparse.Namespace) -> int:
    mappings = _mapping(arguments.mapping_first), _mapping(arguments.mapping_second)
    found = diff(arguments.first, arguments.second, mappings, sampled=arguments.sampled)
    _show(found, asdict(found), arguments.json)
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
    faults = [finding._asdict() for finding in found.findings]
    facts = {"faults": faults, "num_tensors": len(found.census.entries)}
    _show(found, facts, arguments.json)
    return int(bool(found))
