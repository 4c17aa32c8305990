"""`genattn app` from the outside: it starts offline, says where, serves its page and ends on Ctrl-C."""

import errno
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gradio_session import SD3, random_model

from genattn.apps.cli.app import app_command
from genattn.apps.webui.verbs.session import Session
from genattn.errors import GenAttnError
from genattn.one_writer import only_writer


def test_without_gradio_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from genattn.apps.webui.app import build

    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(GenAttnError, match=r"pip install 'genattn\[gradio\]'"):
        build(Session(tmp_path))


def test_a_bad_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="limit steps must be a whole number >= 1"):
        app_command(folder=tmp_path, max_steps=0)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_an_address_that_cannot_serve_is_refused_before_anything_is_imported(
    taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(GenAttnError, match=f"--port {taken} is taken by another process; choose another"):
        app_command(folder=tmp_path, port=taken)
    for host in ("192.0.2.1", "1.2.3", "2001:db8::1", "no-such-host.invalid"):  # addresses that are kept for examples
        with pytest.raises(GenAttnError, match="--host must be an address of this machine"):
            app_command(folder=tmp_path, host=host)
    for port in (0, -1, 65536):
        with pytest.raises(GenAttnError, match="--port must lie in 1 to 65535"):
            app_command(folder=tmp_path, port=port)


def test_a_port_that_needs_rights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(GenAttnError, match="--port 80 needs rights that this user does not have"):
        app_command(folder=tmp_path, port=80)


@pytest.mark.parametrize(("host", "given"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_addresses_of_version_6_are_served(host: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from genattn.apps.webui import app

    asked: list[str] = []

    def launch(server_name: str, **_: object) -> None:
        asked.append(server_name)
        raise OSError("Cannot find empty port in range: 1-1. You can set GRADIO_SERVER_PORT or the `server_port` parameter.")

    monkeypatch.setattr(app, "build", lambda session: SimpleNamespace(launch=launch))
    with pytest.raises(GenAttnError, match=r"port 1 \(Cannot find empty port in range: 1-1\); name another --port"):
        app.serve(Session(tmp_path), host, 1)
    assert asked == [given]


def test_it_starts_and_ends(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the app needs Gradio: pip install 'genattn[gradio]'")
    model, folder = random_model(tmp_path, "sd3", SD3), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "genattn",
        "app",
        "--model",
        str(model),
        "--folder",
        str(folder),
        "--max-steps",
        "7",
        "--json",
    ]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1,localhost", "PYTHONWARNINGS": "ignore"}
    # a shell that runs the tests in the background has its children ignore Ctrl-C
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, preexec_fn=heed, **pipes) as server:
        try:
            told = _first_json(server)
            with urllib.request.urlopen(told["url"], timeout=60) as page:
                assert "genattn" in page.read().decode()
        finally:
            server.send_signal(signal.SIGINT)
            try:
                rest, errors = server.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()
                raise
    assert told["models"] == ["random-sd3"]
    assert told["limits"]["steps"] == 7
    assert Path(told["folder"]) == folder.resolve()
    assert rest == "", "nothing but JSON on standard output"
    assert server.returncode == 130, errors


def test_a_folder_that_another_app_serves_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genattn.apps.webui.app.serve", lambda *_: pytest.fail("it was served"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = inspect.signature(app_command).parameters
    given = {name: None if each.default is inspect.Parameter.empty else each.default for name, each in asked.items()}
    (tmp_path / "app").mkdir()
    with only_writer(tmp_path / "app", "--folder"), pytest.raises(GenAttnError, match="in use: .* give another --folder"):
        app_command(**{**given, "folder": tmp_path / "app"})
    assert list((tmp_path / "app").iterdir()) == []


def _first_json(server: Any) -> dict[str, Any]:
    text = ""
    while True:
        line = server.stdout.readline()
        assert line, server.stderr.read()
        text += line
        try:
            found: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError:
            continue
        return found
