"""A visitor in headless Chromium: clicks through every tab of the app and takes a picture of each.

python tests/apps/webui/gradio_clicks.py http://127.0.0.1:7860/ FOLDER        pictures of an app that runs already
"""

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = "/usr/bin/chromium"
KEPT = os.environ.get("GENATTN_SCREENSHOTS")  # a folder: the pictures of the docs are made anew there, with the shipped models
_PARTS = ("gradio", "playwright")
_NOISE = ("DeprecationWarning", "FutureWarning", "ResourceWarning", "UserWarning", "pytest.PytestUnraisableExceptionWarning")
BROWSER = [  # marks of a test module that opens a browser
    pytest.mark.slow,
    *(
        pytest.mark.skipif(importlib.util.find_spec(part) is None, reason=f"the app in a browser needs {part}")
        for part in _PARTS
    ),
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no {CHROMIUM}: apt-get install chromium"),
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in _NOISE),
]
PATIENCE = 600_000
# and the names of their pictures
TABS = {
    "Image": "image",
    "Video": "video",
    "Long": "long_video",
    "Masks": "mask_explorer",
    "Heads": "headhunter",
    "Report": "report",
}


class Visitor:
    """A page of the app, what its console said, and every address it asked for outside the machine."""

    def __init__(self, page: Any, folder: Path, quick: bool) -> None:
        self.page, self.folder, self.quick = page, folder, quick
        self.errors: list[str] = []
        self.outside: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.route("**/*", self._pass)

    def _pass(self, route: Any) -> None:
        address = route.request.url
        if address.startswith(("http://127.0.0.1", "http://localhost", "data:", "blob:")):
            route.continue_()
        else:
            self.outside.append(address)
            route.abort()

    def open(self, tab: str) -> None:
        """Show a tab."""
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def run(self, name: str) -> None:
        """Press a verb's button and wait until it is done."""
        status = self.page.locator(f"#{name}-status")
        self.page.locator(f"#{name}-go").click()
        self.until(lambda: "done in" not in status.inner_text())  # that of a run or an example before
        self.wait_for(f"#{name}-status", "done in")

    def example(self, name: str) -> None:
        """Click a verb's first example and wait for its result."""
        self.page.locator(f"#{name}-examples tr").nth(1).click()
        self.wait_for(f"#{name}-status", "done in")

    def wait_for(self, where: str, text: str) -> None:
        """Wait until an element says `text`."""
        self.page.wait_for_function(
            "([where, text]) => (document.querySelector(where)?.innerText ?? '').includes(text)", arg=[where, text]
        )

    def value(self, where: str) -> str:
        """What stands in a text field."""
        return str(self.page.locator(f"{where} textarea, {where} input").first.input_value())

    def fill(self, where: str, text: str) -> None:
        """Write into a text field."""
        self.page.locator(f"{where} textarea, {where} input").first.fill(text)

    def number(self, label: str, value: float) -> None:
        """Write into the number field of the tab that is shown, found by its label."""
        field = self.page.get_by_label(label, exact=True).locator("visible=true").first
        field.fill(str(value))
        field.blur()

    def click_in(self, picture: str, x: float, y: float) -> None:
        """Click a drawn picture at a fraction of its width and height."""
        image = self.page.locator(f"{picture} img").first
        image.wait_for()
        box = image.bounding_box()
        assert box is not None
        image.click(position={"x": x * box["width"], "y": y * box["height"]})

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds."""
        for _ in range(PATIENCE // 100):
            if holds():
                return
            self.page.wait_for_timeout(100)
        raise AssertionError("it never came to hold")

    def shoot(self, tab: str, suffix: str = "") -> Path:
        """A picture of the whole page in few colours, hence small."""
        from PIL import Image

        self.page.mouse.move(0, 0)
        self.page.wait_for_timeout(800)
        path = self.folder / f"app_{TABS[tab]}{suffix}.png"
        self.page.screenshot(path=path, full_page=True)
        with Image.open(path) as picture:
            small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
        return path


@contextmanager
def visiting(url: str, folder: Path, quick: bool = False, width: int = 1280) -> Iterator[Visitor]:
    """A visitor of the app at `url`. quick: the least work in every tab. width: of the window, in pixels."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 860})
        visitor = Visitor(page, folder, quick)
        page.goto(url)
        page.locator("#title").wait_for()
        yield visitor
        browser.close()


