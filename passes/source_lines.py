"""The lines of the user's model behind a node: which call of the model made it.

Dynamo records the stack of each operation. Lines of PyTorch are left out, and so are the lines
inside a norm's own class: the line that calls the norm decides the layout that it reads.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'  File "(.+)", line (\d+), in (.+)\n(?:    (?! *\^)(.*))?')
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class SourceLine:
    """One line of the model's source, in a call that Dynamo traced."""

    path: str
    number: int
    function: str
    code: str = ""
    """The text of the line; empty where Python had no source."""

    @property
    def short_path(self) -> str:
        """The path inside of the installed packages; the whole path for another file."""
        return self.path.rpartition("/site-packages/")[2]

    def __str__(self) -> str:
        return f"{Path(self.path).name}:{self.number}"


def source_lines(node: fx.Node) -> tuple[SourceLine, ...]:
    """The calls that lead to `node`, outermost first; empty where Dynamo recorded none."""
    name, cls = _owner(node)
    found = _parse(node.meta.get("stack_trace") or "")
    if "norm" not in cls.lower():
        return found
    calls = re.compile(rf"\b{name}\b\s*\(")
    callers = [i for i, line in enumerate(found) if calls.search(line.code)]
    return found[: callers[-1] + 1] if callers else found


def _owner(node: fx.Node) -> tuple[str, str]:
    """The attribute and the class of the module that the node came from."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    path, cls = list(stack.values())[-1]
    return re.findall(r"\w+", str(path))[-1], str(cls).rpartition(".")[2]


# The layers of a model share their lines, and the remarks of a report share the parsed ones.
@lru_cache(maxsize=1024)
def _parse(stack_trace: str) -> tuple[SourceLine, ...]:
    found = (match.groups("") for match in _FRAME.finditer(stack_trace))
    return tuple(
        SourceLine(path, int(number), function, code.strip())
        for path, number, function, code in found
        if not path.startswith(_TORCH)
    )
