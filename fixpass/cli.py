"""The command line: `python -m fixpass explain`, check, diff, audit, passes, kernels, doctor."""

import argparse
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

import fixpass
from fixpass.lowering.contract import Kernel
from fixpass.lowering.contract_table import add_kernels, rows_of
from fixpass.lowering.target import CPU, TARGETS
from fixpass.passes import default_passes, entry_passes
from fixpass.pipelines import installed_kernels, installed_passes
from fixpass.runtime.errors import ConfigError, FixpassError
from fixpass.runtime.providers import TRITON
from fixpass.runtime.versions import check_torch
from fixpass.runtime.weights.audit import audit
from fixpass.runtime.weights.compare import diff
from fixpass.runtime.weights.doctor import check
from fixpass.runtime.weights.mapping import Mapping

_LIBRARY = {"_C": "vllm"}
"""The package that registers the ops of a namespace, where the names differ."""


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

    sub = command("explain", _explain, "report how fixpass would change a model, and why not more")
    sub.add_argument(
        "model", help="FILE.py:FUNCTION or MODULE:FUNCTION; it returns (model, args[, kwargs])"
    )
    sub.add_argument("--target", help=f"a device that need not be here: {names}")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")
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
    command("kernels", _kernels, "list the norm kernels and the constraints of each")
    command("doctor", _doctor, "list what works on this machine, and the way out where it does not")
    return parser


def _explain(arguments: argparse.Namespace) -> int:
    model, args, kwargs = load_model(arguments.model)
    with torch.no_grad():
        report = fixpass.explain(model, *args, target=arguments.target, **kwargs)
    print(report.to_json() if arguments.json else report)
    return 0


def _bisect(arguments: argparse.Namespace) -> int:
    from fixpass.bisection import find_fault, script_for

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


def load_model(name: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model and the arguments that the function of this name returns."""
    given = load_function(name)()
    if not isinstance(given, tuple) or len(given) not in (2, 3) or not isinstance(given[1], tuple):
        raise ConfigError(
            f"{name} has to return (model, args) or (model, args, kwargs) with a tuple "
            "args, for example (model, (tokens,))"
        )
    model, args, kwargs = (*given, {})[:3]
    return model, args, kwargs


def load_trial(name: str, passes: Sequence[str] = ()) -> Any:
    """A model with its arguments and passes, for `fixpass.bisection`."""
    from fixpass.bisection import Trial

    return Trial(*load_model(name), tuple(load_function(step)() for step in passes))


def load_function(name: str) -> Callable[[], Any]:
    """Import the function that `FILE.py:FUNCTION` or `MODULE:FUNCTION` names.

    Raises:
        ConfigError: the name has another form, or there is no such file, module or function.
    """
    place, _, function = name.rpartition(":")
    if not place:
        raise ConfigError(f"{name!r}: say FILE.py:FUNCTION or MODULE:FUNCTION")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    found: Callable[[], Any] | None = vars(module).get(function)
    if not callable(found):
        raise ConfigError(f"{place} has no function {function!r}")
    return found


def _load_file(path: Path) -> ModuleType:
    """Import a file from any folder, under a name that no installed module has.

    Dynamo imports the module of a class by its name, so the module is in `sys.modules`. The file
    may import its neighbours: its folder comes last on `sys.path`.
    """
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    name = f"fixpass_explained_{re.sub(r'[^a-zA-Z0-9]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python module")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"there is no module {error.name!r} on sys.path") from None


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


def _kernels(_: argparse.Namespace) -> int:
    for kernel in _known_kernels():
        print(f"{kernel.name} computes {kernel.op}  [{kernel.contract.source}]")
        for constraint in kernel.contract.constraints:
            print(f"    {constraint}")
    return 0


def _doctor(_: argparse.Namespace) -> int:
    check_torch()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"fixpass {fixpass.__version__}, torch {torch.__version__}, device {device}")
    groups: dict[str, list[str]] = {_way_out_of_inductor(): ["inductor"]}
    for kernel in dict.fromkeys(row.name for row in _known_kernels() if row.name != "inductor"):
        groups.setdefault(_way_out(kernel), []).append(kernel)
    for way_out, kernels in groups.items():
        print(f"{'does not work:' if way_out else 'works:':<16}{', '.join(kernels)}")
        if way_out:
            print(f"{'  to use them:':<16}{way_out}")
    return 0


def _way_out_of_inductor() -> str:
    """The way out where Inductor cannot compile for CPU, else ""."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "install a C++ compiler such as g++, or set CXX"
    return ""


def _way_out(kernel: str) -> str:
    """The way out where `kernel` is not installed, else ""."""
    rows = rows_of(kernel)
    if any(row.is_installed for row in rows):
        return ""
    library = rows[-1].needs.partition("::")[0]
    if library == TRITON:
        return f"have {TRITON}"
    return f"install {_LIBRARY.get(library, library)}, and import it before fixpass compiles"


def _known_kernels() -> tuple[Kernel, ...]:
    """Our kernels and those of installed packages."""
    add_kernels(installed_kernels())
    return rows_of()
