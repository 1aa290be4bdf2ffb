"""The HTML report in Chromium: keys and clicks work, nothing is loaded, axe finds no fault."""

import shutil

import pytest

from fixpass.cli import main
from fixpass.passes.base import Choice, Remark
from fixpass.passes.remarks import Report
from fixpass.report.html import to_html
from fixpass.report.recording import Recorder

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: `make browser` installs it"
)
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python"
)
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the chromium of the system"),
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
    assert [fault for fault in faults if not fault.startswith("file:")] == []
    assert faults[0] == address


def test_a_site_is_found_and_opened_with_the_keyboard(page):
    page.keyboard.press("/")
    page.keyboard.type("layers.0.self_attn.q_norm")
    assert page.locator("#count").inner_text().startswith("1 of ")
    site = page.locator(".site:visible")
    site.locator("summary").focus()
    page.keyboard.press("Enter")
    site.locator("svg").wait_for()
    assert "modeling_qwen3.py:" in site.inner_text()


def test_an_outcome_shows_its_sites(page):
    button = page.locator("button", has_text="q_norm").first
    number = button.inner_text().split()[0]
    button.click()
    assert page.locator("#count").inner_text().startswith(f"{number} of ")
    shown = page.locator(".site:visible")
    assert shown.count() == int(number)
    # Not `inner_text`: the browser leaves out what it has not painted yet.
    names = [shown.nth(i).locator("code").first.text_content() for i in range(shown.count())]
    assert set(names) == {"q_norm"}


def test_sites_with_a_missed_rewrite_may_be_shown_alone(page):
    page.locator("#missed").check()
    shown = page.locator(".site:visible")
    assert 0 < shown.count() < page.locator(".site").count()
    assert {shown.nth(i).get_attribute("data-missed") for i in range(shown.count())} == {"1"}


def test_a_pass_shows_its_changes_when_it_is_opened(page):
    step = page.locator("details.step").first
    step.locator("summary").click()
    # The contents come with the event of the opening.
    step.locator("table").wait_for(state="attached")
    assert step.locator("tr.replace, tr.insert, tr.delete").count() > 0
    step.locator("summary").click()
    step.locator("summary").click()
    assert step.locator("table").count() == 1, "the changes are there once"


def open_all(page):
    page.evaluate("document.querySelectorAll('details').forEach((row) => { row.open = true; })")
    # The contents come with the event of the opening.
    page.wait_for_function("[...document.querySelectorAll('.site')].every((s) => s.children[1])")


def test_nothing_is_wider_than_the_window(page):
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_axe_finds_no_fault(page):
    open_all(page)
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The page of 10,000 sites in 2,500 equal layers."""
    names = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")
    remarks = tuple(
        Remark("select", "applied", f"rms_norm_{layer}", name, f"layers.{layer}.{name}",
               choice=Choice("inductor", 1))
        for layer in range(2500) for name in names
    )  # fmt: skip
    path = tmp_path_factory.mktemp("large") / "report.html"
    path.write_text(to_html(Report(remarks, "target t"), Recorder()))
    return path.as_uri()


def test_ten_thousand_sites_are_filtered(large, page):
    """The page has a body for each of the four norms of a layer, not for each site."""
    page.goto(large)
    assert page.locator("template").count() == 4
    page.keyboard.press("/")
    page.keyboard.type("layers.2499.self_attn")
    assert page.locator("#count").inner_text() == "2 of 10000 sites"
    assert page.locator(".site:visible").count() == 2
