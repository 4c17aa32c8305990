"""The tab Image: guided against not, heads chosen on the map."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from genattn.apps.webui.tabs.parts import (
    QUIET,
    Cost,
    Run,
    cards,
    cost_field,
    downloads,
    local_file,
    missing_model,
    model_choice,
    page_verb,
    picture,
    pixel_classes,
    prompt_box,
    refusing,
    report_field,
    run_row,
    seed_fields,
    seed_used,
    size_fields,
    wire_cost,
)
from genattn.apps.webui.verbs.head_map import draw_head_map, head_at, read_heads, toggle_head, write_heads
from genattn.apps.webui.verbs.image import image, image_cost, read_head_set
from genattn.apps.webui.verbs.sampling import ClipForm
from genattn.apps.webui.verbs.session import Model, Session
from genattn.guidance.heads.names import parse_head
from genattn.guidance.softpag.perturbation import TARGETS

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
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            fields, grid, upload = _fields(session, names)
        with gr.Column(scale=3):
            run, results, files = _results(session, pixel_classes(session, names))
    draw = page_verb(image, session, fields, results, figures=_figures, downloads=files)
    event = run.wire(draw, fields.values(), results.values(), "image")
    gr.Examples(
        EXAMPLES if names[0] == "tiny-sd3" else [[PROMPT, "L1", 0.5, 3.0]],
        [fields[name] for name in ("prompt", "heads", "u", "scale")],
        [run.status, *results.values()],
        fn=draw,
        cache_examples=True,
        cache_mode="lazy",
        elem_id="image-examples",
        label="Examples: drawn at the first click, then kept",
    )
    told = {name: fields[name] for name in ("model", "steps", "height", "width")}
    wire_cost(session, results["cost"], told, lambda given: _asked(session, given))
    first = _wire_map(session, fields, grid, upload)
    return {"heads": fields["heads"], "report": results["report"], "event": event, "first": first}


def _asked(session: Session, given: dict[str, Any]) -> tuple[Model, Cost]:
    model = session.check_name(given["model"], video=False)
    form = ClipForm.read(**{name: given[name] for name in ("steps", "height", "width")})
    return model, lambda: image_cost(session, model, form)


def _fields(session: Session, names: Sequence[str]) -> tuple[dict[str, Any], gr.Image, gr.File]:
    """The verb's fields in its order, the head map and the upload of a head set."""
    model = model_choice(session, names)
    prompt = prompt_box(PROMPT)
    heads = gr.Textbox("", label="Heads to disturb", placeholder="click on the map, or write L2H1,L4H0", elem_id="heads")
    grid = picture("Layer x head: click to choose", "clickable", buttons=[], elem_id="head-map")
    with gr.Row():
        u = gr.Slider(0, 1, 0.5, step=0.05, label="How much (u)", min_width=150)
        scale = gr.Slider(-2, 8, 3.0, step=0.25, label="Guidance strength", min_width=150)
    seed, fresh = seed_fields()
    with gr.Accordion("More", open=False):
        target = gr.Dropdown([t for t in TARGETS if t != "skip"], value="identity", label="Target")
        negative = prompt_box("", label="Negative prompt (through NAG if the guidance scale is 1)", lines=1)
        sizes = size_fields(session, names[0], "steps")
        upload = local_file("Head set (JSON)", [".json"], elem_id="head-set")
    fields = {"prompt": prompt, "heads": heads, "u": u, "scale": scale, "target": target, "seed": seed, "randomize_seed": fresh}
    return {**fields, "negative_prompt": negative, **sizes, "model": model}, grid, upload


def _results(session: Session, small: list[str]) -> tuple[Run, dict[str, Any], Any]:
    """The buttons, where the verb's values are shown, and how the downloads are found."""
    cost = cost_field("image-cost")
    run = run_row("Draw both", "image")
    pair = gr.ImageSlider(
        label="unguided | guided",
        format="png",
        type="filepath",
        interactive=False,
        height=460,
        elem_classes=small,
    )
    figures = gr.HTML("")
    taken, files = downloads(session, "image-files")
    shown = {"pair": pair, "seed": seed_used(), "report": report_field("image-report"), "figures": figures}
    return run, {**shown, "downloads": taken, "cost": cost}, files


def _wire_map(session: Session, fields: Mapping[str, Any], grid: gr.Image, upload: gr.File) -> tuple[Any, ...]:
    """Keep map, heads and head set in step; returns the event that proposes heads at the first look."""
    heads, u, model = fields["heads"], fields["u"], fields["model"]
    scores = gr.State({}, time_to_live=3600)

    def layers_of(model: str) -> dict[int, int]:
        return session.layers(session.check_name(model, video=False))

    def paint(heads: str, u: float, scores: dict[str, float], model: str) -> Any:
        with refusing():
            layers = layers_of(model)
            return draw_head_map(layers, read_heads(heads, layers, u), {parse_head(n): s for n, s in (scores or {}).items()})

    def propose(heads: str, model: str) -> str:
        with refusing():
            layers = sorted(layers_of(model))
        return heads or f"L{layers[len(layers) // 2]}"

    def click(heads: str, u: float, model: str, event: gr.SelectData) -> str:
        with refusing():
            layers = layers_of(model)
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

    drawn = gr.on([heads.change, u.change, scores.change, model.change], paint, [heads, u, scores, model], grid, **QUIET)
    assert drawn is not None
    grid.select(click, [heads, u, model], heads, **QUIET)
    loaded = [heads, u, fields["scale"], fields["target"], scores]
    upload.upload(load, [upload, model], loaded, api_name="load_head_set", show_progress="hidden")
    return propose, [heads, model], heads


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
