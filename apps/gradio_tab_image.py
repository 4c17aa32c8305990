"""The tab Image: guided against not, heads chosen on the map."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from genattn.apps.gradio_head_map import draw_head_map, head_at, read_heads, toggle_head, write_heads
from genattn.apps.gradio_image import image, read_head_set
from genattn.apps.gradio_parts import (
    cards,
    local_file,
    missing_model,
    model_choice,
    optional_number,
    picture,
    prompt_box,
    refusing,
    report_field,
    run_row,
    seed_fields,
    size_fields,
    streamed,
)
from genattn.apps.gradio_session import Session
from genattn.guidance.perturbation import TARGETS

PROMPT = "a large red circle stays still on a dark background"
EXAMPLES = [
    ["a large red circle stays still on a dark background", "L2H0,L3H1", 0.5, 3.0],
    ["a small blue square stays still on a light background", "L4", 0.5, 2.0],
    ["a green triangle stays still on a gray background", "L1H2,L5H3", 1.0, 3.0],
]


def image_tab(session: Session) -> dict[str, Any]:
    """Build the tab; returns its heads field, its report field and the event of a run, for the other tabs."""
    names = session.names(video=False)
    if not names:
        missing_model("text-to-image")
        return {}
    small = ["small"] if all(session.models[n].defaults.get("height", 512) <= 128 for n in names) else []
    scores = gr.State({}, time_to_live=3600)
    with gr.Row():
        with gr.Column(scale=2, min_width=380):
            model = model_choice(session, names)
            prompt = prompt_box(PROMPT)
            heads = gr.Textbox("", label="Perturbed heads", placeholder="click on the map, or write L2H1,L4H0", elem_id="heads")
            grid = picture("Layer x head: click to choose", "clickable", buttons=[], elem_id="head-map")
            with gr.Row():
                u = gr.Slider(0, 1, 0.5, step=0.05, label="Strength u", min_width=150)
                scale = gr.Slider(-2, 8, 3.0, step=0.25, label="Guidance w", min_width=150)
            seed, fresh = seed_fields()
            with gr.Accordion("More", open=False):
                target = gr.Dropdown([t for t in TARGETS if t != "skip"], value="identity", label="Target")
                negative = prompt_box("", label="Negative prompt", lines=1)
                height, width, steps, cfg = size_fields(session, names[0], frames=False)
                upload = local_file("Head set (JSON)", [".json"], elem_id="head-set")
        with gr.Column(scale=3):
            run = run_row("Draw both", "image")
            pair = gr.ImageSlider(
                label="without guidance | guided",
                format="png",
                type="filepath",
                interactive=False,
                height=460,
                elem_classes=small,
            )
            figures = gr.HTML("")
            used = optional_number("Seed used", interactive=False)
            report = report_field("image-report")

    def draw(
        prompt: str,
        heads: str,
        u: float = 0.5,
        scale: float = 3.0,
        target: str = "identity",
        seed: int = 0,
        randomize_seed: bool = False,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        model: str | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """One picture with and without perturbed-head guidance, same seed."""
        form = {"height": height, "width": width, "steps": steps, "guidance_scale": guidance_scale}
        with refusing():
            updates = image(
                session, prompt, heads, u, scale, target, seed, randomize_seed, model, negative_prompt=negative_prompt, **form
            )
            yield from _with_figures(streamed(updates, "pair", "seed", "report"))

    inputs = [prompt, heads, u, scale, target, seed, fresh, negative, height, width, steps, cfg, model]
    outputs = [pair, used, report, figures]
    event = run.wire(draw, inputs, outputs, "image")

    def paint(heads: str, u: float, scores: dict[str, float], model: str) -> Any:
        with refusing():
            layers = session.layers(session.check_name(model, video=False))
            return draw_head_map(layers, read_heads(heads, layers, u), {_pair(n): s for n, s in (scores or {}).items()})

    def propose(heads: str, model: str) -> str:
        with refusing():
            layers = sorted(session.layers(session.check_name(model, video=False)))
        return heads or f"L{layers[len(layers) // 2]}"

    def click(heads: str, u: float, model: str, event: gr.SelectData) -> str:
        with refusing():
            layers = session.layers(session.check_name(model, video=False))
            return toggle_head(heads, head_at(event.index[0], event.index[1], layers), layers, u)

    def load(path: str | None, model: str) -> tuple[Any, ...]:
        """Read a head set: its heads, scale, target and scores."""
        if path is None:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip(), {}
        with refusing():
            found = read_head_set(session, path, model)
        u = next(iter(found.heads.values()))
        named = {f"L{layer}H{head}": score for (layer, head), score in found.scores.items()}
        return write_heads(found.heads, u), u, found.scale, found.target, named

    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    drawn = gr.on([heads.change, u.change, scores.change, model.change], paint, [heads, u, scores, model], grid, **private)
    assert drawn is not None
    grid.select(click, [heads, u, model], heads, **private)
    upload.upload(load, [upload, model], [heads, u, scale, target, scores], api_name="load_head_set", show_progress="hidden")
    gr.Examples(
        EXAMPLES if names[0] == "tiny-sd3" else [[PROMPT, "L1", 0.5, 3.0]],
        [prompt, heads, u, scale],
        [run.status, *outputs],
        fn=draw,
        cache_examples=True,
        cache_mode="lazy",
        elem_id="image-examples",
        label="Examples: drawn at the first click, then kept",
    )
    return {"heads": heads, "report": report, "event": event, "first": (propose, [heads, model], heads)}


def _pair(name: str) -> tuple[int, int]:
    from genattn.guidance.heads import parse_head

    return parse_head(name)


def _with_figures(rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Rows with the cards that belong to their report."""
    for row in rows:
        report = row[-1]
        yield (*row, _figures(report) if "runs" in report else gr.skip())


def _figures(report: dict[str, Any]) -> str:
    plain, guided = report["runs"]
    facts = [
        (f"{plain['seconds']:.2f} s", "without guidance"),
        (f"{guided['seconds']:.2f} s", "guided"),
        (f"{guided['psnr']:.1f} dB", "PSNR between the two"),
    ]
    for name in ("colour", "shape"):
        judged = [run.get("oracle") for run in (plain, guided)]
        if all(judged):
            facts.append((" → ".join("yes" if found[name] == 1 else "no" for found in judged), f"{name} as asked"))
    return cards(*facts)
