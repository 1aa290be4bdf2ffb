"""Run the default tests with each version of torch, and write the table in `docs/versions.md`.

    make versions
    make versions VERSIONS="2.11 2.14"
    make versions VERSIONS="2.11 --workers 1 --keep"

There is one environment at a time, in `.versions`. `constraints-2.11.txt` holds the packages that
move with torch 2.11; its lines win over those of `constraints.txt`. Its comment names the Python.
A version that does not run keeps its row. `--keep` leaves the environment, and the next run takes
it as it is.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
PAGE, PLACE = ROOT / "docs/versions.md", ROOT / ".versions"
PYTHON, PINS, JUNIT = PLACE / "bin/python", PLACE / "constraints.txt", PLACE / "junit.xml"
START, END = "<!-- versions -->", "<!-- end of versions -->"
HEAD = """| torch | triton | transformers | Python | commit of | passed | failed | skipped | time |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
MOVING = ("torch", "triton", "transformers")
# As `make test` sets them: threads of torch and of Inductor would fight with pytest's workers.
THREADS = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "FIXPASS_VERIFY": "1"}


@dataclass(frozen=True)
class Outcome:
    """What one run of the tests gave."""

    passed: int
    failed: tuple[str, ...]
    skipped: int
    minutes: float

    @staticmethod
    def of(junit):
        """The outcome that a JUnit file records."""
        suite = ElementTree.parse(junit).getroot().find("testsuite")
        cases = list(suite.iter("testcase"))
        failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
        skipped = sum(case.find("skipped") is not None for case in cases)
        names = tuple(f"{case.get('classname')}::{case.get('name')}" for case in failed)
        minutes = float(suite.get("time")) / 60
        return Outcome(len(cases) - len(failed) - skipped, names, skipped, minutes)

    def __str__(self):
        counts = f"{self.passed:,} passed, {len(self.failed)} failed, {self.skipped} skipped"
        return f"{counts} in {self.minutes:.0f} min"


def versions():
    """The versions that have constraints of their own, such as 2.11."""
    return sorted(path.stem.partition("-")[2] for path in ROOT.glob("constraints-*.txt"))


def constraints(version):
    """Version by package, for one version of torch."""
    found = {}
    for path in (ROOT / "constraints.txt", ROOT / f"constraints-{version}.txt"):
        found |= dict(re.findall(r"^([\w-]+)==(\S+)", path.read_text(), re.MULTILINE))
    return found


def python_of(version):
    """The Python that the constraints of a version name: 3.11."""
    text = (ROOT / f"constraints-{version}.txt").read_text()
    return re.search(r"Python (3\.\d+)", text).group(1)


def commit_date():
    """The day of the commit that this checkout holds: 2026-11-28."""
    words = ["git", "-C", ROOT, "log", "-1", "--format=%cs"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def row(version, outcome, day):
    """The line of the table, for a run of a commit of `day`."""
    pins = constraints(version)
    cells = [*(pins[name] for name in MOVING), python_of(version), day, f"{outcome.passed:,}"]
    cells += [str(len(outcome.failed)), str(outcome.skipped), f"{outcome.minutes:.0f} min"]
    return f"| {' | '.join(cells)} |"


def page(text, version, line, failed):
    """The page with another row and other failures for one version."""
    head, rest = text.split(START)
    old, end = rest.split(END)
    lines = old.splitlines()
    ours = (f"| {version}.", f"- torch {version}: ")
    kept = [each for each in lines if each.startswith(("| 2.", "- ")) and not each.startswith(ours)]
    rows = sorted([line, *(each for each in kept if each.startswith("|"))])
    names = sorted([*(f"- torch {version}: `{name}`" for name in failed),
                    *(each for each in kept if each.startswith("-"))])  # fmt: skip
    lists = ["", *names] if names else []
    return "\n".join([f"{head}{START}", "", HEAD, *rows, *lists, f"{END}{end}"])


def say(version, began, text):
    """Print one line with the minutes since the start."""
    print(f"[torch {version}, {(time.monotonic() - began) / 60:.1f} min] {text}", flush=True)


def make_environment(version):
    """Install the packages of one version, and this checkout, in `.versions`."""
    python = shutil.which(f"python{python_of(version)}")
    if python is None:
        raise SystemExit(f"torch {version} is tested with Python {python_of(version)}: install it")
    shutil.rmtree(PLACE, ignore_errors=True)
    subprocess.run([python, "-m", "venv", PLACE], check=True)
    PINS.write_text("".join(f"{name}=={pin}\n" for name, pin in constraints(version).items()))
    pip = [PYTHON, "-m", "pip", "install", "-qq", "-c", PINS]
    subprocess.run([*pip, "pip"], check=True)
    subprocess.run([*pip, "-e", ".", "--group", "dev"], cwd=ROOT, check=True)


def run_tests(workers):
    """Run the default tests in the environment."""
    words = f"-P -m pytest -q -n {workers} --durations=15 -o faulthandler_timeout=300".split()
    words += ["-m", "not full", f"--junit-xml={JUNIT}"]
    environ = {**os.environ, **THREADS}
    subprocess.run([PYTHON, *words], cwd=ROOT, env=environ, check=False)
    return Outcome.of(JUNIT)


def run(version, workers, keep):
    """Make the environment, run the tests in it, write the page, and delete the environment."""
    began, moving = time.monotonic(), {name: constraints(version)[name] for name in MOVING}
    try:
        if not keep or not JUNIT.parent.exists():
            say(version, began, f"making an environment of {moving}: some minutes, up to 5 GB")
            make_environment(version)
        say(version, began, f"running the tests with {workers} workers: up to an hour")
        outcome = run_tests(workers)
        line = row(version, outcome, commit_date())
        PAGE.write_text(page(PAGE.read_text(), version, line, outcome.failed))
        say(version, began, f"{outcome}; docs/versions.md has the row")
        return outcome
    finally:
        if not keep:
            shutil.rmtree(PLACE, ignore_errors=True)


def main(words):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=versions())
    parser.add_argument("--workers", type=int, default=2, help="of pytest")
    parser.add_argument("--keep", action="store_true", help="keep the environment")
    given = parser.parse_args(words)
    if unknown := set(given.versions) - set(versions()):
        parser.error(f"there are no constraints of {sorted(unknown)}; known: {versions()}")
    return int(any(run(each, given.workers, given.keep).failed for each in given.versions))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
