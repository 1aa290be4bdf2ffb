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
* `<!-- full: REASON -->`: the page is run by `make test-full` only.
"""

import io
import os
import re
import shlex
import sys
import tempfile
import types
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

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
VOLATILE = ((r"\d+(\.\d+)? (ms|us|s)\b", r"… \2"), (r"/tmp/\w+", "/tmp/…"))


@dataclass
class Page:
    """A page while it runs. `text` becomes the page with what was printed."""

    path: Path

    def __post_init__(self):
        self.module = types.ModuleType(f"page_{self.path.stem}")
        self.printed = io.StringIO()

    def updated(self):
        """The text of the page with the files and the outputs of now."""
        source = self.path.read_text()
        environ, path = dict(os.environ), list(sys.path)
        sys.modules[self.module.__name__] = self.module
        try:
            with tempfile.TemporaryDirectory() as folder, chdir(folder):
                return PARTS.sub(self._part, source)
        finally:
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
        line = found.string.count("\n", 0, found.start(group))
        code = compile("\n" * line + found[group], str(self.path), "exec")
        with redirect_stdout(self.printed):
            exec(code, vars(self.module))

    def _run_command(self, file, command):
        program, *words = shlex.split(command)
        modules = {"python": (), "torchrun": ("-m", "torch.distributed.run", "--standalone")}
        folders = os.pathsep.join([str(file.parent), os.environ.get("PYTHONPATH", str(ROOT))])
        words = [*modules[program], *words]
        self.printed.write(run_python(*words, cwd=file.parent, PYTHONPATH=folders))

    def _take_printed(self):
        text, self.printed = self.printed.getvalue(), io.StringIO()
        for pattern, instead in VOLATILE:
            text = re.sub(pattern, instead, text)
        return "".join(f"{line.rstrip()}\n" for line in text.splitlines())

    def _with_code(self, found, code):
        start, stop = (found.start("code") - found.start(), found.end("code") - found.start())
        return found[0][:start] + code + found[0][stop:]


def main():
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or PAGES
    for path in chosen:
        print(path.relative_to(ROOT), flush=True)
        path.write_text(Page(path).updated())


if __name__ == "__main__":
    main()
