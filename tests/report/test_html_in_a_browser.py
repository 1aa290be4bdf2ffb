"""The HTML report in Chromium: keys and clicks work, nothing is loaded, nothing overflows."""

import shutil

import pytest

from fixpass.cli import main

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright from PyPI")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium of the system"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    words = ["explain", "hf:Qwen3ForCausalLM", "--target", "rocm:gfx942", "--html", str(path)]
    assert main(words) == 0
    return path.as_uri()


@pytest.fixture(params=[(1200, "light"), (390, "dark")], ids=["laptop", "phone"])
def page(request, address):
    """The opened page; complaints of the console and requests end the test."""
    width, scheme = request.param
    faults = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        opened.on("console", lambda message: faults.append(message.text))
        opened.on("pageerror", lambda error: faults.append(str(error)))
        opened.on("request", lambda sent: faults.append(sent.url))
        opened.goto(address)
        yield opened
        browser.close()
    assert faults == [address]


def test_a_site_is_found_and_opened_with_the_keyboard(page):
    page.keyboard.press("/")
    page.keyboard.type("layers.0.self_attn.q_norm")
    assert page.locator("#count").inner_text().startswith("1 of ")
    for key in ("Tab", "Tab", "Enter"):
        page.keyboard.press(key)
    site = page.locator("details[open]")
    assert site.count() == 1
    assert site.locator("svg").is_visible()
    assert "modeling_qwen3.py:" in site.inner_text()


def test_sites_with_a_missed_rewrite_may_be_shown_alone(page):
    page.locator("#missed").check()
    shown = page.locator(".site:visible")
    assert 0 < shown.count() < page.locator(".site").count()
    assert {shown.nth(i).get_attribute("data-missed") for i in range(shown.count())} == {"1"}


def test_nothing_is_wider_than_the_window(page):
    page.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_text_stands_out_from_its_background_in_both_looks(page):
    """The contrast that the accessibility guidelines ask of small text, for each text colour."""
    colours = page.evaluate("""() => {
        const style = getComputedStyle(document.documentElement);
        const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const rgb = (name) => {
            canvas.fillStyle = style.getPropertyValue(name);
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        return Object.fromEntries(["--bg", "--fg", "--dim", "--good", "--bad"].map(
            (name) => [name, rgb(name)]));
    }""")

    def luminance(name):
        parts = [value / 255 for value in colours[name]]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    back = luminance("--bg")
    for name in ("--fg", "--dim", "--good", "--bad"):
        low, high = sorted((luminance(name), back))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name
