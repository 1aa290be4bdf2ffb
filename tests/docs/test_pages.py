"""Every example of the documentation runs and prints what its page says.

`tests/helpers/pages.py` says how a page marks what is hidden, not run, or a file. `make pages`
writes the outputs.
"""

import os
import re

import pytest

from helpers.pages import PAGES, ROOT, Page

FULL = re.compile(r"^<!-- full: .+ -->$", re.MULTILINE)


def param(path):
    """A page; a slow one waits for `make test-full`."""
    is_slow = FULL.search(path.read_text())
    name = str(path.relative_to(ROOT / "docs"))
    return pytest.param(path, id=name, marks=pytest.mark.full if is_slow else ())


@pytest.mark.parametrize("path", map(param, PAGES))
def test_the_examples_of_a_page_print_what_it_says(path):
    text = Page(path).updated()
    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        path.write_text(text)
    assert text.splitlines() == path.read_text().splitlines()
