"""The tab Video: the dense clip beside the sparse one, with seconds, density and PSNR."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from genattn.apps.attention_names import ATTENTIONS
from genattn.apps.gradio_parts import (
    cards,
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
from genattn.apps.gradio_video import video

PROMPT = "a red circle moves right on a dark background"
SPARSE = [name for name, make in ATTENTIONS.items() if make is not None]
COLUMNS = ("attention", "seconds", "density", "psnr", "ssim", "peak_memory_gb")
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
    small = ["small"] if all(session.models[n].defaults.get("height", 512) <= 128 for n in names) else []
    with gr.Row():
        with gr.Column(scale=2, min_width=340):
            model = model_choice(session, names)
            prompt = prompt_box(PROMPT)
            attention = gr.Dropdown(SPARSE, value="radial", label="Sparse attention")
            with gr.Row():
                dense_steps = gr.Number(0.25, label="Dense steps", info="share (< 1) or number", minimum=0, min_width=110)
                dense_layers = gr.Number(1, label="Dense layers", info="first layers", precision=0, minimum=0, min_width=110)
            seed, fresh = seed_fields()
            with gr.Accordion("More", open=False):
                options = gr.Textbox("", label="Pattern settings (JSON)", placeholder='{"decay": 0.5}', lines=1)
                negative = prompt_box("", label="Negative prompt", lines=1)
                height, width, frames, steps, cfg = size_fields(session, names[0], frames=True)
        with gr.Column(scale=3):
            run = run_row("Make both clips", "video")
            with gr.Row():
                dense = _player("dense", small)
                sparse = _player("sparse", small)
            figures = gr.HTML("")
            table = gr.Dataframe(headers=list(COLUMNS), interactive=False, label="Runs", elem_id="video-rows")
            used = optional_number("Seed used", interactive=False)
            report = report_field("video-report")

    def film(
        prompt: str,
        attention: str = "radial",
        pattern_options: str = "",
        dense_steps: float = 0.25,
        dense_layers: int = 1,
        seed: int = 0,
        randomize_seed: bool = False,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        model: str | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """One clip with dense and with sparse attention, same seed; seconds, density and PSNR."""
        form: dict[str, Any] = {
            "height": height,
            "width": width,
            "frames": frames,
            "steps": steps,
            "guidance_scale": guidance_scale,
        }
        form["negative_prompt"] = negative_prompt
        with refusing():
            updates = video(
                session, prompt, attention, pattern_options, dense_steps, dense_layers, seed, randomize_seed, model, **form
            )
            for row in streamed(updates, "dense", "sparse", "seed", "report", "rows", rows=_table):
                yield (*row, _figures(row[4]) if "runs" in row[4] else gr.skip())

    inputs = [prompt, attention, options, dense_steps, dense_layers, seed, fresh, negative]
    inputs += [height, width, frames, steps, cfg, model]
    outputs = [dense, sparse, used, report, table, figures]
    event = run.wire(film, inputs, outputs, "video")
    gr.Examples(
        EXAMPLES if names[0] == "tiny-wan" else [[PROMPT, "radial", "", 0.25]],
        [prompt, attention, options, dense_steps],
        [run.status, *outputs],
        fn=film,
        cache_examples=True,
        cache_mode="lazy",
        elem_id="video-examples",
        label="Examples: made at the first click, then kept",
    )
    return {"report": report, "event": event}


def _player(label: str, classes: list[str]) -> gr.Video:
    return gr.Video(
        label=label, autoplay=True, loop=True, interactive=False, height=320, elem_classes=classes, elem_id=f"clip-{label}"
    )


def _table(rows: list[dict[str, Any]]) -> list[list[Any]]:
    return [[row.get(name, "-") for name in COLUMNS] for row in rows]


def _figures(report: dict[str, Any]) -> str:
    sparse = report["runs"][1]
    facts = [
        (f"{sparse['seconds']:.2f} s", f"sparse; dense {report['runs'][0]['seconds']:.2f} s"),
        (f"{sparse['density']:.0%}", "of the dense scores computed"),
        (f"{sparse['psnr']:.1f} dB", "PSNR to dense"),
        (f"{sparse['ssim']:.3f}", "SSIM to dense"),
    ]
    return cards(*facts)
