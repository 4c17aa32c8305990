"""The tab Video: the dense clip beside the sparse one, with seconds, density and PSNR."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from genattn.apps.sampling.attention_names import ATTENTIONS
from genattn.apps.webui.tabs.parts import (
    Run,
    cards,
    missing_model,
    model_choice,
    page_verb,
    pixel_classes,
    prompt_box,
    report_field,
    run_row,
    seed_fields,
    seed_used,
    size_fields,
)
from genattn.apps.webui.verbs.session import Session
from genattn.apps.webui.verbs.video import video

PROMPT = "a red circle moves right on a dark background"
SPARSE = [name for name, make in ATTENTIONS.items() if make is not None]
COLUMNS = ("attention", "seconds", "density", "psnr", "ssim", "peak_memory_gb")
ONE_RUN = (
    "Seconds are of one run each after a warm-up, on this machine as busy as it is now; at small sizes attention is a small"
    " part of a step. Figures with intervals: `genattn compare`."
)
EXAMPLES = [
    [PROMPT, "radial", "", 0.25],
    ["a blue square moves down on a light background", "radial-official", "", 0.0],
    ["a green ring orbits on a gray background", "neighborhood", '{"window_size": [5, 5, 5]}', 0.25],
]


def video_tab(session: Session) -> dict[str, Any]:
    """Build the tab; returns its report field and the event of a run."""
    names = session.names(video=True)
    if not names:
        missing_model("text-to-video")
        return {}
    with gr.Row():
        with gr.Column(scale=2, min_width=340):
            fields = _fields(session, names)
        with gr.Column(scale=3):
            run, results = _results(pixel_classes(session, names))
    film = page_verb(video, session, fields, results, rows=_table, figures=_figures)
    event = run.wire(film, fields.values(), results.values(), "video")
    gr.Examples(
        EXAMPLES if names[0] == "tiny-wan" else [[PROMPT, "radial", "", 0.25]],
        [fields[name] for name in ("prompt", "attention", "pattern_options", "dense_steps")],
        [run.status, *results.values()],
        fn=film,
        cache_examples=True,
        cache_mode="lazy",
        elem_id="video-examples",
        label="Examples: made at the first click, then kept",
    )
    return {"report": results["report"], "event": event}


def _fields(session: Session, names: Sequence[str]) -> dict[str, Any]:
    """The verb's fields in its order."""
    model = model_choice(session, names)
    prompt = prompt_box(PROMPT)
    attention = gr.Dropdown(SPARSE, value="radial", label="Sparse attention")
    with gr.Row():
        dense_steps = gr.Number(0.25, label="Dense steps", info="share (< 1) or number", minimum=0, min_width=110)
        dense_layers = gr.Number(1, label="Dense layers", info="first layers", precision=0, minimum=0, min_width=110)
    seed, fresh = seed_fields()
    with gr.Accordion("More", open=False):
        options = gr.Textbox("", label="Pattern settings (JSON)", placeholder='{"decay": 0.5}', lines=1)
        negative = prompt_box("", label="Negative prompt (at guidance scale 1 by NAG)", lines=1)
        sizes = size_fields(session, names[0], "frames", "steps")
    fields = {"prompt": prompt, "attention": attention, "pattern_options": options}
    fields |= {"dense_steps": dense_steps, "dense_layers": dense_layers, "seed": seed, "randomize_seed": fresh}
    return {**fields, "negative_prompt": negative, **sizes, "model": model}


def _results(small: list[str]) -> tuple[Run, dict[str, Any]]:
    """The buttons, and where the verb's values are shown."""
    run = run_row("Make both clips", "video")
    pair = _player("pair", small, "dense | sparse, in step")
    with gr.Row():
        dense = _player("dense", small)
        sparse = _player("sparse", small)
    figures = gr.HTML("")
    table = gr.Dataframe(headers=list(COLUMNS), interactive=False, label="Runs", elem_id="video-rows")
    gr.Markdown(ONE_RUN, elem_classes="hint")
    seed, report = seed_used(), report_field("video-report")
    return run, {
        "pair": pair,
        "dense": dense,
        "sparse": sparse,
        "seed": seed,
        "report": report,
        "rows": table,
        "figures": figures,
    }


def _player(name: str, classes: list[str], label: str | None = None) -> gr.Video:
    look: dict[str, Any] = {"autoplay": True, "loop": True, "interactive": False, "height": 320}
    return gr.Video(label=label or name, elem_classes=classes, elem_id=f"clip-{name}", **look)


def _table(rows: list[dict[str, Any]]) -> list[list[Any]]:
    return [[row.get(name, "-") for name in COLUMNS] for row in rows]


def _figures(report: dict[str, Any]) -> str:
    sparse = report["runs"][1]
    facts = [
        (f"{sparse['density']:.0%}", "of the dense scores computed"),
        (f"{sparse['psnr']:.1f} dB", "PSNR to dense"),
        (f"{sparse['ssim']:.3f}", "SSIM to dense"),
        (f"{sparse['seconds']:.2f} s", f"sparse; dense {report['runs'][0]['seconds']:.2f} s, one run each"),
    ]
    return cards(*facts)
