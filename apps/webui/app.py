"""The app: six tabs over one session. `build` makes the page, `serve` starts the server.

Nothing leaves the machine: system fonts, no analytics, no sharing, no run history, no hub. One visitor's job at a time runs on
the GPU, the others wait in a queue with a bound; only the session's folder can be read through the server.
"""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from genattn.apps.webui.verbs.session import Session
from genattn.errors import GenAttnError, first_line

ABOUT = (
    "# genattn\n"
    "Sparse attention, guidance by single attention heads and videos of any length, on **stock** diffusers pipelines."
    " Every run shows its seed and a report."
)


def keep_offline(folder: Path) -> None:
    """Settings that Gradio reads from the environment, before it is imported: nothing sent, all files under `folder`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "cache")
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(folder / "examples")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    (folder / "examples").mkdir(exist_ok=True)


def build(session: Session) -> Any:
    """The page as gr.Blocks, its queue bounded; raises GenAttnError without Gradio."""
    keep_offline(session.folder)
    try:
        import gradio as gr
    except ImportError as error:
        raise GenAttnError(f"the app needs Gradio, got {error}; install it: pip install 'genattn[gradio]'") from error
    from genattn.apps.webui.tabs.hunt import hunt_tab
    from genattn.apps.webui.tabs.image import image_tab
    from genattn.apps.webui.tabs.long import long_tab
    from genattn.apps.webui.tabs.mask import mask_tab
    from genattn.apps.webui.tabs.parts import QUIET
    from genattn.apps.webui.tabs.report import report_tab
    from genattn.apps.webui.tabs.video import video_tab

    with gr.Blocks(title="genattn", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(ABOUT, elem_id="title")
        with gr.Tabs(selected="image" if session.names(video=False) else "video") as tabs:
            with gr.Tab("Image", id="image"):
                image = image_tab(session)
            with gr.Tab("Video", id="video"):
                video = video_tab(session)
            with gr.Tab("Long", id="long"):
                long = long_tab(session)
            with gr.Tab("Masks", id="mask"):
                masks = mask_tab(session)
            with gr.Tab("Heads", id="hunt"):
                hunt = hunt_tab(session)
            with gr.Tab("Report", id="report"):
                reports = report_tab(session)
        remember, kept, table = reports["remember"]
        for tab in (image, video, long, hunt):
            for event in tab.get("events", [tab["event"]] if "event" in tab else []):
                event.success(remember, [kept, tab["report"]], [kept, table], **QUIET)
        page.load(*masks["first"], **QUIET)
        if image:
            page.load(*image["first"], **QUIET)
        if image and hunt:
            # what was found, into the other tab
            hunt["use"].click(lambda found: (found, gr.Tabs(selected="image")), hunt["found"], [image["heads"], tabs], **QUIET)
    return page.queue(max_size=session.limits.queue, default_concurrency_limit=4)


def _first_sentence(error: OSError) -> str:
    """Without what Gradio says of its own settings."""
    return first_line(error).split(". ")[0].removesuffix(".")


def serve(
    session: Session,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
) -> tuple[Any, str]:
    """Start the server in a thread; gives (page, address). Raises GenAttnError if the port is taken."""
    with redirect_stdout(io.StringIO()):  # Gradio tells of its caches, where a program expects our JSON
        page = build(session)
    from genattn.apps.webui.tabs.player import HEAD
    from genattn.apps.webui.theme import CSS, theme

    try:
        _, url, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,  # as Gradio writes addresses of version 6
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=open_browser,
            allowed_paths=[str(session.folder)],
            max_file_size=session.limits.upload_bytes,
            run_history=False,
            ssr_mode=False,
            footer_links=["api"],
            enable_monitoring=False,
            theme=theme(),
            css=CSS,
            head=HEAD,
        )
    except OSError as error:
        raise GenAttnError(
            f"the server cannot listen on {host}, port {port or '7860 to 7959'} ({_first_sentence(error)}); name another --port"
        ) from None
    return page, url
