"""A headless Chromium for tests of pages, and what a page did there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["chromium", "show", "transgressions"]


@contextmanager
def chromium(downloads: Path, *, scrollbars: bool = False) -> Iterator[Any]:
    """Start a browser, or skip the test with the reason why there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if program is None or driver is None:
        pytest.skip("chromium and chromedriver are not found; apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # As root there is no sandbox, and a container's /dev/shm is small.
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage",
                 "no-first-run", "disable-background-networking"):  # fmt: skip
        options.add_argument(f"--{flag}")
    if scrollbars:  # a headless one hides them unless it is told not to
        options.add_experimental_option("excludeSwitches", ["hide-scrollbars"])
    else:
        options.add_argument("--hide-scrollbars")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        behaviour = {"behavior": "allow", "downloadPath": str(downloads)}
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
        yield browser
    finally:
        browser.quit()


def show(browser: Any, page: Path, *, width: int = 1280, scheme: str = "light") -> None:
    """Open a page in a window of a width, with a reader who prefers a colour scheme."""
    size = {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferred = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preferred)
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what an earlier page did
    browser.get(page.as_uri())


def transgressions(browser: Any) -> list[str]:
    """Return what a page printed on the console and asked of a network since its start."""
    found = [entry["message"] for entry in browser.get_log("browser")]
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = message["params"]["request"]["url"]
            if not address.startswith(("file:", "data:", "blob:")):
                found.append(f"asked for {address}")
    return found
