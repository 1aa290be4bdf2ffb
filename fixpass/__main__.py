"""The command line: `python -m fixpass explain | demo | passes | kernels | doctor`."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fixpass
from fixpass.lowering.contract_table import CONTRACTS
from fixpass.lowering.target import CPU, TARGETS, target_named
from fixpass.passes import default_passes, entry_passes
from fixpass.pipelines import check_torch, installed_passes
from fixpass.runtime.errors import ConfigError, FixpassError
from fixpass.runtime.providers import PROVIDERS, is_available


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except FixpassError as error:
        print(f"fixpass: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fixpass", description=fixpass.__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    names = ", ".join(target.name for target in TARGETS)

    def command(name: str, run: Callable[..., int], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    sub = command("explain", _explain, "report what fixpass would do to a model, and why not")
    sub.add_argument("model", help="FILE.py:FUNCTION or MODULE:FUNCTION giving (model, args)")
    sub.add_argument("--target", help=f"a device that need not be here: {names}")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")
    command("demo", _demo, "compile, explain, check and time a small Qwen3")
    command("passes", _passes, "list the passes in the order in which they run")
    sub = command("kernels", _kernels, "list the norm kernels and what each accepts")
    sub.add_argument("--target", help="compile ours for a device that need not be here; or all")
    sub.add_argument("--write", type=Path, help="the document whose table to replace")
    command("doctor", _doctor, "say what is installed and what fixpass can use of it")
    return parser


def _explain(arguments: argparse.Namespace) -> int:
    model, args, *kwargs = load_function(arguments.model)()
    with torch.no_grad():
        report = fixpass.explain(
            model, *args, target=arguments.target, **(kwargs[0] if kwargs else {})
        )
    print(report.to_json() if arguments.json else report)
    return 0


def load_function(name: str) -> Callable[[], Any]:
    """The function that `FILE.py:FUNCTION` or `MODULE:FUNCTION` names."""
    place, _, function = name.rpartition(":")
    if not place:
        raise ConfigError(f"{name!r}: say FILE.py:FUNCTION or MODULE:FUNCTION")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not Path(place).exists():
            raise ConfigError(f"there is no file {place}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    if function not in vars(module):
        raise ConfigError(f"{place} has no function {function!r}")
    found: Callable[[], Any] = vars(module)[function]
    return found


def _demo(_: argparse.Namespace) -> int:
    from fixpass.demo import main as demo

    return demo()


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
    if arguments.target:
        return _compile_kernels(arguments)
    for contract in CONTRACTS:
        print(f"{contract.kernel} computes {contract.op}  [{contract.source}]")
        for constraint in contract.constraints:
            print(f"    {constraint}")
    return 0


def _compile_kernels(arguments: argparse.Namespace) -> int:
    """Registers, spills, shared memory and the width of each access, from the machine code."""
    from benchmarks.machine_code import kernels_command

    if arguments.target != "all" and target_named(arguments.target).device_type == "cpu":
        raise ConfigError("on the CPU Inductor compiles the norms: there is no kernel of ours")
    return kernels_command(arguments.target, write=arguments.write)


def _doctor(_: argparse.Namespace) -> int:
    check_torch()
    print(f"fixpass {fixpass.__version__}, torch {torch.__version__}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, CPU only"
    print(f"accelerator: {device}")
    for kernel, provider in PROVIDERS.items():
        state = "available" if is_available(kernel) else f"not loaded (needs {provider.needs})"
        print(f"    {kernel:<26} {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
