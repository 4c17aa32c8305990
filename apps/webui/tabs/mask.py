"""The tab Mask explorer: a pattern on a shape; a click on a frame shows what that token sees."""

from typing import Any

import gradio as gr

from genattn.apps.webui.tabs.parts import QUIET, cards, picture, refusing, report_field
from genattn.apps.webui.tabs.video import SPARSE
from genattn.apps.webui.verbs.masks import OWN_SHAPE, clicked_token, mask, preset_shape
from genattn.apps.webui.verbs.session import Session
from genattn.planning.presets import PRESETS

GRID = "12x24x32"
SUGGESTED = {"neighborhood": '{"window_size": [5, 9, 9]}'}


def mask_tab(session: Session) -> dict[str, Any]:
    """Build the tab; returns the event that draws, for the first look."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            attention = gr.Dropdown(SPARSE, value="radial", label="Pattern", elem_id="mask-pattern")
            model = gr.Dropdown([OWN_SHAPE, *PRESETS], value=OWN_SHAPE, label="Shape of", info="a model at its usual size")
            grid = gr.Textbox(GRID, label="Tokens: frames x height x width", elem_id="mask-grid")
            with gr.Row():
                before = gr.Number(0, label="Text tokens before", precision=0, minimum=0, min_width=90)
                after = gr.Number(0, label="Text tokens after", precision=0, minimum=0, min_width=90)
                block = gr.Dropdown([32, 64, 128], value=64, label="Tile", min_width=90)
            query = gr.Textbox("", label="Token: frame x row x column", placeholder="the middle one", elem_id="mask-token")
            with gr.Accordion("More", open=False):
                options = gr.Textbox(
                    "", label="Pattern settings (JSON)", placeholder='{"decay": 0.5, "window": "box"}', lines=1
                )
            go = gr.Button("Draw", variant="primary", elem_id="mask-go")
            plan = picture("Tiles: rows are queries, columns are keys. Dark: fully visible; light: needs a mask", height=330)
        with gr.Column(scale=3):
            figures = gr.HTML("")
            window = picture("What the red token sees: click on any token", "clickable", elem_id="mask-window")
            report = report_field("mask-report")

    def draw(
        attention: str = "radial",
        pattern_options: str = "",
        grid: str = GRID,
        text_before: int = 0,
        text_after: int = 0,
        query: str = "",
        block: int = 64,
        model: str = OWN_SHAPE,
    ) -> tuple[Any, ...]:
        """A pattern's tiles, one token's window, density and predicted speed."""
        with refusing():
            found = mask(session, attention, pattern_options, grid, text_before, text_after, query, block, model)
        facts = found["facts"]
        return found["window"], found["plan"], found["query"], _figures(facts), facts

    def click(grid: str, query: str, event: gr.SelectData) -> str:
        with refusing():
            return clicked_token(grid, query, event.index[0], event.index[1])

    def shape(model: str) -> tuple[Any, ...]:
        if model == OWN_SHAPE:
            return GRID, 0, 0, 64, ""
        return (*preset_shape(model), 128, "")

    inputs = [attention, options, grid, before, after, query, block, model]
    outputs = [window, plan, query, figures, report]
    drawing: dict[str, Any] = {"concurrency_id": "cpu", "concurrency_limit": 2, "show_progress": "minimal"}
    go.click(draw, inputs, outputs, api_name="mask", **drawing)
    again: dict[str, Any] = {"api_visibility": "private", **drawing}
    window.select(click, [grid, query], query, **QUIET).success(draw, inputs, outputs, **again)
    model.input(shape, model, [grid, before, after, block, query], **QUIET).success(draw, inputs, outputs, **again)
    attention.input(lambda name: SUGGESTED.get(name, ""), attention, options, **QUIET).success(draw, inputs, outputs, **again)
    return {"first": (draw, inputs, outputs)}


def _figures(facts: dict[str, Any]) -> str:
    shown = [
        (f"{facts['density']:.1%}", "density: share of the scores in visited tiles"),
        (f"{facts['attention_speedup']:.2f}x", "attention, predicted from work"),
        (f"{facts['mask_free']:.0%}", "of visited tiles need no mask"),
        (f"{facts['tokens']:,}", "tokens"),
    ]
    if "run_speedup_dense_quarter" in facts:
        text = f"whole run of {facts['model']}, predicted, a quarter of the steps dense"
        shown.insert(2, (f"{facts['run_speedup_dense_quarter']:.2f}x", text))
    return cards(*shown)
