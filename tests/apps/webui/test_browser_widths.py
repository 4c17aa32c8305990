"""The page on a phone and on a desk: every tab reachable, nothing cut, and the two clips played together.

GENATTN_SCREENSHOTS=assets/figures makes the pictures of the docs anew, with the shipped tiny models in place of random ones.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_clicks import BROWSER, TABS, Visitor, video, visiting
from gradio_session import LIMITS, random_session, served
from PIL import Image

from genattn.apps.webui.verbs.session import Session

pytestmark = BROWSER
WIDTHS = {390: "_phone", 1280: ""}
KEPT = os.environ.get("GENATTN_SCREENSHOTS")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("widths")
    with served(Session(folder / "out", (), LIMITS) if KEPT else random_session(folder)) as url:
        yield url


@pytest.fixture(scope="module", params=WIDTHS)
def visitor(request: pytest.FixtureRequest, address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    folder = Path(KEPT) if KEPT else tmp_path_factory.mktemp("pictures")
    with visiting(address, folder, quick=not KEPT, width=request.param) as someone:
        someone.width = request.param  # type: ignore[attr-defined]
        yield someone
        assert someone.errors == []
        assert someone.outside == []


def width(v: Visitor) -> int:
    return int(v.page.viewport_size["width"])


# what a visitor must be able to see and press: its left and right edge, and who it is
EDGES = """() => [...document.querySelectorAll('button, input, select, textarea, img, video, h1, label, .card, table')]
  .filter(e => e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true}) && e.getBoundingClientRect().width > 1)
  .filter(e => !e.closest('.table-wrap, [data-testid=markdown] pre, .ab-stage'))
  .map(e => [e.getBoundingClientRect(), e.tagName + '#' + (e.id || e.closest('[id]')?.id) + ' ' + e.innerText?.slice(0, 30)])
  .map(([at, who]) => [at.left, at.right, who])"""


def assert_nothing_is_cut(v: Visitor) -> None:
    v.page.wait_for_timeout(500)
    assert v.page.evaluate("document.documentElement.scrollWidth") <= width(v), "the page scrolls sideways"
    cut = [who for left, right, who in v.page.evaluate(EDGES) if left < -1 or right > width(v) + 1]
    assert cut == []


def test_every_tab_is_one_press_away(visitor: Visitor) -> None:
    tabs: dict[str, Any] = {}
    for name in TABS:
        button = visitor.page.get_by_role("tab", name=name, exact=True)
        button.wait_for(timeout=60_000)  # one that hides behind a menu is no tab
        tabs[name] = button.bounding_box()
    assert len({round(box["y"]) for box in tabs.values()}) == 1, "all in one row"
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width(visitor) for box in tabs.values())


@pytest.mark.parametrize("tab", TABS)
def test_nothing_is_cut(visitor: Visitor, tab: str) -> None:
    visitor.open(tab)
    visitor.page.get_by_role("tabpanel").locator("visible=true").first.wait_for()
    for more in visitor.page.get_by_text("More", exact=True).locator("visible=true").all():
        more.click()
    assert_nothing_is_cut(visitor)


def test_two_clips_in_one_player(visitor: Visitor) -> None:
    video(visitor)
    page = visitor.page
    assert "tokens" in page.locator("#video-cost").inner_text()
    dense, sparse = page.locator("#ab-player .ab-dense"), page.locator("#ab-player .ab-sparse")
    page.wait_for_function(
        "() => [...document.querySelectorAll('#ab-player video')].every(f => f.readyState >= 2 && f.videoWidth)"
    )
    # both stop and start together, and stand at the same moment
    if not dense.evaluate("f => f.paused"):
        page.locator(".ab-play").click()
    assert dense.evaluate("f => f.paused")
    assert sparse.evaluate("f => f.paused")
    page.locator(".ab-seek").fill("500")
    page.wait_for_timeout(400)
    moments = [film.evaluate("f => f.currentTime / f.duration") for film in (dense, sparse)]
    assert moments[0] == pytest.approx(moments[1], abs=0.02)
    assert moments[0] == pytest.approx(0.5, abs=0.1)
    # the divider, the difference, and side by side
    page.locator(".ab-cut").fill("20")
    assert "20%" in sparse.evaluate("f => getComputedStyle(f).clipPath")
    page.locator(".ab-view").select_option("difference")
    assert sparse.evaluate("f => getComputedStyle(f).mixBlendMode") == "difference"
    page.locator(".ab-view").select_option("beside")
    boxes = [film.bounding_box() for film in (dense, sparse)]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"] + 1
    page.locator(".ab-view").select_option("slider")
    page.locator(".ab-cut").fill("50")
    for picture in ("#film-strip img", "#layer-map img"):
        assert page.locator(picture).evaluate("e => e.naturalWidth") > 100
    names = page.locator("#video-files").inner_text()
    assert all(
        name.split(".")[0] in names for name in ("dense.mp4", "sparse.mp4", "film-strip.png", "layers.png", "report.json")
    )
    assert_nothing_is_cut(visitor)
    with Image.open(visitor.shoot("Video", WIDTHS[width(visitor)])) as picture:
        assert picture.width == width(visitor)


def test_the_cost_follows_the_fields(visitor: Visitor) -> None:
    visitor.open("Video")
    assert "100% of the calls stay dense" not in visitor.page.locator("#video-cost").inner_text()
    visitor.number("Keep first steps dense", 2)
    visitor.wait_for("#video-cost", "100% of the calls stay dense")
    visitor.number("Keep first steps dense", 2.5)  # neither a share nor a count
    visitor.wait_for("#video-cost", "This cannot run")
