"""The tab Long video: segments as they are made, prompts by frame, drift, stop and resume."""

import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from genattn.apps.webui.tabs.parts import (
    GPU,
    Cost,
    Run,
    cost_field,
    downloads,
    local_file,
    missing_model,
    model_choice,
    optional_number,
    page_verb,
    pixel_classes,
    prompt_box,
    report_field,
    run_row,
    seed_fields,
    seed_used,
    size_fields,
    wire_cost,
)
from genattn.apps.webui.verbs.long import PLOTTED, long, long_cost, resume
from genattn.apps.webui.verbs.sampling import ClipForm
from genattn.apps.webui.verbs.session import Model, Session
from genattn.errors import GenAttnError

PROMPT = '0:"a red circle moves right on a dark background" 60:"a blue circle moves right on a dark background"'
_WAIT_SECONDS = 30.0
_COLOURS = dict(zip(PLOTTED, ("#d97706", "#2563eb", "#16a34a")))
_FILM = ("prompt", "frames", "fade", "partitions", "lookahead", "start_picture")
_SIZE = ("height", "width")


def why_not_streaming() -> str | None:
    """None if segments can be joined into one stream (Gradio needs ffmpeg and ffprobe for that), else the reason."""
    missing = [name for name in ("ffmpeg", "ffprobe") if shutil.which(name) is None]
    if not missing:
        return None
    shown = "only the newest second is shown until the film is done; install ffmpeg to see it grow"
    return f"{' and '.join(missing)} not found: {shown}"


def long_tab(session: Session) -> dict[str, Any]:
    """Build the tab; returns its report field and the events of its runs."""
    names = session.names(video=True)
    if not names:
        missing_model("text-to-video")
        return {}
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            fields = _fields(session, names)
        with gr.Column(scale=3):
            run, results, files, more, again = _results(session, pixel_classes(session, names))
    outputs = [run.status, *results.values()]
    start = page_verb(long, session, fields, results, drift=_frame, downloads=files)
    resumed = {"run": results["run"], "frames": more}
    go_on = page_verb(resume, session, resumed, results, drift=_frame, downloads=files)
    told = {name: fields[name] for name in ("model", *_FILM, *_SIZE)}
    wire_cost(session, results["cost"], told, lambda given: _asked(session, given))
    first = run.go.click(start, list(fields.values()), outputs, api_name="long", **GPU)
    second = again.click(go_on, [results["run"], more], outputs, api_name="resume", **GPU)

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

    run.stop_with([first, second], stopped, [results["run"]], [results["film"]])
    return {"report": results["report"], "events": [first, second]}


def _asked(session: Session, given: dict[str, Any]) -> tuple[Model, Cost]:
    model = session.check_name(given["model"], video=True)
    form = ClipForm.read(**{name: given[name] for name in _SIZE})
    return model, lambda: long_cost(session, model, form, **{name: given[name] for name in _FILM})


def _fields(session: Session, names: Sequence[str]) -> dict[str, Any]:
    """The verb's fields in its order."""
    model = model_choice(session, names)
    prompt = prompt_box(PROMPT, "Prompt, or prompts by frame", 3, 'A text, or 0:"first" 60:"from frame 60 on"')
    with gr.Row():
        frames = gr.Number(125, label="Frames", precision=0, minimum=1, min_width=90)
        fade = gr.Number(16, label="Cross-fade", info="frames", precision=0, minimum=0, min_width=90)
    seed, fresh = seed_fields()
    with gr.Accordion("More", open=False):
        with gr.Row():
            partitions = gr.Slider(1, 8, 1, step=1, label="Partitions: windows in the queue; the papers use 4, which is slower")
            correction = gr.Slider(0, 1, 0, step=0.05, label="Drift correction")
        with gr.Row():
            lookahead = gr.Checkbox(False, label="Lookahead (twice the work, as in the papers)")
            ouroboros = gr.Checkbox(False, label="Ouroboros: coherent tail, memory")
        negative = prompt_box("", label="Negative prompt", lines=1)
        sizes = size_fields(session, names[0])
        start = local_file("Begin from a picture", [".png", ".jpg", ".jpeg", ".webp"])
    fields: dict[str, Any] = {
        "prompt": prompt,
        "frames": frames,
        "fade": fade,
        "partitions": partitions,
        "lookahead": lookahead,
    }
    fields |= {"ouroboros": ouroboros, "drift_correction": correction, "start_picture": start}
    return {**fields, "seed": seed, "randomize_seed": fresh, "negative_prompt": negative, **sizes, "model": model}


def _results(session: Session, small: list[str]) -> tuple[Run, dict[str, Any], Callable[[Any], Any], gr.Number, gr.Button]:
    """The buttons, where the verbs' values are shown, how the downloads are found, and the length and button of a resume."""
    alone = why_not_streaming()
    cost = cost_field("long-cost")
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
    gr.HTML(_drift_caption(), elem_classes="caption", padding=False)
    drift = gr.LinePlot(
        None,  # an empty table is an error to the plot
        x="frame",
        y="change",
        color="statistic",
        height=220,
        color_map=_COLOURS,
        colors_in_legend=[],  # on a phone a legend and a title inside the plot leave no room for its lines
        elem_id="drift",
    )
    with gr.Row(elem_classes="tight"):
        name = gr.Textbox(label="Run", placeholder="name of a stopped run", scale=3, elem_id="long-run")
        more = optional_number("New length", "0: as it was", min_width=110)
        again = gr.Button("Resume", elem_id="long-resume", scale=1, min_width=100)
    results = {"segment": live, "film": film, "drift": drift, "run": name, "seed": seed_used()}
    results["report"] = report_field("long-report")
    taken, files = downloads(session, "long-files")
    return run, {**results, "downloads": taken, "cost": cost}, files, more, again


def _drift_caption() -> str:
    names = ", ".join(f"<span style='color: {colour}'>{name}</span>" for name, colour in _COLOURS.items())
    return f"<p>Drift: change since the first second, in levels of 0 to 255: {names}</p>"


def _frame(rows: list[dict[str, Any]]) -> Any:
    import pandas

    return pandas.DataFrame(rows, columns=["frame", "statistic", "change"])
