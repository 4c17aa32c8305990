"""The app in headless Chromium: every tab used, a clean console, no address outside the machine, a picture of each tab."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_clicks import BROWSER, KEPT, STEPS, TABS, Visitor, visiting
from gradio_session import random_session, served, shipped_session
from PIL import Image

pytestmark = BROWSER


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    folder = tmp_path_factory.mktemp("browser")
    session = shipped_session(folder) if KEPT else random_session(folder)
    with served(session) as url, visiting(url, Path(KEPT or folder), quick=not KEPT) as someone:
        yield someone


@pytest.mark.parametrize("tab", TABS)
def test_a_visitor_uses_every_tab(visitor: Visitor, tab: str) -> None:
    STEPS[tab](visitor)
    with Image.open(visitor.shoot(tab)) as picture:
        assert picture.width == 1280
        assert len(picture.getcolors() or []) > 20, "the page is not empty"
    assert visitor.errors == []
    assert visitor.outside == []
