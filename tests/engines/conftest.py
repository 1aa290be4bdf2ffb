"""Tests of an engine are collected where that engine is installed: FIXPASS_TEST_ENGINE names it."""

import os
from pathlib import Path

ENGINE = os.environ.get("FIXPASS_TEST_ENGINE", "")

collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if not ENGINE or not path.name.startswith(f"test_{ENGINE}")
]
