"""`python -m fixpass explain`: the report of a model as text, JSON or a diff of its graphs."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from fixpass.config import pass_names
from fixpass.explanation import explain_with
from fixpass.model_loading import FORMS, load_model
from fixpass.passes.remarks import Report
from fixpass.report.expected import assert_fired, is_at
from fixpass.report.html import to_html
from fixpass.report.recording import Recorder
from fixpass.report.tables import progress
from fixpass.runtime.errors import ConfigError

EXAMPLE = "model.py:build --target rocm:gfx942 --html report.html"


def add_arguments(parser: argparse.ArgumentParser, targets: str) -> None:
    """The options of the command."""
    parser.add_argument("model", help=f"{FORMS}; a function returns (model, args[, kwargs])")
    parser.add_argument("--target", help=f"a device that need not be here: {targets}")
    several: dict[str, Any] = {"action": "append", "default": []}
    setting = "an entry of the config of hf:CLASS, such as hidden_size=256"
    parser.add_argument("--set", **several, metavar="NAME=VALUE", help=setting)
    parser.add_argument("--dynamic", action="store_true", help="trace with symbolic shapes")
    parser.add_argument("--train", action="store_true", help="trace forward and backward")
    parser.add_argument("--pass", **several, dest="passes", metavar="NAME", help="show this pass")
    sites = "show the modules whose path ends so, such as q_norm"
    parser.add_argument("--only", metavar="SITE", help=sites)
    expected = "fail where a site did not get this kernel or pass"
    parser.add_argument("--expect", **several, metavar="SITE=KERNEL", help=expected)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the report as JSON")
    shown.add_argument("--diff", action="store_true", help="print what each pass changed")
    parser.add_argument("--html", metavar="FILE", help="write a page too, one file without links")


def run(arguments: argparse.Namespace) -> int:
    """Explain the model and print what was asked for. Progress goes to stderr."""
    _check_names(arguments.passes)
    expect = dict(map(_expectation, arguments.expect))
    with progress() as say:
        report, recorder = _explained(arguments, say)
        shown = _selected(report, tuple(arguments.passes), arguments.only)
        if not shown.remarks:
            say("no remark is left of these passes at these sites")
        if recorder and arguments.html:
            say(f"writing {arguments.html}")
            Path(arguments.html).write_text(to_html(report, recorder), encoding="utf-8")
    if recorder and arguments.diff:
        print(recorder.diffs(tuple(arguments.passes)), end="")
    else:
        print(shown.to_json() if arguments.json else shown.text(with_lines=True))
    assert_fired(report, expect)
    return 0


def _explained(
    arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[Report, Recorder | None]:
    """The report, and the graphs where they are to be shown."""
    say(f"loading {arguments.model}")
    loaded = load_model(arguments.model, arguments.set)
    if arguments.train and isinstance(loaded.model, nn.Module):
        loaded.model.train()
    say(f"tracing {_describe(loaded.model)}")
    start = perf_counter()
    recorder = Recorder() if arguments.diff or arguments.html else None
    with torch.set_grad_enabled(arguments.train):
        report = explain_with(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            target=arguments.target,
            dynamic=arguments.dynamic or None,
            backward=arguments.train,
            recorder=recorder,
            say=say,
        )
    say(f"done in {perf_counter() - start:.1f} s")
    return report, recorder


def _selected(report: Report, passes: tuple[str, ...], site: str | None) -> Report:
    """The remarks of these passes at this site; the first sentence stays that of the model."""
    kept = [
        remark
        for remark in report.remarks
        if (not passes or remark.pass_name in passes) and (site is None or is_at(remark, site))
    ]
    return replace(report, remarks=tuple(kept))


def _check_names(names: list[str]) -> None:
    known = pass_names()
    for name in names:
        if name not in known:
            raise ConfigError(f"--pass: unknown {name!r}; known: {', '.join(known)}")


def _expectation(text: str) -> tuple[str, str]:
    site, equals, kernel = text.partition("=")
    if not equals:
        raise ConfigError(f"--expect {text!r}: say SITE=KERNEL")
    return site, kernel


def _describe(model: object) -> str:
    if not isinstance(model, nn.Module):
        return "a function"
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__}, {count:,} parameters"
