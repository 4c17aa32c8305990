"""The command app: the Gradio page over all the rest, for this machine alone or as a public server with limits."""

import contextlib
import errno
import os
import socket
import threading
from pathlib import Path
from typing import Annotated

import typer

from genattn.apps.cli import options
from genattn.apps.cli.printing import print_json, print_lines
from genattn.errors import GenAttnError
from genattn.one_writer import only_writer


def app_command(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="Folder or hub id of a pipeline. Repeat the option for several. Default: the tiny models."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; default: the first free one from 7860.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder for runs and uploads. The server reads no other.")] = Path("out/app"),
    settings: Annotated[
        list[Path] | None,
        typer.Option(help="A settings file of `genattn tune`, offered as a preset. Repeat the option for several."),
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Largest height x width of a request, in pixels.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Largest number of frames of a clip.")] = None,
    max_long_frames: Annotated[int | None, typer.Option(help="Largest number of frames of a long video.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Largest number of denoising steps.")] = None,
    max_upload: Annotated[int | None, typer.Option(help="Largest size of an uploaded file, in bytes.")] = None,
    max_disk: Annotated[
        int | None, typer.Option(help="Disk space for all runs, in bytes. The oldest are deleted first.")
    ] = None,
    max_queue: Annotated[int | None, typer.Option(help="Largest number of waiting requests.")] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    cpu_offload: options.CpuOffload = None,
    as_json: options.Json = False,
) -> None:
    """Serve the app in a browser: guided pictures, sparse beside dense, endless video, masks, head search. Ctrl-C ends it.

    Example: genattn app --host 0.0.0.0 --max-pixels 262144 --max-frames 49 --max-steps 30
    """
    from genattn.apps.webui.app import keep_offline, serve
    from genattn.apps.webui.verbs.limits import Limits
    from genattn.apps.webui.verbs.session import Session

    if all(Path(source).is_dir() for source in model or ()):
        os.environ["HF_HUB_OFFLINE"] = "1"  # before any library asks; a hub id needs the hub, or its cache
    asked = {
        "pixels": max_pixels,
        "frames": max_frames,
        "long_frames": max_long_frames,
        "steps": max_steps,
        "upload_bytes": max_upload,
        "disk_bytes": max_disk,
        "queue": max_queue,
    }
    _check_place(folder, host, port)
    limits = Limits(**{name: value for name, value in asked.items() if value is not None})
    with only_writer(folder, "--folder"):  # each would make room by deleting the other's runs
        keep_offline(folder.resolve())
        session = Session(folder, model or (), limits, dtype, device, cpu_offload, settings or ())
        page, url = serve(session, host, port, open_browser)
        try:
            if as_json:
                print_json({"url": url, "models": session.names(), "folder": str(session.folder), "limits": vars(limits)})
            else:
                print_lines(f"{url} serves {', '.join(session.names())}; Ctrl-C ends it")
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def _check_place(folder: Path, host: str, port: int | None) -> None:
    """Refuse an address or a folder that cannot serve, before any model is looked at."""
    from genattn.apps.sampling.output_files import check_folder

    if port is not None and not 1 <= port <= 65535:
        raise GenAttnError(f"--port must lie in 1 to 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if host != "localhost":
            socket.inet_pton(family, host)
    except OSError:
        _resolve(host)
    _listen(family, host, port)
    check_folder(folder, "--folder")


def _listen(family: int, host: str, port: int | None) -> None:
    """Take the address for a moment: whether it is this machine's, and free, is known before half a minute of imports."""
    try:
        with socket.socket(family) as probe:
            if os.name == "posix":  # as the server itself asks; elsewhere it would take a port that is in use
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port or 0))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise GenAttnError(f"--port {port} is taken by another process; choose another, or leave it out") from None
        if error.errno == errno.EACCES:
            raise GenAttnError(f"--port {port} needs rights that this user does not have; choose one from 1024 on") from None
        raise GenAttnError(
            f"--host must be an address of this machine such as 127.0.0.1 or 0.0.0.0, got {host!r} ({error.strerror or error})"
        ) from None


def _resolve(host: str) -> None:
    """A name instead of an address: it must be one of this machine's, and be found soon."""
    found: list[bool] = []

    def look() -> None:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, None)
            found.append(True)

    asker = threading.Thread(target=look, daemon=True)
    asker.start()
    asker.join(timeout=5)  # without a name server the system itself asks for minutes
    if not found:
        raise GenAttnError(f"--host must be an address of this machine such as 127.0.0.1 or 0.0.0.0, got {host!r}")
