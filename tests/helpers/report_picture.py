"""Writes docs/images/report.png: the HTML report of a packed Qwen3, as Chromium shows it.

    PYTHONPATH=.:tests python -m helpers.report_picture

It needs playwright from PyPI and the chromium of the system.
"""

import shutil
import tempfile
from pathlib import Path

from fixpass.cli import main

ROOT = Path(__file__).resolve().parents[2]
SITE = "model.layers.0.self_attn.q_norm"


def write(path):
    from playwright.sync_api import sync_playwright

    page = Path(tempfile.mkdtemp()) / "report.html"
    model = f"{ROOT}/examples/packed_qkv.py:build"
    main(["explain", model, "--target", "rocm:gfx942", "--html", str(page)])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        opened = browser.new_page(viewport={"width": 1000, "height": 1150})
        opened.goto(page.as_uri())
        opened.locator("#filter").fill(SITE)
        opened.locator(".site:visible summary").click()
        path.parent.mkdir(exist_ok=True)
        opened.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    write(ROOT / "docs/images/report.png")
