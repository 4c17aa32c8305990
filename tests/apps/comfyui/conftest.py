"""One ComfyUI for all live tests of a run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_scene import DIRECTORY, PYTHON
from comfy_server import Comfy


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """A server with tiny random checkpoints, our pack and the rig."""
    server = Comfy(Path(DIRECTORY or ""), Path(PYTHON or ""), tmp_path_factory.mktemp("comfy"))
    yield server
    server.stop()
