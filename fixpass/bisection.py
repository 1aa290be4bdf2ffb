"""`python -m fixpass bisect`: the pass and the change that make a model compute other numbers.

First `verify="values"` checks every graph. Then torch's `CompilerBisector` compiles the model with
torch's own backends, and with fixpass with fewer and fewer changes, to find a fault that only
compiled code shows.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor.compiler_bisector import BisectionResult, CompilerBisector
from torch.utils import _pytree as pytree

from fixpass.backend import compile, last_reports
from fixpass.model_loading import load_function, load_model
from fixpass.passes.base import Pass, Remark
from fixpass.passes.bisect import BACKEND, register
from fixpass.passes.values import RoundedValues
from fixpass.runtime.errors import PassError

CHECKS = {"verify": "values", "strict": True, "lower": "eager"}
"""Options under which a pass that changes a value raises."""


@dataclass(frozen=True)
class BisectedFault:
    """A fault that was found."""

    text: str
    limit: int | None = None
    """The number of the wrong change, or None where `CHECKS` show the fault."""
    subsystem: str = ""
    is_ours: bool = True


@dataclass(frozen=True)
class Trial:
    """A model with its arguments, passes of other people, and the values that it gives in eager."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    passes: tuple[Pass, ...] = ()
    remarks: dict[int, list[Remark]] = field(default_factory=dict)
    """What was applied in each run, by the last change that the run was allowed."""

    @property
    def options(self) -> dict[str, Any]:
        return {"passes": self.passes} if self.passes else {}

    def values(self) -> RoundedValues:
        """The results of the model, and its tensor arguments afterwards, without a compiler."""

        def run(mode: AbstractContextManager[Any]) -> list[Any]:
            return self._call(lambda model: model, mode)

        return RoundedValues.of(run)

    def pass_fault(self) -> str:
        """The error of the first pass that fails or changes a value; empty where none does."""
        try:
            self._compiled(CHECKS)
        # The model may also fail for another reason: that is no fault of a pass.
        except Exception as error:
            return str(found) if isinstance(found := _root(error), PassError) else ""
        return ""

    def fault(self, values: RoundedValues) -> str:
        """What is wrong with the compiled model; empty where nothing is."""
        try:
            return values.fault_of(self._compiled({}))
        # A fault may show as an error of any kind.
        except Exception as error:
            found = _root(error)
            return f"{type(found).__name__}: {str(found).partition(chr(10))[0]}"

    def _compiled(self, options: dict[str, Any]) -> list[Any]:
        torch._dynamo.reset()
        seen = last_reports()
        leaves = self._call(lambda model: compile(model, **self.options | options))
        new = [report for report in last_reports() if all(report is not old for old in seen)]
        self.remarks[_allowed()] = [r for report in new for r in report.of_kind("applied")]
        return leaves

    def _call(
        self,
        prepared: Callable[[Any], Callable[..., Any]],
        mode: AbstractContextManager[Any] | None = None,
    ) -> list[Any]:
        model, args, kwargs = copy.deepcopy((self.model, self.args, self.kwargs))
        fn = prepared(model)
        torch.manual_seed(0)
        with torch.no_grad():
            if mode is None:
                result = fn(*args, **kwargs)
            else:
                with mode:
                    result = fn(*args, **kwargs)
        return pytree.tree_leaves((result, args, kwargs))


def load_trial(name: str, passes: Sequence[str] = ()) -> Trial:
    """The model that a word of the command line names, with passes named `FILE.py:CLASS`."""
    loaded = load_model(name)
    made: list[Any] = [load_function(step)() for step in passes]
    return Trial(loaded.model, loaded.args, loaded.kwargs, tuple(made))


def find_fault(trial: Trial) -> BisectedFault | None:
    """The first wrong change, or None where the compiled model is right."""
    values = trial.values()
    if text := trial.pass_fault():
        return BisectedFault(text)
    if not (text := trial.fault(values)):
        return None
    register()
    with redirect_stdout(sys.stderr):
        found = CompilerBisector.do_bisect(lambda: not trial.fault(values))
    if found is None:
        return BisectedFault(
            f"{text}; the fault does not show again under torch's bisector", is_ours=False
        )
    return _described(found, trial, text)


def compare(trial: Trial) -> int:
    """Print whether the compiled model is right; the exit status is 1 where it is wrong."""
    fault = trial.pass_fault() if _allowed() < 0 else trial.fault(trial.values())
    print(f"FAIL {fault}" if fault else "PASS")
    return 1 if fault else 0


def script_for(fault: BisectedFault, model: str, passes: Sequence[str]) -> str:
    """A program that shows the fault; with `--without` it leaves the wrong change out."""
    limit = "" if fault.limit is None else _LIMIT.format(BACKEND, fault)
    trial = f"load_trial({model!r}, {list(passes)!r})"
    imports = "import os\nimport sys\n" if limit else "import sys\n"
    return f'"""{fault.text}"""\n\n{imports}\n{limit}{_COMPARE.format(trial)}'


_LIMIT = """\
# Changes up to this number are made. "--without" leaves the wrong one out.
LIMIT = {1.limit} - ("--without" in sys.argv)
os.environ["TORCH_BISECT_BACKEND"] = "{0}"
os.environ["TORCH_BISECT_SUBSYSTEM"] = "{1.subsystem}"
os.environ["TORCH_BISECT_MAX"] = str(LIMIT)

"""
_COMPARE = """\
from fixpass.bisection import compare, load_trial

sys.exit(compare({}))
"""


def _described(found: BisectionResult, trial: Trial, text: str) -> BisectedFault:
    part = f", {found.subsystem}" if found.subsystem else ""
    if found.backend != BACKEND or found.bisect_number is None:
        return BisectedFault(
            f"{text}; torch's backend {found.backend}{part} does it too", is_ours=False
        )
    number, name = found.bisect_number, found.debug_info
    what = "change" if found.subsystem == "changes" else "pass"
    before = trial.remarks.get(number - 1, [])
    after = trial.remarks.get(number, [])
    new = next((r for r in after if r not in before), None)
    shown = f" ({new.node}: {new.text})" if new and what == "change" else ""
    return BisectedFault(
        f"{text}; the first wrong {what} is number {number + 1}, of {name}{shown}",
        number,
        found.subsystem or "",
    )


def _allowed() -> int:
    """The number of the last change that torch's bisector allows in this run; -1 without it."""
    backend, subsystem = CompilerBisector.get_backend(), CompilerBisector.get_subsystem()
    if backend != BACKEND or not subsystem:
        return -1
    if CompilerBisector.get_run_state(backend, subsystem) != "bisect":
        return sys.maxsize
    low, high = CompilerBisector.get_bisect_range(backend, subsystem)
    return (low + high) // 2


def _root(error: BaseException) -> BaseException:
    """The error behind those of Dynamo and Inductor; a pass's error where there is one."""
    while not isinstance(error, PassError):
        behind = getattr(error, "inner_exception", None) or error.__cause__
        if behind is None:
            break
        error = behind
    return error
