"""The tab HeadHunter: run a search, watch its map fill, see every head's picture, save the set."""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from genattn.apps.webui.tabs.parts import (
    Cost,
    Run,
    cost_field,
    downloads,
    missing_model,
    model_choice,
    optional_number,
    page_verb,
    picture,
    pixel_classes,
    prompt_box,
    refusing,
    report_field,
    run_row,
    size_fields,
    wire_cost,
)
from genattn.apps.webui.verbs.hunt import (
    CAPTION_MATCH,
    OBJECTIVES,
    hunt,
    hunt_cost,
    hunted_model,
    save_set,
    search_of,
)
from genattn.apps.webui.verbs.sampling import ClipForm
from genattn.apps.webui.verbs.session import Model, Session
from genattn.guidance.softpag.perturbation import TARGETS

_SEARCH, _SIZE = ("prompts", "objectives", "pool", "rounds", "top_k", "sheet"), ("steps", "height", "width")
PROMPTS = "a large red circle stays still on a dark background\na small blue square stays still on a light background"


def hunt_tab(session: Session) -> dict[str, Any]:
    """Build the tab; returns the fields that hold the found set, its report and the event of a run."""
    names = [*session.names(video=False), *session.names(video=True)]
    if not names:
        missing_model("text-to-image or text-to-video")
        return {}
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            fields = _fields(session, names, moving=not session.names(video=False))
        with gr.Column(scale=3):
            run, results, files, saving = _results(session, pixel_classes(session, names))
    search = page_verb(hunt, session, fields, results, rounds=_table, downloads=files)
    asked = {name: fields[name] for name in ("model", *_SEARCH, *_SIZE, *(["frames"] if "frames" in fields else []))}
    wire_cost(session, results["cost"], asked, lambda given: _asked(session, given))
    event = run.wire(search, fields.values(), results.values(), "hunt")

    def keep_set(run: str, name: str = "my-heads", keep: int = 0) -> str:
        """A hunt's head set as a file; keep: its best heads only, 0 for all."""
        with refusing():
            return save_set(session, run, name, keep or None)[0]

    told = [results["run"], saving["name"], saving["keep"]]
    saving["save"].click(keep_set, told, results["head_set"], api_name="save_set", show_progress="hidden")
    return {"found": results["heads"], "use": saving["use"], "report": results["report"], "event": event}


def _asked(session: Session, given: dict[str, Any]) -> tuple[Model, Cost]:
    model, form = hunted_model(session, given["model"]), ClipForm.read(**given)
    prompts = [line for line in given["prompts"].splitlines() if line.strip()]
    search = search_of(given["objectives"], len(prompts), given["rounds"], given["top_k"])
    return model, lambda: hunt_cost(session, model, form, given["pool"], search, given["sheet"])


def _fields(session: Session, names: Sequence[str], moving: bool) -> dict[str, Any]:
    """The verb's fields in its order. moving: for models that make videos."""
    tiny = all(name.startswith("tiny-") for name in names)
    model = model_choice(session, names)
    prompts = prompt_box(_moving(PROMPTS) if moving else PROMPTS, "Prompts, one per line", 4)
    objectives = gr.Dropdown(
        list(OBJECTIVES),
        value=[CAPTION_MATCH] if tiny else ["unclipped", "contrast"],
        multiselect=True,
        label="What to look for (maximised)",
        info="A statistic alone is easily gamed (the sharpest picture is noise): pair it with unclipped or with a scorer.",
    )
    with gr.Row():
        rounds = gr.Number(1, label="Rounds", precision=0, minimum=1, min_width=80)
        top_k = gr.Number(2, label="Heads per round", precision=0, minimum=1, min_width=80)
        scale = gr.Number(3.0, label="Guidance strength", min_width=80)
    with gr.Accordion("More", open=False):
        pool = gr.Textbox("", label="Heads to choose from", placeholder="all; or e.g. L2-5")
        u = gr.Slider(0, 1, 1.0, step=0.05, label="How strongly heads are disturbed (u)")
        target = gr.Dropdown([t for t in TARGETS if t != "skip"], value="identity", label="Target")
        batch = gr.Slider(1, 16, 4, step=1, label="Candidates per model call")
        sheet = gr.Checkbox(True, label="Draw every head's picture: the contact sheet")
        sizes = size_fields(session, names[0], *(["frames"] if moving else []), "steps")
    fields = {"prompts": prompts, "objectives": objectives, "pool": pool, "rounds": rounds, "top_k": top_k, "u": u}
    return {**fields, "scale": scale, "target": target, "batch": batch, "sheet": sheet, **sizes, "model": model}


def _results(session: Session, small: list[str]) -> tuple[Run, dict[str, Any], Callable[[Any], Any], dict[str, Any]]:
    """The buttons, where the verb's values are shown, how the downloads are found, and what keeps the set."""
    cost = cost_field("hunt-cost")
    run = run_row("Hunt", "hunt")
    with gr.Row():
        with gr.Column(min_width=240):
            scored = picture("Score of each head: red helps, blue harms", elem_id="hunt-map", height=300)
        with gr.Column(min_width=240):
            latest = picture("Just made", *small, type="numpy", buttons=[], height=300)
    table = gr.Dataframe(headers=["round", "heads", "score"], interactive=False, label="Rounds", elem_id="hunt-rounds")
    contact = picture("Contact sheet: one picture for each head disturbed", type="filepath", elem_id="contact-sheet")
    with gr.Row(elem_classes="tight"):
        found = gr.Textbox(label="Heads found", interactive=False, scale=3, elem_id="heads-found")
        use = gr.Button("Use in Image", scale=1, min_width=120, elem_id="use-heads")
    with gr.Row(elem_classes="tight"):
        name = gr.Textbox("my-heads", label="Save the set as", scale=2)
        keep = optional_number("Best heads only", "0: all", min_width=160)
        save = gr.Button("Save the set", scale=1, min_width=160, elem_id="save-set")
    file = gr.File(label="Head set", interactive=False, height=80, elem_id="set-file")
    ran = gr.Textbox(label="Run", interactive=False)
    results = {"map": scored, "latest": latest, "rounds": table, "sheet": contact, "heads": found, "head_set": file, "run": ran}
    results["report"] = report_field("hunt-report")
    taken, files = downloads(session, "hunt-files")
    saving = {"use": use, "name": name, "keep": keep, "save": save}
    return run, {**results, "downloads": taken, "cost": cost}, files, saving


def _moving(prompts: str) -> str:
    return prompts.replace("circle stays still", "circle moves right").replace("square stays still", "square moves down")


def _table(rows: list[dict[str, Any]]) -> list[list[Any]]:
    return [[row["round"], row["heads"], row["score"]] for row in rows]
