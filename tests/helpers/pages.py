"""Run the examples of the documentation, and write what they print into the pages.

    make pages                                           # all pages
    PYTHONPATH=.:tests python -m helpers.pages docs/passes.md

A page is Markdown with these parts:

* A block ```python runs. The blocks of a page share one module and one temporary folder.
* `<!-- hidden` ... `-->` holds Python that runs and is not shown.
* `<!-- not run: REASON -->` in front of a block: the block is shown only.
* A block ```output holds what was printed since the last one, or since the page began.
* `<!-- file: PATH: COMMAND -->` in front of a block ```python: the block is the file. The command
  runs in the folder of the file, `python` being this one, and what it prints counts as printed.
  A file beside a pyproject.toml is a package, which is installed for the command.
* `<!-- full: REASON -->`: the page is run by `make test-full` only.
"""

import io
import os
import re
import shlex
import shutil
import sys
import tempfile
import types
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from fixpass import backend
from helpers.processes import run_python

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
PARTS = re.compile(
    r"(?:^<!-- (?P<note>not run|file): (?P<about>[^\n]*) -->\n)?"
    r"^(?P<fence>`{3,})(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)$"
    r"|^<!-- hidden\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
# What differs from run to run or from machine to machine.
VOLATILE = (
    (r"\w+\.md:\d+", "model.py:…"),
    (r"\d+(\.\d+)?( ?)(ms|us|s)\b", r"…\2\3"),
    (r"/tmp/\w+", "/tmp/…"),
)


@dataclass
class Page:
    """A page, or a part of it, while it runs."""

    path: Path
    source: str

    def __post_init__(self):
        self.module = types.ModuleType(f"page_{self.path.stem}")
        self.printed = io.StringIO()

    def updated(self):
        """The text with the files and the outputs of now."""
        environ, path = dict(os.environ), list(sys.path)
        # As in a new process, which each page costs seconds.
        backend._reports.clear()
        torch._dynamo.reset()
        sys.modules[self.module.__name__] = self.module
        try:
            with tempfile.TemporaryDirectory() as folder, chdir(folder):
                return PARTS.sub(self._part, self.source)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            os.environ.clear()
            os.environ.update(environ)
            sys.path[:] = path
            del sys.modules[self.module.__name__]

    def _part(self, found):
        if found["hidden"] is not None:
            self._run(found, "hidden")
        elif found["language"] == "output":
            return self._with_code(found, self._take_printed())
        elif found["note"] == "file":
            name, _, command = found["about"].partition(": ")
            self._run_command(ROOT / name, command)
            return self._with_code(found, (ROOT / name).read_text())
        elif found["language"] == "python" and found["note"] != "not run":
            self._run(found, "code")
        return found[0]

    def _run(self, found, group):
        """Run the code under the lines that it has on the page, so that errors name them."""
        before, _, _ = self.path.read_text().partition(found.string)
        line = (before + found.string[: found.start(group)]).count("\n")
        code = compile("\n" * line + found[group], str(self.path), "exec")
        with redirect_stdout(self.printed):
            exec(code, vars(self.module))

    def _run_command(self, file, command):
        program, *words = shlex.split(command)
        modules = {"python": (), "torchrun": ("-m", "torch.distributed.run", "--standalone")}
        path = [os.environ.get("PYTHONPATH", str(ROOT))]
        if (file.parent / "pyproject.toml").is_file():
            folder = _installed(file.parent)
            path.insert(0, str(folder))
        else:
            folder = file.parent
        words = [*modules[program], *words]
        self.printed.write(run_python(*words, cwd=folder, PYTHONPATH=os.pathsep.join(path)))

    def _take_printed(self):
        text, self.printed = self.printed.getvalue(), io.StringIO()
        for pattern, instead in VOLATILE:
            text = re.sub(pattern, instead, text)
        return "".join(f"{line.rstrip()}\n" for line in text.splitlines())

    def _with_code(self, found, code):
        start, stop = (found.start("code") - found.start(), found.end("code") - found.start())
        return found[0][:start] + code + found[0][stop:]


def _installed(package):
    """A folder with the package, as pip installs it."""
    shutil.copytree(package, "source", ignore=shutil.ignore_patterns("__pycache__"))
    words = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    run_python(*words, "--target", "installed", "./source")
    shutil.rmtree("source")
    return Path("installed").resolve()


def parts(path):
    """The parts of a page that share nothing: its sections where it shows files, else the page."""
    text = path.read_text()
    return re.split(r"^(?=## )", text, flags=re.MULTILINE) if "<!-- file: " in text else [text]


def main():
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or PAGES
    for path in chosen:
        print(path.relative_to(ROOT), flush=True)
        path.write_text("".join(Page(path, part).updated() for part in parts(path)))


if __name__ == "__main__":
    main()
