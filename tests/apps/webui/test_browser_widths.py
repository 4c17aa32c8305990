"""The page on a phone and on a desk: every tab reachable, nothing cut or hidden, and the two clips played together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_clicks import BROWSER, KEPT, TABS, Visitor, video, visiting
from gradio_session import random_session, served, shipped_session
from PIL import Image

pytestmark = BROWSER
WIDTHS = {390: "_phone", 1280: ""}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("widths")
    with served(shipped_session(folder) if KEPT else random_session(folder)) as url:
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

# pictures that are taller or wider than the block that shows them
TALL = """() => [...document.querySelectorAll('.image-frame img, .slider-wrap, .block video')].filter(e => e.checkVisibility())
  .filter(e => e.getBoundingClientRect().bottom > e.closest('.block').getBoundingClientRect().bottom + 1)
  .map(e => e.closest('.block').id || e.className)"""
# pairs of a button and the picture or clip that it lies on
HIDDEN = """() => {
  const seen = of => [...document.querySelectorAll(of)].filter(e => e.checkVisibility() && e.getBoundingClientRect().width > 1);
  const buttons = seen('.icon-button-wrapper button, label[data-testid=block-label]').filter(e => !e.matches('.sr-only'));
  return buttons.flatMap(b => seen('.image-frame img, .slider-wrap, video').filter(p => {
    const [x, y] = [b.getBoundingClientRect(), p.getBoundingClientRect()];
    return x.left < y.right - 1 && x.right > y.left + 1 && x.top < y.bottom - 1 && x.bottom > y.top + 1;
  }).map(p => (b.ariaLabel || b.innerText) + ' on ' + (p.closest('.block')?.id || p.className)));
}"""


def assert_nothing_is_cut(v: Visitor) -> None:
    v.page.wait_for_timeout(500)
    assert v.page.evaluate(HIDDEN) == []
    assert v.page.evaluate(TALL) == []
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
    page.get_by_text("The clips as files").click()
    names = page.locator("#video-files").inner_text()
    assert all(
        name.split(".")[0] in names for name in ("dense.mp4", "sparse.mp4", "film-strip.png", "layers.png", "report.json")
    )
    assert_nothing_is_cut(visitor)
    page.get_by_text("The clips as files").click()
    with Image.open(visitor.shoot("Video", WIDTHS[width(visitor)])) as picture:
        assert picture.width == width(visitor)


def test_a_kept_example_is_shown_as_a_run_is(visitor: Visitor) -> None:
    visitor.open("Video")
    film = visitor.page.locator("#ab-player .ab-dense")
    before = film.get_attribute("src")
    visitor.example("video")
    visitor.until(lambda: film.get_attribute("src") != before)
    assert visitor.page.locator("#video-player").inner_text().startswith("dense"), "nothing stands before the player"


def test_the_cost_follows_the_fields(visitor: Visitor) -> None:
    visitor.open("Video")
    assert "100% of the calls stay dense" not in visitor.page.locator("#video-cost").inner_text()
    visitor.number("Keep first steps dense", 100)
    visitor.wait_for("#video-cost", "100% of the calls stay dense")
    visitor.number("Keep first steps dense", 2.5)  # neither a share nor a count
    visitor.wait_for("#video-cost", "This cannot run")
