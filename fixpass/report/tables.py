"""Tables and progress of commands: rich in a terminal, plain text elsewhere, Markdown in files.

`NO_COLOR` takes the colours away, as rich reads it. Programs read `--json`.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_WIDTH = 100_000
"""Columns of a pipe or a file: nothing is wrapped or cut there."""
_STYLES = {
    "works": "green",
    "better": "green",
    "holds": "green",
    "does not work": "red",
    "worse": "red",
    "MISSED": "red",
    "missing": "yellow",
}
"""The style of a cell that holds one of these words alone."""


@dataclass(frozen=True)
class TextTable:
    """Rows of text under named columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""

    @staticmethod
    def of(records: Sequence[Mapping[str, Any]], title: str = "") -> "TextTable":
        """One row a record; a list has a line for each entry. Empty columns are left out."""
        keys = dict.fromkeys(key for record in records for key in record)
        filled = [key for key in keys if any(_cell(record.get(key, "")) for record in records)]
        rows = (tuple(_cell(record.get(key, "")) for key in filled) for record in records)
        return TextTable(tuple(filled), tuple(rows), title)

    def markdown(self) -> str:
        """The table as Markdown, without its title."""
        lines = [
            markdown_line(self.columns),
            f"|{' --- |' * len(self.columns)}",
            *map(markdown_line, self.rows),
        ]
        return "\n".join(lines)

    def show(self) -> None:
        """Print the table to stdout."""
        console = Console(highlight=False)
        if console.is_terminal:
            console.print(self._rich(box.SIMPLE_HEAD))
            return
        # Rich fills each cell to the width of its column; plain text has no spaces at line ends.
        console.width = _WIDTH
        with console.capture() as captured:
            console.print(self._rich(None))
        print("\n".join(line.rstrip() for line in captured.get().splitlines()))

    def _rich(self, lines: box.Box | None) -> Table:
        title = Text(self.title, style="bold") if self.title else None
        shown = Table(box=lines, pad_edge=False, title=title, title_justify="left")
        for column in self.columns:
            shown.add_column(Text(column), overflow="fold")
        for row in self.rows:
            shown.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        return shown


def show_records(
    records: Sequence[Mapping[str, Any]], *, as_json: bool = False, title: str = ""
) -> None:
    """Print records to stdout: a table, or JSON."""
    if as_json:
        show_json(list(records))
    else:
        TextTable.of(records, title).show()


def show_json(facts: Any) -> None:
    """Print facts to stdout as JSON."""
    print(json.dumps(facts, indent=2))


@contextmanager
def progress(program: str = "fixpass") -> Iterator[Callable[[str], None]]:
    """A function that says on stderr what runs now.

    A terminal shows each step with a clock that runs until the next step. Elsewhere a step is one
    line, such as `fixpass: tracing Qwen3`.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: print(f"{program}: {text}", file=sys.stderr, flush=True)
        return
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}", markup=False))
    with Progress(*columns, TimeElapsedColumn(), console=console) as shown:

        def say(text: str) -> None:
            for task in shown.task_ids:
                shown.update(task, total=1, completed=1)
            shown.add_task(text, total=None)

        yield say
        for task in shown.task_ids:
            shown.update(task, total=1, completed=1)


def _cell(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def markdown_line(cells: Sequence[object]) -> str:
    """One row of a Markdown table."""
    texts = (str(cell).replace("|", "/").replace("\n", "; ") for cell in cells)
    return f"| {' | '.join(texts)} |"
