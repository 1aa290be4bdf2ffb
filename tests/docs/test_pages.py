"""Every example of the documentation runs and prints what its page says.

`tests/helpers/pages.py` says how a page marks what is hidden, not run, or a file. `make pages`
writes the outputs, which are those of the torch of constraints.txt.
"""

import os
import re

import pytest
import torch

from helpers.pages import PAGES, ROOT, Page, parts

FULL = re.compile(r"^<!-- full: .+ -->$", re.MULTILINE)
PINNED = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def examples():
    """Pages and parts of pages; a slow one waits for `make test-full`."""
    for path in PAGES:
        for part in parts(path):
            title = re.search(r"^#+ (.+)$", part, re.MULTILINE)[1]
            marks = pytest.mark.full if FULL.search(part) else ()
            name = f"{path.relative_to(ROOT / 'docs')}, {title}"
            if "```python" in part or "<!-- hidden" in part:
                yield pytest.param(path, part, id=name, marks=marks)


@pytest.mark.parametrize(("path", "part"), examples())
def test_the_examples_of_a_page_print_what_it_says(path, part):
    text = Page(path, part).updated()
    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        path.write_text(path.read_text().replace(part, text))
    elif torch.__version__.split("+")[0] == PINNED:
        assert text.splitlines() == part.splitlines()
