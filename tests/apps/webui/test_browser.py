"""The app in headless Chromium: every tab used, a clean console, no address outside the machine, a picture of each tab."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_clicks import CHROMIUM, STEPS, TABS, Visitor, visiting
from gradio_session import random_session
from PIL import Image

pytest.importorskip("gradio", reason="the app needs Gradio: pip install 'genattn[gradio]'")
pytest.importorskip("playwright", reason="the browser is driven by playwright: pip install playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no {CHROMIUM}: apt-get install chromium"),
    *(
        pytest.mark.filterwarnings(f"ignore::{kind}")
        for kind in (
            "DeprecationWarning",
            "FutureWarning",
            "ResourceWarning",
            "UserWarning",
            "pytest.PytestUnraisableExceptionWarning",
        )
    ),
]


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    before = dict(os.environ)
    from genattn.apps.webui.app import serve

    folder = tmp_path_factory.mktemp("browser")
    page, url = serve(random_session(folder))
    with visiting(url, folder, quick=True) as someone:
        yield someone
    page.close(verbose=False)
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("tab", TABS)
def test_a_visitor_uses_every_tab(visitor: Visitor, tab: str) -> None:
    STEPS[tab](visitor)
    with Image.open(visitor.shoot(tab)) as picture:
        assert picture.width == 1280
        assert len(picture.getcolors() or []) > 20, "the page is not empty"
    assert visitor.errors == []
    assert visitor.outside == []
