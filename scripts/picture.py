"""The top of a report, photographed: `python scripts/picture.py report.html demo-sweep`, by Chromium and its driver.

Writes docs/figures/report-light.png and report-dark.png, which carry the hash of the result file that was made from the
same sweep (benchmarks/tables.py), so that `scripts/figures.py --check` finds them stale once that one changes.
(apt-get install chromium chromium-driver)
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from figures import SCHEMES, hash_of, picture, stamp

SIZE = (1200, 1240)


def browser() -> Any:
    """A Chromium without a window."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        sys.exit("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = Options()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=Service(driver))


def shot(page: Any, report: Path, scheme: str) -> bytes:
    """The top of the page, as it looks to who prefers that scheme."""
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False},
    )
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    page.get(report.resolve().as_uri())
    return bytes(page.get_screenshot_as_png())


def main() -> None:
    """Take both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("result", help="the result file of the same sweep, such as demo-sweep")
    asked = parser.parse_args()
    source, page = hash_of([asked.result]), browser()
    try:
        for scheme in SCHEMES:
            stamp(picture(scheme, "report"), shot(page, asked.report, scheme), source)
    finally:
        page.quit()


if __name__ == "__main__":
    main()
