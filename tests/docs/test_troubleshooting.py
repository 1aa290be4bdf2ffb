"""docs/troubleshooting.md has each error class, and its messages are those of the sources."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
LAYERS = ("fixpass", "passes", "lowering", "runtime")
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE.partition("## FixpassError")[2], re.MULTILINE)
# A literal of C++ that goes on in the next line.
BROKEN = re.compile(r'"\s*\n\s*"')


def sources():
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def rendered(node):
    """A string of the source with `…` for what it has at run time; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(rendered(value) or "…" for value in node.values)
    return None


def texts():
    """Every string of the sources, and the C++ files."""
    trees = [ast.parse(path.read_text()) for path in sources()]
    found = {rendered(node) for tree in trees for node in ast.walk(tree)} - {None, ""}
    native = sorted((ROOT / "runtime/csrc").rglob("*.*"))
    return [*sorted(found), *(BROKEN.sub("", path.read_text()) for path in native)]


def classes():
    """The public errors and warnings that the sources define."""
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            bases = [ast.unparse(base) for base in getattr(node, "bases", ())]
            is_error = any(base.endswith(("Error", "Warning", "Exception")) for base in bases)
            if isinstance(node, ast.ClassDef) and is_error and "runtime" in path.parts:
                yield node.name


def says(text, message):
    """Whether the parts of the message between its gaps stand in the text, in this order."""
    position = 0
    for piece in message.split("…"):
        position = text.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return True


def test_each_error_class_has_a_section():
    assert [name for name in sorted(set(classes())) if f"\n## {name}\n" not in PAGE] == []


def test_the_messages_of_the_page_are_those_of_the_sources():
    assert len(MESSAGES) > 90
    found = texts()
    assert [line for line in MESSAGES if not any(says(text, line) for text in found)] == []
