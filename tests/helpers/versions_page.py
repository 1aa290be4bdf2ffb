"""Run the default tests with each version of torch, and write the table in `docs/versions.md`.

    make versions
    make versions VERSIONS="2.11 2.14"

There is one environment at a time, in `.versions`. `constraints-2.11.txt` holds the packages that
move with torch 2.11; its lines win over those of `constraints.txt`. Its comment names the Python.
"""

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
START, END = "<!-- versions -->", "<!-- end of versions -->"
MOVING = ("torch", "triton", "transformers")


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
    """The Python that the constraints of a version name: 3.12."""
    text = (ROOT / f"constraints-{version}.txt").read_text()
    return re.search(r"Python (3\.\d+)", text).group(1)


def row(version, outcome):
    """The line of the table."""
    pins = constraints(version)
    cells = [*(pins[name] for name in MOVING), python_of(version), f"{outcome.passed:,}"]
    cells += [str(len(outcome.failed)), str(outcome.skipped), f"{outcome.minutes:.0f} min"]
    return f"| {' | '.join(cells)} |"


def run(version):
    """Make the environment, run the tests in it, and delete it."""
    python = shutil.which(f"python{python_of(version)}")
    if python is None:
        raise SystemExit(f"torch {version} is tested with Python {python_of(version)}: install it")
    shutil.rmtree(PLACE, ignore_errors=True)
    try:
        print(f"[{version}] making an environment: some minutes, up to 3 GB of packages")
        subprocess.run([python, "-m", "venv", PLACE], check=True)
        pins, junit = PLACE / "constraints.txt", PLACE / "junit.xml"
        pins.write_text("".join(f"{name}=={pin}\n" for name, pin in constraints(version).items()))
        pip = [PLACE / "bin/python", "-m", "pip", "install", "-qq", "-c", pins]
        subprocess.run([*pip, "pip"], check=True)
        subprocess.run([*pip, "-e", ".", "--group", "dev"], cwd=ROOT, check=True)
        print(f"[{version}] running the tests")
        words = ["-P", "-m", "pytest", "-q", "-n", "2", "-m", "not full", f"--junit-xml={junit}"]
        subprocess.run([PLACE / "bin/python", *words], cwd=ROOT, check=False)
        return Outcome.of(junit)
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)


def page(text, lines):
    """The page with other lines between its marks."""
    head, rest = text.split(START)
    return f"{head}{START}\n{lines}\n{END}{rest.partition(END)[2]}"


def main(names):
    lines = ["| torch | triton | transformers | Python | passed | failed | skipped | time |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    failed = []
    for version in names or versions():
        began = time.monotonic()
        outcome = run(version)
        print(f"[{version}] {(time.monotonic() - began) / 60:.0f} min with the environment")
        lines.append(row(version, outcome))
        failed += [f"- torch {version}: `{name}`" for name in outcome.failed]
    PAGE.write_text(page(PAGE.read_text(), "\n".join(["", *lines, "", *failed])))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