def image(v: Visitor) -> None:
    """Choose a head on the map, draw both."""
    v.open("Image")
    if not v.page.locator("#heads").count():
        v.page.get_by_text("no text-to-image model").wait_for()
        return
    v.until(lambda: v.value("#heads") != "")
    before = v.value("#heads")
    v.click_in("#head-map", 0.3, 0.3)
    v.until(lambda: v.value("#heads") != before)
    v.run("image")
    v.until(lambda: v.page.locator(".card:visible").count() >= 3)


def video(v: Visitor) -> None:
    """Both clips."""
    v.open("Video")
    if v.quick:
        v.example("video")
    v.run("video")
    v.page.locator("#ab-player video").first.wait_for()
    v.page.locator("#film-strip img").wait_for()
    v.page.locator("#layer-map img").wait_for()


def long(v: Visitor) -> None:
    """A film: stopped after its first second, then resumed."""
    v.open("Long")
    v.number("Frames", 65 if v.quick else 97)
    v.page.locator("#long-go").click()
    v.until(lambda: re.search(r"frames [1-9]|done in", v.page.locator("#long-status").inner_text()) is not None)
    v.page.locator("#long-stop").click()
    v.wait_for("#long-status", "Resume goes on")
    v.page.locator("#film video").wait_for()
    v.page.locator("#long-resume").click()
    v.wait_for("#long-status", "done in")
    v.page.locator("#drift canvas, #drift svg").first.wait_for()


def mask(v: Visitor) -> None:
    """A click picks another token."""
    v.open("Masks")
    v.until(lambda: v.value("#mask-token") != "")
    before, drawn = v.value("#mask-token"), v.page.locator("#mask-window img").first.get_attribute("src")
    v.click_in("#mask-window", 0.35, 0.3)
    v.until(lambda: v.value("#mask-token") != before)
    v.until(lambda: v.page.locator("#mask-window img").first.get_attribute("src") != drawn)


def hunt(v: Visitor) -> None:
    """Find heads, save them, take them to the first tab."""
    v.open("Heads")
    v.page.get_by_text("More", exact=True).locator("visible=true").click()
    v.page.get_by_label("Heads to choose from").locator("visible=true").fill("L1" if v.quick else "L2-3")
    if not v.quick:  # few heads and steps: captions alone would give every head the same score
        v.page.get_by_label("What to look for").locator("visible=true").click()
        v.page.get_by_role("option", name="sharpness").click()
    v.number("Steps", 1 if v.quick else 6)
    v.run("hunt")
    v.page.locator("#contact-sheet img").wait_for()
    found = v.value("#heads-found")
    assert found.startswith("L")
    v.page.locator("#save-set").click()
    v.wait_for("#set-file", "my-heads")
    if v.page.locator("#heads").count():  # there is an image model
        v.page.locator("#use-heads").click()
        v.until(lambda: v.value("#heads") == found)
        v.open("Heads")


def report(v: Visitor) -> None:
    """The runs of this page, and the machine."""
    v.open("Report")
    v.page.locator("#report-rows").get_by_role("gridcell").first.click()  # the first table is a hidden one, for measuring
    v.wait_for("#report-json", "seed")
    v.page.locator("#machine-go").click()
    v.wait_for("#machine-json", "backends")


STEPS = dict(zip(TABS, (image, video, long, mask, hunt, report)))


if __name__ == "__main__":
    with visiting(sys.argv[1], Path(sys.argv[2])) as someone:
        for name in sys.argv[3:] or TABS:
            STEPS[name](someone)
            print(someone.shoot(name), someone.errors, someone.outside, flush=True)
