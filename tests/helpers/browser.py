"""A headless Chromium for tests of pages, and what is asked of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

SWITCHES = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars")
# Finds the views of Bokeh below its root, and elements below shadow roots.
FIND = """
const views = (view) => [view, ...[...(view.child_views ?? []), ...(view.tool_views?.values() ?? [])].flatMap(views)]
const all_views = () => Array.from(Bokeh.index.roots).flatMap(views)
const named = (name) => all_views().find((view) => view.model.name === name)
const deep = (root, found = []) => {
  for (const each of root.querySelectorAll("*")) { found.push(each); if (each.shadowRoot) deep(each.shadowRoot, found) }
  return found
}
"""


class Browser:
    """A page in Chromium."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, page: Path) -> None:
        """Open a file and wait until what Bokeh draws is there."""
        self.driver.get(page.as_uri())
        self.wait("return !window.Bokeh || (Bokeh.documents.length > 0 && Bokeh.documents[0].is_idle)")

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns; it may use `named(name)`, a view of Bokeh, and `deep(root)`, all elements."""
        return self.driver.execute_script(FIND + script, *arguments)

    def wait(self, script: str, *arguments: Any) -> Any:
        """Run a script until it returns something true, and return that."""
        return WebDriverWait(self.driver, 20, 0.05).until(lambda _: self.run(script, *arguments))

    def resize(self, width: int, media: str = "screen", scheme: str = "light") -> None:
        """Show the page in a window of a width in CSS pixels, for a screen or as it is printed, light or dark."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        self._settle()

    def _settle(self, times: int = 3, pause: float = 0.15, timeout: float = 20.0) -> None:
        """Wait until the sizes of all elements have been the same several times: Bokeh lays its figures out in steps."""
        seen, end = list[Any](), time.monotonic() + timeout
        while time.monotonic() < end and not (len(seen) >= times and seen.count(seen[-1]) == times):
            seen = [*seen, self.run("return deep(document).map((e) => e.scrollWidth).join()")][-times:]
            time.sleep(pause)

    def move_to(self, x: float, y: float) -> None:
        """Move the pointer to a place of the window."""
        actions = ActionChains(self.driver, duration=0)
        actions.w3c_actions.pointer_action.move_to_location(int(x), int(y))
        actions.perform()

    def complaints(self) -> list[str]:
        """Return the warnings and errors of the console since the last call."""
        entries = self.driver.get_log("browser")
        return [str(entry["message"]) for entry in entries if entry["level"] in ("WARNING", "SEVERE")]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser; where there is none, skip the test and say what it needs."""
    program, service = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (program and service):
        pytest.skip("tests of pages need Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for switch in SWITCHES:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
