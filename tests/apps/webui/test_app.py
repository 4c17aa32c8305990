"""The app as a server: every verb over the client, cancel, wrong input, eight clients at once; nothing leaves the machine."""

import gc
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gradio_session import LIMITS, random_session, served

from genattn.apps.webui.verbs.session import Session
from genattn.errors import GenAttnError
from genattn.seam.sites import denoisers

pytest.importorskip("gradio", reason="the app needs Gradio: pip install 'genattn[gradio]'")
# Gradio, Starlette and pandas warn of one another, and of event loops of their own threads
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in (
        "DeprecationWarning",
        "FutureWarning",
        "ResourceWarning",
        "UserWarning",
        "pytest.PytestUnraisableExceptionWarning",
    )
]

VERBS = {
    "/image", "/load_head_set", "/video", "/long", "/resume", "/mask", "/hunt", "/save_set",
    "/report", "/machine",
}  # fmt: skip


@pytest.fixture(scope="module")
def outside() -> Iterator[list[Any]]:
    """Every address beyond this machine that anything in the process tries to reach."""
    tried: list[Any] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def watched_connect(self: socket.socket, address: Any) -> Any:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost", "0.0.0.0"):
            tried.append(address)
        return connect(self, address)

    def watched_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in (None, "", "127.0.0.1", "::1", "localhost", "0.0.0.0", b"127.0.0.1", b"localhost"):
            tried.append(host)
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched_connect)
        patch.setattr(socket, "getaddrinfo", watched_look_up)
        yield tried
    gc.collect()  # loops and sockets of the clients end here, where their warnings are let through


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return random_session(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def url(session: Session, outside: list[Any]) -> Iterator[str]:
    with served(session) as address:
        yield address


def _client(url: str) -> Any:
    from gradio_client import Client

    return Client(url, verbose=False, httpx_kwargs={"timeout": 120})


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return _client(url)


def test_every_verb_has_a_name_and_nothing_else_has(client: Any) -> None:
    found = client.view_api(return_format="dict", print_info=False)
    assert set(found["named_endpoints"]) == VERBS
    assert not found["unnamed_endpoints"]
    for name in VERBS - {"/machine"}:
        fields = [p["parameter_name"] for p in found["named_endpoints"][name]["parameters"]]
        assert fields
        assert not any(re.fullmatch(r"param_\d+|args?", field) for field in fields), f"{name} has unnamed fields: {fields}"


def test_image(client: Any, session: Session) -> None:
    job = client.submit("a cat", "L1H0", seed=5, steps=2, api_name="/image")
    status, pair, seed, report, cards, files, cost = job.result(timeout=240)
    assert all(Path(path).stat().st_size for path in files)
    assert status.startswith("**done**")
    assert seed == "5"
    assert all(Path(path).stat().st_size for path in pair)
    assert report["heads"] == "L1H0"
    assert "dB" in cards
    assert cost.startswith("16x16 · 2 pictures of 2 steps; the guided one runs the model once more in each")
    assert any("of 2" in row[0] for row in job.outputs()[:-1]), "steps are told on the way"
    assert client.predict(report["run"], api_name="/report") == report
    with pytest.raises(Exception, match="there is no run"):
        client.predict("../../../etc/passwd", api_name="/report")


def test_video(client: Any) -> None:
    row = client.submit("a cat", steps=1, frames=5, api_name="/video").result(timeout=240)
    assert row[0].startswith("**done**")
    report = row[5]
    assert [run["attention"] for run in report["runs"]] == ["dense", "radial"]
    assert all(Path(path if isinstance(path, str) else path["video"]).stat().st_size for path in row[1:4])


def test_long_and_resume(client: Any) -> None:
    job = client.submit("a cat", 9, 0, 1, False, api_name="/long")
    row = job.result(timeout=240)
    run, report = row[4], row[6]
    assert report["frames"] == 9
    assert sorted(Path(path).name for path in row[7]) == ["report.json", "video.mp4"]
    assert any("first frame" in str(told[8]) for told in job.outputs()), "what it will cost is told on the way"
    longer = client.submit(run, 13, api_name="/resume").result(timeout=240)
    assert longer[6]["frames"] == 13


def test_hunt_save_and_load(client: Any) -> None:
    from gradio_client import handle_file

    row = client.submit("a cat", ["sharpness"], "L1", top_k=1, sheet=False, steps=1, api_name="/hunt").result(timeout=240)
    heads, run = row[5], row[7]
    assert re.fullmatch(r"L1H\d", heads)
    assert sorted(Path(path).name for path in row[9]) == ["heads.json", "report.json"]
    assert "at most" in row[10]
    file = client.predict(run, "best", api_name="/save_set")
    assert json.loads(Path(file).read_text())["heads"] == {heads: 1.0}
    loaded = client.predict(handle_file(file), "random-sd3", api_name="/load_head_set")
    assert loaded[0] == heads


def test_mask_and_machine(client: Any) -> None:
    facts = client.predict(grid="4x8x8", api_name="/mask")[4]
    assert facts["tokens"] == 256
    found = client.predict(api_name="/machine")
    assert found["limits"]["pixels"] == LIMITS.pixels
    assert set(found["models"]) == {"random-wan", "random-sd3"}


@pytest.mark.parametrize(
    ("verb", "fields", "said"),
    [
        ("/image", {"prompt": "", "heads": "L1H0"}, "must say what to show"),
        ("/image", {"prompt": "a cat", "heads": "L1H0", "steps": 9999}, "at most 2,000 steps"),
        ("/image", {"prompt": "a cat", "heads": "L1H0", "model": "other"}, "not in the list of choices"),
        ("/video", {"prompt": "a cat", "pattern_options": "{"}, "pattern options must be a JSON object"),
        ("/long", {"prompt": "a cat", "frames": 10_000}, "at most 65 frames"),
        ("/resume", {"run": "/etc"}, "there is no run"),
        ("/mask", {"grid": "1000x1000x1000"}, "tokens"),
        ("/hunt", {"prompts": "a", "objectives": ["os:system"]}, "not in the list of choices"),
        ("/save_set", {"run": "x"}, "there is no run"),
    ],
)
def test_wrong_input_is_refused_in_words(client: Any, verb: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        client.submit(**fields, api_name=verb).result(timeout=120)


def test_cancel_stops_within_one_step(client: Any, session: Session) -> None:
    model = next(iter(denoisers(session.open(session.models["random-sd3"])).values()))
    calls: list[int] = []
    counter = model.register_forward_hook(lambda *_: calls.append(1))
    job = client.submit("a cat", "L1H0", steps=2000, api_name="/image")
    _until(lambda: len(calls) >= 3)
    job.cancel()
    seen = len(calls)
    _until(lambda: not session.lock.locked())
    # the request to stop needs its way to the server; from there on it is one forward
    assert len(calls) < seen + 60
    stopped = len(calls)
    time.sleep(0.5)
    assert len(calls) == stopped
    counter.remove()
    assert client.submit("a cat", "L1H0", steps=1, api_name="/image").result(timeout=120)[0].startswith("**done**")


def test_eight_clients_at_once(url: str, session: Session) -> None:
    import resource

    clients = [_client(url) for _ in range(8)]
    jobs, rows = [], {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i, each in enumerate(clients):
        jobs.append(each.submit(f"cat number {i}", "L1H0", seed=i, steps=1, api_name="/image"))
        # so that there is an order to keep
        _until(lambda: jobs[-1].status().code.name not in ("STARTING", "JOINING_QUEUE"))
    waiting = [threading.Thread(target=lambda i=i: rows.setdefault(i, jobs[i].result(timeout=300))) for i in range(8)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    assert sorted(rows) == list(range(8)), "nothing is lost"
    assert [rows[i][3]["prompt"] for i in range(8)] == [f"cat number {i}" for i in range(8)], "everyone gets their own"
    assert [rows[i][2] for i in range(8)] == [str(i) for i in range(8)]
    stamps = [(session.folder / "runs" / rows[i][3]["run"] / "report.json").stat().st_mtime_ns for i in range(8)]
    assert stamps == sorted(stamps), "first come, first served"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200, f"memory grew by {grown:.0f} MiB"


def test_a_full_queue_refuses_and_loses_nobody(session: Session, tmp_path: Path, url: str) -> None:
    sources = [str(model.source) for model in session.models.values()]
    busy = Session(tmp_path / "out", sources, replace(LIMITS, queue=1))
    with served(busy) as address:
        clients = [_client(address) for _ in range(3)]
        with busy.lock:  # the first one stands before the models, the second in the queue
            taken = [clients[0].submit("a cat", "L1H0", seed=7, steps=1, api_name="/image")]
            _until(lambda: taken[0].outputs() != [])
            taken.append(clients[1].submit("a cat", "L1H0", seed=8, steps=1, api_name="/image"))
            _until(lambda: taken[1].status().code.name == "IN_QUEUE")
            with pytest.raises(Exception, match="Queue is full"):
                clients[2].submit("a cat", "L1H0", seed=9, steps=1, api_name="/image").result(timeout=60)
        assert [job.result(timeout=240)[2] for job in taken] == ["7", "8"]


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def _get(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_only_the_folder_can_be_read(url: str, session: Session) -> None:
    run = session.new_run("image")
    (run / "a.txt").write_text("ours")
    assert _get(f"{url}gradio_api/file={run / 'a.txt'}") == 200
    root = Path(__file__).resolve().parents[3]
    for path in ("/etc/passwd", root / "README.md", f"{session.folder}/../random-sd3/model_index.json", "README.md"):
        assert _get(f"{url}gradio_api/file={path}") in (403, 404), path


def test_uploads_are_checked(client: Any, url: str, tmp_path: Path) -> None:
    from gradio_client import handle_file

    (tmp_path / "a.json").write_text('{"format": "something else"}')
    with pytest.raises(Exception, match="must have format"):
        client.predict(handle_file(str(tmp_path / "a.json")), "random-sd3", api_name="/load_head_set")
    (tmp_path / "a.exe").write_text("MZ")
    with pytest.raises(Exception, match=r"(?i)invalid file type|ending in"):
        client.predict(handle_file(str(tmp_path / "a.exe")), "random-sd3", api_name="/load_head_set")
    (tmp_path / "big.json").write_bytes(b" " * (LIMITS.upload_bytes + 1))
    with pytest.raises(Exception, match=r"(?i)413|too large|exceeds"):
        client.predict(handle_file(str(tmp_path / "big.json")), "random-sd3", api_name="/load_head_set")
    remote = {"path": "http://192.0.2.1/a.json", "url": "http://192.0.2.1/a.json", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception, match="fetches nothing from other addresses"):
        client.predict(remote, "random-sd3", api_name="/load_head_set")


def test_the_page_names_no_other_host(url: str) -> None:
    with urllib.request.urlopen(url, timeout=60) as answer:
        html = answer.read().decode()
    # what the page loads by itself: scripts, styles, fonts
    loaded = re.findall(r"<(?:link|script|img)[^>]+(?:href|src)=\"(https?://[^\"]+)\"", html)
    assert not [address for address in loaded if not address.startswith(url)], loaded


def test_a_taken_port_is_told(url: str, session: Session) -> None:
    from genattn.apps.webui.app import serve

    port = int(url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(GenAttnError, match="name another --port"):
        serve(session, port=port)


def test_nothing_left_the_machine(outside: list[Any]) -> None:
    """Last: all that came before was watched."""
    assert outside == []
