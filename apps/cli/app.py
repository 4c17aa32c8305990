"""The command app: the Gradio page over all the rest, for this machine alone or as a public server with limits."""

import os
import threading
from pathlib import Path
from typing import Annotated

import typer

from genattn.apps.cli import options
from genattn.apps.cli.printing import print_json, print_lines


def app_command(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="Folder or hub id of a pipeline; several times for several. Default: the tiny ones."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; default: the first free one from 7860.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder for runs and uploads; the only one that can be read.")] = Path("out/app"),
    max_pixels: Annotated[int | None, typer.Option(help="Most height x width of a request.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Most frames of a clip.")] = None,
    max_long_frames: Annotated[int | None, typer.Option(help="Most frames of a long video.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Most denoising steps.")] = None,
    max_upload: Annotated[int | None, typer.Option(help="Most bytes of an uploaded file.")] = None,
    max_disk: Annotated[int | None, typer.Option(help="Most bytes of all runs kept; the oldest go first.")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Most requests waiting.")] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    cpu_offload: options.CpuOffload = None,
    as_json: options.Json = False,
) -> None:
    """Serve the app: guided pictures, sparse beside dense, endless video, masks, head hunts, reports. Ctrl-C ends it.

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
    limits = Limits(**{name: value for name, value in asked.items() if value is not None})
    keep_offline(folder.resolve())
    session = Session(folder, model or (), limits, dtype, device, cpu_offload)
    page, url = serve(session, host, port, open_browser)
    if as_json:
        print_json({"url": url, "models": session.names(), "folder": str(session.folder), "limits": vars(limits)})
    else:
        print_lines(f"{url} serves {', '.join(session.names())}; Ctrl-C ends it")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
