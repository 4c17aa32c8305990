"""A real ComfyUI for tests: started on the CPU on loopback, asked through its HTTP interface, stopped at the end."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from genattn.apps.comfyui.install import install

HERE = Path(__file__).parent
WIDTHS = {"tiny_wan": 4096, "tiny_flux": 4096, "tiny_hunyuan": 4096, "tiny_sd3": 4096, "tiny_sd35m": 4096}


class Comfy:
    """One server with tiny random checkpoints, our pack, the rig's stand-ins, and the packs in the folders of COMFYUI_PACKS."""

    def __init__(self, directory: Path, python: Path, base: Path) -> None:
        self.base = base
        models = base / "models" / "diffusion_models"
        models.mkdir(parents=True, exist_ok=True)
        for folder in ("custom_nodes", "output", "input"):
            (base / folder).mkdir(exist_ok=True)
        install(base)
        shutil.copytree(HERE / "comfy_rig", base / "custom_nodes" / "comfy_rig", dirs_exist_ok=True)
        for pack in filter(None, os.environ.get("COMFYUI_PACKS", "").split(os.pathsep)):
            (base / "custom_nodes" / Path(pack).name).symlink_to(Path(pack).resolve())
        if not (models / "tiny_sd35m.safetensors").is_file():
            made = [str(python), str(HERE / "comfy_checkpoints.py"), str(directory), str(models)]
            subprocess.run(made, check=True, capture_output=True, cwd=base, timeout=600)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = base / "server.log"
        command = [
            str(python), "main.py", "--cpu", "--disable-auto-launch", "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--cache-classic",
            "--preview-method", "latent2rgb",
        ]  # fmt: skip
        quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
        with self.log.open("w") as out:
            self.process = subprocess.Popen(command, cwd=directory, stdout=out, stderr=subprocess.STDOUT, env=quiet)
        try:
            self._wait_up()
        except RuntimeError:
            self.stop()
            raise

    def _wait_up(self) -> None:
        for _ in range(1200):
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended while starting:\n{self.log.read_text()[-4000:]}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI did not come up:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        """End the server."""
        self.process.terminate()
        self.process.wait(120)

    def get(self, path: str) -> Any:
        """JSON (or text) from the server."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            body = answer.read()
        return json.loads(body) if answer.headers.get_content_type() == "application/json" else body.decode()

    def post(self, path: str, content: Any) -> tuple[int, Any]:
        """Status and JSON answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body, status = answer.read(), answer.status
        except urllib.error.HTTPError as error:
            body, status = error.read(), error.code
        return status, json.loads(body) if body else None

    def submit(self, graph: dict[str, Any]) -> str:
        """Queue a prompt in API form; its id."""
        status, answer = self.post("/prompt", {"prompt": graph})
        assert status == 200, answer
        return str(answer["prompt_id"])

    def wait(self, name: str, timeout: float = 600) -> dict[str, Any]:
        """The history entry of a prompt that has ended."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            history = self.get(f"/history/{name}")
            if name in history:
                return history[name]
            time.sleep(0.1)
        raise TimeoutError(f"prompt {name} did not end; {self.log.read_text()[-2000:]}")

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Run a graph; the outputs by node. Raises AssertionError with ComfyUI's message when a node fails."""
        ended = self.wait(self.submit(graph))
        assert ended["status"]["status_str"] == "success", _message(ended)
        return ended["outputs"]

    def error(self, graph: dict[str, Any]) -> str:
        """The message of the node that fails."""
        ended = self.wait(self.submit(graph))
        assert ended["status"]["status_str"] == "error", ended["outputs"]
        return _message(ended)

    def image(self, name: str) -> np.ndarray:
        """What RigSave kept."""
        return np.load(self.base / "output" / f"{name}.npy")


def _message(ended: dict[str, Any]) -> str:
    kind, told = ended["status"]["messages"][-1]
    trace = "".join(told.get("traceback", [])[-2:])
    return f"{told.get('node_type')}: {told.get('exception_message')}\n{trace}" if kind == "execution_error" else str(kind)


class Graph:
    """An API graph while it is put together: `node("KSampler", model=other, steps=2)` gives a reference to its outputs."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}

    def node(self, kind: str, **inputs: Any) -> "Ref":
        """Add a node."""
        name = str(len(self.nodes) + 1)
        plain = {key: value.link if isinstance(value, Ref) else value for key, value in inputs.items()}
        self.nodes[name] = {"class_type": kind, "inputs": plain}
        return Ref(name)


class Ref:
    """An output of a node; `ref[1]` is the second."""

    def __init__(self, name: str, place: int = 0) -> None:
        self.name, self.place = name, place

    @property
    def link(self) -> list[Any]:
        """As the API wants it."""
        return [self.name, self.place]

    def __getitem__(self, place: int) -> "Ref":
        return Ref(self.name, place)
