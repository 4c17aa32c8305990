"""A session of the app over random models of a few thousand weights; for tests of its verbs, its server and its page."""

import asyncio
import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genattn.apps.webui.verbs.limits import Limits
from genattn.apps.webui.verbs.session import Session
from genattn.pipelines.tiny.random.build import build_pipeline

WAN = {"height": 32, "width": 32, "frames": 9, "steps": 2, "guidance_scale": 3.0, "fps": 8}
SD3 = {"height": 16, "width": 16, "frames": 1, "steps": 2, "guidance_scale": 3.0, "fps": 1}
LIMITS = Limits(pixels=64 * 64, frames=33, long_frames=65, steps=2000, hunt_pictures=60, queue=32)


def random_session(folder: Path, limits: Limits = LIMITS) -> Session:
    """A session in `folder` with a video and an image model."""
    return Session(folder / "out", [str(random_model(folder, "wan", WAN)), str(random_model(folder, "sd3", SD3))], limits)


def shipped_session(folder: Path) -> Session:
    """A session in `folder` with the shipped tiny models, for pictures that show something."""
    return Session(folder / "out", (), Limits())


def random_model(folder: Path, family: str, defaults: dict[str, Any]) -> Path:
    """A random pipeline of a family with its defaults beside it, as a shipped one lies on disk."""
    place = folder / f"random-{family}"
    if not place.exists():
        build_pipeline(family)[0].save_pretrained(place)
        (place / "genattn_defaults.json").write_text(json.dumps(defaults))
    return place


@contextmanager
def served(session: Session) -> Iterator[str]:
    """The address of the app over `session`; the environment that Gradio changes is put back, loops left open are closed."""
    from genattn.apps.webui.app import serve

    before = dict(os.environ)
    page, url = serve(session)
    try:
        yield url
    finally:
        page.close(verbose=False)
        os.environ.clear()
        os.environ.update(before)
        # by its type alone: `isinstance` asks a weak proxy of another test for the class of an object that may be gone
        for loop in [found for found in gc.get_objects() if issubclass(type(found), asyncio.BaseEventLoop)]:
            if not loop.is_running():  # else it is closed with a warning wherever the collector comes by
                loop.close()
