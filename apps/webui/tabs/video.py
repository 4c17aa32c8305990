"""The tab Video: the dense clip beside the sparse one, with seconds, density and PSNR."""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from genattn.apps.sampling.attention_names import ATTENTIONS, AUTO
from genattn.apps.webui.tabs.parts import (
    Cost,
    Run,
    cards,
    cost_field,
    downloads,
    in_decibels,
    missing_model,
    model_choice,
    page_verb,
    picture,
    pixel_classes,
    prompt_box,
    report_field,
    run_row,
    seed_fields,
    seed_used,
    size_fields,
    wire_cost,
)
from genattn.apps.webui.tabs.player import EMPTY, player
from genattn.apps.webui.verbs.cost import cost_line
from genattn.apps.webui.verbs.sampling import ClipForm, chosen_attention
from genattn.apps.webui.verbs.session import Model, Session
from genattn.apps.webui.verbs.video import video

PROMPT = "a red circle moves right on a dark background"
SPARSE = [name for name, make in ATTENTIONS.items() if make is not None]
COLUMNS = ("attention", "seconds", "density", "psnr", "ssim", "peak_memory_gb")
_ATTENTION = ("attention", "pattern_options", "dense_steps", "dense_layers")
_SIZES = ("frames", "steps", "height", "width")
ONE_RUN = (
    "Seconds are of one run each after a warm-up, on this machine with whatever else it does now. At small sizes attention is"
    " a small part of a step. `genattn compare` gives figures with intervals."
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
        with gr.Column(scale=2, min_width=320):
            fields = _fields(session, names)
        with gr.Column(scale=3, min_width=320):
            small = pixel_classes(session, names)
            run, results, files = _results(session, small)

    def shown(report: dict[str, Any]) -> str:
        dense, sparse = session.files_of(report)[:2]
        return player(dense, sparse, report["runs"][1]["attention"], bool(small))

    film = page_verb(video, session, fields, results, rows=_table, figures=_figures, player=shown, downloads=files)
    event = run.wire(film, fields.values(), results.values(), "video")
    told = {name: fields[name] for name in ("model", "prompt", *_ATTENTION, *_SIZES)}
    wire_cost(session, results["cost"], told, lambda given: _asked(session, given))
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
    attention = gr.Dropdown(
        [*session.presets, AUTO, *SPARSE], value=next(iter(session.presets), "radial"), label="Sparse attention"
    )
    with gr.Row():
        dense_steps = gr.Number(0.25, label="Keep first steps dense", info="share (< 1) or number", minimum=0, min_width=110)
        dense_layers = gr.Number(1, label="Keep first layers dense", info="number", precision=0, minimum=0, min_width=110)
    seed, fresh = seed_fields()
    with gr.Accordion("More", open=False):
        options = gr.Textbox("", label="Pattern settings (JSON)", placeholder='{"decay": 0.5}', lines=1)
        negative = prompt_box("", label="Negative prompt (through NAG if the guidance scale is 1)", lines=1)
        sizes = size_fields(session, names[0], "frames", "steps")
    fields = {"prompt": prompt, "attention": attention, "pattern_options": options}
    fields |= {"dense_steps": dense_steps, "dense_layers": dense_layers, "seed": seed, "randomize_seed": fresh}
    return {**fields, "negative_prompt": negative, **sizes, "model": model}


def _results(session: Session, small: list[str]) -> tuple[Run, dict[str, Any], Callable[[Any], Any]]:
    """The buttons, where the verb's values are shown, and how the downloads are found."""
    cost = cost_field("video-cost")
    run = run_row("Make both clips", "video")
    both = gr.HTML(EMPTY, elem_id="video-player")
    figures = gr.HTML("")
    strip = picture("Film strip: the same frames dense and sparse, and their difference", type="filepath", elem_id="film-strip")
    layers = picture(
        "Tiles that each layer visited in the last step: queries down, keys across",
        type="filepath",
        elem_id="layer-map",
    )
    with gr.Accordion("The clips as files", open=False):
        with gr.Row():
            dense = _player("dense", small)
            sparse = _player("sparse", small)
        pair = _player("pair", small, "dense | sparse in one film")
    table = gr.Dataframe(headers=list(COLUMNS), interactive=False, label="Runs", elem_id="video-rows")
    gr.Markdown(ONE_RUN, elem_classes="hint")
    taken, files = downloads(session, "video-files")
    seed, report = seed_used(), report_field("video-report")
    shown = {"pair": pair, "dense": dense, "sparse": sparse, "seed": seed, "report": report, "rows": table, "figures": figures}
    return run, {**shown, "player": both, "strip": strip, "layers": layers, "downloads": taken, "cost": cost}, files


def _asked(session: Session, given: dict[str, Any]) -> tuple[Model, Cost]:
    model = session.check_name(given["model"], video=True)
    attention = chosen_attention(session, *(given[name] for name in _ATTENTION))
    form = ClipForm.read(**{name: given[name] for name in _SIZES})
    return model, lambda: cost_line(session, model, form, given["prompt"], attention)


def _player(name: str, classes: list[str], label: str | None = None) -> gr.Video:
    look: dict[str, Any] = {"autoplay": True, "loop": True, "interactive": False, "height": 320}
    return gr.Video(label=label or name, elem_classes=classes, elem_id=f"clip-{name}", **look)


def _table(rows: list[dict[str, Any]]) -> list[list[Any]]:
    return [[row.get(name, "-") for name in COLUMNS] for row in rows]


def _figures(report: dict[str, Any]) -> str:
    sparse = report["runs"][1]
    facts = [
        (f"{sparse['density']:.0%}", "of the dense scores computed"),
        (in_decibels(sparse["psnr"]), "PSNR to dense"),
        (f"{sparse['ssim']:.3f}", "SSIM to dense"),
        (f"{sparse['seconds']:.2f} s", f"sparse; dense {report['runs'][0]['seconds']:.2f} s, one run each"),
    ]
    return cards(*facts)
