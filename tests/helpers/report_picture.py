"""Writes docs/images/report*.png: HTML reports of a packed Qwen3, as Chromium shows them.

`make browser` runs it. It needs playwright from PyPI and the chromium of the system.
"""

import shutil
import tempfile
from pathlib import Path

from fixpass.cli import main

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs/images"
SITE = "model.layers.0.self_attn.q_norm"
SIZES = {"report": (1000, 1150, "light"), "report-phone": (390, 844, "dark")}


def write(folder):
    """Write a picture of an opened site, and one of the first screen, at each size."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        page = Path(place) / "report.html"
        model = f"{ROOT}/examples/packed_qkv.py:build"
        main(["explain", model, "--target", "rocm:gfx942", "--html", str(page)])
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, (width, height, scheme) in SIZES.items():
            size = {"width": width, "height": height}
            opened = browser.new_page(viewport=size, color_scheme=scheme)
            opened.goto(page.as_uri())
            opened.screenshot(path=folder / f"{name}-overview.png")
            opened.locator("#filter").fill(SITE)
            opened.locator(".site:visible summary").click()
            opened.locator(".site:visible svg").wait_for()
            opened.evaluate("document.getElementById('sites').scrollIntoView()")
            opened.screenshot(path=folder / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    write(IMAGES)
