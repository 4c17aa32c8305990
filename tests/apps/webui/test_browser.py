"""The app in headless Chromium: every tab used, a clean console, no address outside the machine, a picture of each tab."""

from collections.abc import Iterator

import pytest
from gradio_clicks import BROWSER, STEPS, TABS, Visitor, visiting
from gradio_session import random_session, served
from PIL import Image

pytestmark = BROWSER


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    folder = tmp_path_factory.mktemp("browser")
    with served(random_session(folder)) as url, visiting(url, folder, quick=True) as someone:
        yield someone


@pytest.mark.parametrize("tab", TABS)
def test_a_visitor_uses_every_tab(visitor: Visitor, tab: str) -> None:
    STEPS[tab](visitor)
    with Image.open(visitor.shoot(tab)) as picture:
        assert picture.width == 1280
        assert len(picture.getcolors() or []) > 20, "the page is not empty"
    assert visitor.errors == []
    assert visitor.outside == []
