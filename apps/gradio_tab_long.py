"""The tab Long video: segments as they are made, prompts by frame, drift, stop and resume."""

import shutil
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from genattn.apps.gradio_long import PLOTTED, long, resume
from genattn.apps.gradio_parts import (
    GPU,
    local_file,
    missing_model,
    model_choice,
    optional_number,
    prompt_box,
    refusing,
    report_field,
    run_row,
    seed_fields,
    size_fields,
    streamed,
)
from genattn.apps.gradio_session import Session
from genattn.errors import GenAttnError

PROMPT = '0:"a red circle moves right on a dark background" 60:"a blue circle moves right on a dark background"'
_WAIT_SECONDS = 30.0


def why_not_streaming() -> str | None:
    """None if segments can be joined into one stream (Gradio needs ffmpeg and ffprobe for that), else the reason."""
    missing = [name for name in ("ffmpeg", "ffprobe") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found: the newest second is shown alone until the film is done" if missing else None


def long_tab(session: Session) -> dict[str, Any]:
    """Build the tab; returns its report field and the events of its runs."""
    names = session.names(video=True)
    if not names:
        missing_model("text-to-video")
        return {}
    small = ["small"] if all(session.models[n].defaults.get("height", 512) <= 128 for n in names) else []
    alone = why_not_streaming()
    with gr.Row():
        with gr.Column(scale=2, min_width=340):
            model = model_choice(session, names)
            prompt = prompt_box(PROMPT, "Prompt, or prompts by frame", 3, 'A text, or 0:"first" 60:"from frame 60 on"')
            with gr.Row():
                frames = gr.Number(125, label="Frames", precision=0, minimum=1, min_width=90)
                fade = gr.Number(16, label="Cross-fade", info="frames", precision=0, minimum=0, min_width=90)
            seed, fresh = seed_fields()
            with gr.Accordion("More", open=False):
                with gr.Row():
                    partitions = gr.Slider(1, 8, 4, step=1, label="Partitions: windows in the queue")
                    correction = gr.Slider(0, 1, 0, step=0.05, label="Drift correction")
                with gr.Row():
                    lookahead = gr.Checkbox(True, label="Lookahead (twice the work)")
                    ouroboros = gr.Checkbox(False, label="Ouroboros: coherent tail, memory")
                negative = prompt_box("", label="Negative prompt", lines=1)
                height, width, cfg = size_fields(session, names[0], frames=False, steps=False)
                start = local_file("Begin from a picture", [".png", ".jpg", ".jpeg", ".webp"])
        with gr.Column(scale=3):
            run = run_row("Start the film", "long")
            with gr.Row():
                live = gr.Video(
                    label="Live: segment by segment" if alone is None else "Live: newest second",
                    streaming=alone is None,
                    autoplay=True,
                    loop=alone is not None,
                    interactive=False,
                    height=300,
                    elem_classes=small,
                    elem_id="live",
                )
                film = gr.Video(label="Film so far", interactive=False, height=300, elem_classes=small, elem_id="film")
            if alone is not None:
                gr.Markdown(alone, elem_classes="hint")
            drift = gr.LinePlot(
                None,  # an empty table is an error to the plot
                x="frame",
                y="change",
                color="statistic",
                height=220,
                title="Drift: change since the first second, in levels of 0 to 255",
                color_map=dict(zip(PLOTTED, ("#d97706", "#2563eb", "#16a34a"))),
                elem_id="drift",
            )
            with gr.Row(elem_classes="tight"):
                name = gr.Textbox(label="Run", placeholder="name of a stopped run", scale=3, elem_id="long-run")
                more = optional_number("New length", zero="0: as it was", min_width=110)
                again = gr.Button("Resume", elem_id="long-resume", scale=1, min_width=100)
            used = optional_number("Seed used", interactive=False)
            report = report_field("long-report")

    shown = ("segment", "film", "drift", "run", "seed", "report")

    def start_film(
        prompt: str,
        frames: int = 125,
        fade: int = 0,
        partitions: int = 4,
        lookahead: bool = True,
        ouroboros: bool = False,
        drift_correction: float = 0.0,
        start_picture: str | None = None,
        seed: int = 0,
        randomize_seed: bool = False,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        model: str | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """A video of any length, streamed while it is made; give `run` to resume after a stop."""
        form = {"negative_prompt": negative_prompt, "height": height, "width": width, "guidance_scale": guidance_scale}
        with refusing():
            updates = long(
                session,
                prompt,
                frames,
                fade,
                partitions,
                lookahead,
                ouroboros,
                drift_correction,
                start_picture,
                seed,
                randomize_seed,
                model,
                **form,
            )
            yield from streamed(updates, *shown, drift=_frame)

    def go_on(run: str, frames: int = 0) -> Iterator[tuple[Any, ...]]:
        """Take up a stopped run; frames: its new length, 0 for the old one."""
        with refusing():
            yield from streamed(resume(session, run, frames or None), *shown, drift=_frame)

    def stopped(run: str) -> tuple[Any, Any]:
        """Wait for the film to be closed and show it."""
        end = time.monotonic() + _WAIT_SECONDS
        while session.lock.locked() and time.monotonic() < end:
            time.sleep(0.1)
        try:
            film = session.run_folder(run) / "video.mp4"
        except GenAttnError:  # stopped while it waited
            return "stopped before it began", gr.skip()
        if not film.is_file() or not film.stat().st_size:
            return "stopped before the first frame", gr.skip()
        return "stopped; Resume goes on from here", str(film)

    inputs = [prompt, frames, fade, partitions, lookahead, ouroboros, correction, start, seed, fresh, negative]
    inputs += [height, width, cfg, model]
    outputs = [live, film, drift, name, used, report]
    first = run.go.click(start_film, inputs, [run.status, *outputs], api_name="long", **GPU)
    second = again.click(go_on, [name, more], [run.status, *outputs], api_name="resume", **GPU)
    run.stop_with([first, second], stopped, [name], [film])
    return {"report": report, "events": [first, second]}


def _frame(rows: list[dict[str, Any]]) -> Any:
    import pandas

    return pandas.DataFrame(rows, columns=["frame", "statistic", "change"])
