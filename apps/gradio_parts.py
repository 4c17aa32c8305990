"""What the app's tabs are built from: fields that repeat, results that stream in, refusals in plain words."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from genattn.apps.gradio_job import Update
from genattn.apps.gradio_session import Session
from genattn.errors import GenAttnError

GPU: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1, "show_progress": "hidden"}


def local_file(label: str, suffixes: Sequence[str], **settings: Any) -> gr.File:
    """An upload that must come from the visitor's own machine: a URL is refused instead of fetched by the server."""
    field = gr.File(label=label, file_types=list(suffixes), height=110, **settings)
    stock = field.async_move_resource_to_block_cache

    async def keep(url_or_file_path: Any) -> str | None:
        if isinstance(url_or_file_path, str) and "://" in url_or_file_path:
            raise gr.Error("upload the file itself: this server fetches nothing from other addresses", print_exception=False)
        return await stock(url_or_file_path)

    # on the field, not in a subclass: Gradio writes a stub file beside the source of every subclass
    field.async_move_resource_to_block_cache = keep  # type: ignore[method-assign]
    return field


@dataclass(frozen=True)
class Run:
    """The two buttons of a verb and the line that says how far it is."""

    go: gr.Button
    stop: gr.Button
    status: gr.Markdown

    def wire(
        self,
        verb: Callable[..., Iterator[tuple[Any, ...]]],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        api_name: str,
        after_stop: Callable[..., Any] | None = None,
        stop_inputs: Sequence[Any] = (),
        stop_outputs: Sequence[Any] = (),
    ) -> Any:
        """Run `verb` into the status and `outputs`; stop cancels it. Returns the event."""
        event = self.go.click(verb, list(inputs), [self.status, *outputs], api_name=api_name, **GPU)
        self.stop_with([event], after_stop, stop_inputs, stop_outputs)
        return event

    def stop_with(
        self,
        events: Sequence[Any],
        after_stop: Callable[..., Any] | None = None,
        inputs: Sequence[Any] = (),
        outputs: Sequence[Any] = (),
    ) -> None:
        """Let the stop button cancel events, then say so."""
        told: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # cancel first: what the run still sends must not write over what the stop says
        cancelled = self.stop.click(None, cancels=list(events), **told)
        cancelled.then(after_stop or (lambda: "stopped"), list(inputs), [self.status, *outputs], **told)


def run_row(label: str, elem_id: str, status: bool = True) -> Run:
    """A button that starts, a button that stops, and the status line below them."""
    with gr.Row(elem_classes="run-row"):
        go = gr.Button(label, variant="primary", elem_id=f"{elem_id}-go", scale=3)
        stop = gr.Button("Stop", variant="stop", elem_id=f"{elem_id}-stop", scale=1, min_width=90)
    line = gr.Markdown("ready", elem_id=f"{elem_id}-status", elem_classes="status", show_label=False)
    return Run(go, stop, line)


def streamed(updates: Iterable[Update], *names: str, **shown: Callable[[Any], Any]) -> Iterator[tuple[Any, ...]]:
    """Updates as rows for the page: the status line, then the values called `names`; what is not new is skipped.

    shown: how a value of that name is dressed for its component.
    """
    with refusing():
        for update in updates:
            row = (
                shown.get(name, lambda value: value)(update.values[name]) if name in update.values else gr.skip()
                for name in names
            )
            yield (update.text(), *row)


class refusing:
    """While entered, a GenAttnError becomes the message that the visitor reads."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, GenAttnError):
            # the library speaks to the command line: --pattern-options is the field "pattern options" here
            told = re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda option: option[1].replace("-", " "), str(error))
            raise gr.Error(told, duration=20, print_exception=False, title="That cannot be done") from error


def picture(caption: str, *classes: str, **settings: Any) -> gr.Image:
    """A picture that the server draws, its caption above it, where it hides nothing."""
    gr.Markdown(caption, elem_classes="caption")
    look: dict[str, Any] = {"buttons": ["fullscreen"], "type": "pil", "format": "png", "show_label": False}
    return gr.Image(interactive=False, elem_classes=["drawn", *classes], **{"label": caption, **look, **settings})


def report_field(elem_id: str) -> gr.JSON:
    """The full report, folded away."""
    with gr.Accordion("Report", open=False):
        return gr.JSON(show_label=False, elem_id=elem_id, max_height=420)


def prompt_box(value: str, label: str = "Prompt", lines: int = 2, info: str | None = None, **more: Any) -> gr.Textbox:
    """A field for a prompt."""
    return gr.Textbox(value, label=label, lines=lines, info=info, **more)


def model_choice(session: Session, names: Sequence[str]) -> gr.Dropdown:
    """Which model; hidden where there is no choice."""
    return gr.Dropdown(list(names), value=names[0] if names else None, label="Model", visible=len(names) > 1)


def seed_fields() -> tuple[gr.Number, gr.Checkbox]:
    """Seed and whether to draw a new one."""
    with gr.Row(elem_classes="tight"):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)
        fresh = gr.Checkbox(False, label="New seed each time", container=False, min_width=140)
    return seed, fresh


def size_fields(session: Session, model: str | None, frames: bool, steps: bool = True) -> list[gr.Number]:
    """Height, width[, frames][, steps] and guidance scale; 0 means what the model was made for."""
    known = session.models[model].defaults if model else {}
    wanted = ["height", "width", *(["frames"] if frames else []), *(["steps"] if steps else []), "guidance_scale"]
    fields = []
    with gr.Row(elem_classes="tight"):
        for name in wanted:
            label = {"guidance_scale": "CFG scale"}.get(name, name.capitalize())
            whole = name != "guidance_scale"
            fields.append(optional_number(label, known.get(name), whole, "0: the model's"))
    return fields


def optional_number(
    label: str, value: float | None = None, whole: bool = True, zero: str | None = None, **more: Any
) -> gr.Number:
    """A number that may be left out: Gradio's page sends 0 for an empty field, and `zero` says what 0 stands for."""
    look: dict[str, Any] = {"precision": 0 if whole else None, "min_width": 80, "info": zero if value is None else None}
    return gr.Number(0 if value is None and zero else value, label=label, **{**look, **more})


def missing_model(kind: str) -> gr.Markdown:
    """What a tab says whose kind of model the server does not have."""
    return gr.Markdown(
        f"**This server has no {kind} model.** Start it with one: `genattn app --model PATH_OR_ID` "
        "(a folder in diffusers format, or a hub id). The other tabs work without it.",
        elem_classes="notice",
    )


def plain(value: Any) -> str:
    """Text that may stand in HTML."""
    import html

    return html.escape(str(value))


def cards(*facts: tuple[str, str]) -> str:
    """Figures side by side: (value, what it is)."""
    inner = "".join(f"<div class='card'><b>{plain(value)}</b><span>{plain(name)}</span></div>" for value, name in facts)
    return f"<div class='cards'>{inner}</div>"
