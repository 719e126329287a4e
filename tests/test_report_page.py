"""The page in a real browser, from disk and without a network: Chromium, headless."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmprune.reporting.collect import Collected
from lmprune.reporting.page import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="needs Chromium: apt-get install chromium chromium-driver"
    ),
]


@pytest.fixture(scope="module")
def page(sweep_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(Collected.read(sweep_folder), out)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    yield driver
    driver.quit()


def _look(browser: Any, page: Path, *, width: int = 1200, dark: bool = False, media: str = "") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(page.as_uri())


def _shot(browser: Any, name: str) -> None:
    """A picture of the whole page, where LMPRUNE_SCREENSHOTS names a folder to look at it."""
    if folder := os.environ.get("LMPRUNE_SCREENSHOTS"):
        import base64

        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        Path(folder, f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def test_it_opens_without_a_network_and_without_an_error(browser: Any, page: Path) -> None:
    _look(browser, page)
    assert "Layer pruning of" in browser.title
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in asked if not name.startswith("data:")] == []


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("light", 1200, False), ("dark", 1200, True), ("phone", 375, False)]
)
def test_accessible_everywhere(browser: Any, page: Path, name: str, width: int, dark: bool) -> None:
    import axe_core_python

    _look(browser, page, width=width, dark=dark)
    _shot(browser, name)
    axe = Path(axe_core_python.__file__).parent / "axe.min.js"
    browser.execute_script(axe.read_text(encoding="utf-8"))
    found = browser.execute_async_script("const done = arguments[0]; axe.run().then(done)")
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert serious == [], [(v["id"], [node["html"][:120] for node in v["nodes"][:3]]) for v in serious]
    wider = browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wider <= 0, "the page scrolls sideways"


def test_printed_without_controls(browser: Any, page: Path) -> None:
    _look(browser, page, width=800, media="print")
    _shot(browser, "print")
    assert not browser.find_element("id", "size").is_displayed()
    assert browser.find_element("id", "h-recipe").is_displayed()


def test_choosing_a_size_shows_the_block(browser: Any, page: Path) -> None:
    _look(browser, page)
    before = browser.find_element("id", "chosen").text
    browser.execute_script(
        "const s = document.getElementById('size'); s.value = 4; s.dispatchEvent(new Event('input'))"
    )
    gone = browser.find_elements("css selector", "#strip .gone")
    assert len(gone) == 4
    assert browser.find_element("id", "chosen").text != before
    assert "best block of 4" in browser.find_element("id", "chosen").text
    place = browser.find_element("id", "maprow").rect
    assert place["width"] > 5 and place["height"] > 5


def test_marks_and_the_map_say_their_values(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    _look(browser, page)
    marks = browser.find_elements("css selector", ".mark")
    assert len(marks) > 10
    browser.execute_script("arguments[0].focus()", marks[0])
    tip = browser.find_element("id", "tip")
    assert tip.is_displayed() and "layers dropped" in tip.text
    assert marks[0].get_attribute("aria-label") == tip.text
    picture = browser.find_element("css selector", "#mapbox svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    ActionChains(browser).move_to_element_with_offset(picture, -150, 60).perform()
    assert "distance" in tip.text


def test_recipes_and_samples_can_be_chosen(browser: Any, page: Path) -> None:
    _look(browser, page)
    for control, shown in (("which", ".recipe"), ("against", ".text")):
        names = [
            option.get_attribute("value") for option in browser.find_elements("css selector", f"#{control} option")
        ]
        browser.execute_script(
            "const c = document.getElementById(arguments[0]);"
            "c.value = arguments[1]; c.dispatchEvent(new Event('change'))",
            control,
            names[-1],
        )
        visible = [e for e in browser.find_elements("css selector", shown) if e.is_displayed()]
        assert visible and any(names[-1] in e.text for e in visible)
    browser.find_element("id", "copy").click()
    browser.implicitly_wait(2)
    assert browser.find_element("id", "copied").text
