"""What the app's tabs are built from: fields that repeat, results that stream in, refusals in plain words."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from genattn.apps.webui.verbs.job import Update
from genattn.apps.webui.verbs.session import Model, Session
from genattn.errors import GenAttnError

Cost = Callable[[], str]

GPU: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1, "show_progress": "hidden"}
FROM_REPORT = ("figures", "player", "downloads")
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


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
        self, verb: Callable[..., Iterator[tuple[Any, ...]]], inputs: Iterable[Any], outputs: Iterable[Any], api_name: str
    ) -> Any:
        """Run `verb` into the status and `outputs`; stop cancels it. Returns the event."""
        event = self.go.click(verb, list(inputs), [self.status, *outputs], api_name=api_name, **GPU)
        self.stop_with([event])
        return event

    def stop_with(
        self,
        events: Sequence[Any],
        after_stop: Callable[..., Any] | None = None,
        inputs: Sequence[Any] = (),
        outputs: Sequence[Any] = (),
    ) -> None:
        """Let the stop button cancel events, then say so."""
        # cancel first: what the run still sends must not write over what the stop says
        cancelled = self.stop.click(None, cancels=list(events), **QUIET)
        cancelled.then(after_stop or (lambda: "stopped"), list(inputs), [self.status, *outputs], **QUIET)


def run_row(label: str, elem_id: str, status: bool = True) -> Run:
    """A button that starts, a button that stops, and the status line below them."""
    with gr.Row(elem_classes="run-row"):
        go = gr.Button(label, variant="primary", elem_id=f"{elem_id}-go", scale=3)
        stop = gr.Button("Stop", variant="stop", elem_id=f"{elem_id}-stop", scale=1, min_width=90)
    line = gr.Markdown("ready", elem_id=f"{elem_id}-status", elem_classes="status", show_label=False)
    return Run(go, stop, line)


def page_verb(
    verb: Callable[..., Iterator[Update]],
    session: Session,
    fields: Mapping[str, Any],
    results: Iterable[str],
    **dress: Callable[[Any], Any],
) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """`verb` as the page and programs call it: what it needs from `fields`, what it tells into `results`.

    fields: by the verb's own names, in the order in which programs pass them; what the verb does not name goes into its
    `**form`. results: names of its values; those of FROM_REPORT are made from its report. dress: how a value becomes what
    is shown.
    """
    names, told = tuple(fields), tuple(results)

    def call(*values: Any) -> Iterator[tuple[Any, ...]]:
        yield from streamed(verb(session, **dict(zip(names, values))), told, dress)

    # names and defaults of the API are read from here
    known = inspect.signature(verb).parameters
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    given = [inspect.Parameter(name, kind, default=known[name].default if name in known else None) for name in names]
    call.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]
    call.__doc__ = (verb.__doc__ or "").splitlines()[0]
    return call


def streamed(
    updates: Iterable[Update], names: Sequence[str], dress: Mapping[str, Callable[[Any], Any]]
) -> Iterator[tuple[Any, ...]]:
    """Updates as rows for the page: the status line, then the values called `names`; what is not new is skipped."""

    def cell(values: Mapping[str, Any], name: str) -> Any:
        source = "report" if name in FROM_REPORT else name
        return dress.get(name, lambda value: value)(values[source]) if source in values else gr.skip()

    try:
        for update in updates:
            yield (update.text(), *(cell(update.values, name) for name in names))
    except GenAttnError as error:
        # the message goes away with its toast; the line below the button stays until the next run
        yield (f"**not done:** {in_words(error)}", *(gr.skip() for _ in names))
        with refusing():
            raise


def in_words(error: GenAttnError) -> str:
    """The message in the page's words: the library speaks to the command line, and --pattern-options is a field here."""
    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda option: option[1].replace("-", " "), str(error))


class refusing:
    """While entered, a GenAttnError becomes the message that the visitor reads."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, GenAttnError):
            raise gr.Error(in_words(error), duration=20, print_exception=False, title="That cannot be done") from error


def picture(caption: str, *classes: str, **settings: Any) -> gr.Image:
    """A picture that the server draws, its caption above it, where it hides nothing."""
    gr.Markdown(caption, elem_classes="caption")
    look: dict[str, Any] = {"buttons": ["download", "fullscreen"], "type": "pil", "format": "png", "show_label": False}
    return gr.Image(interactive=False, elem_classes=["drawn", *classes], **{"label": caption, **look, **settings})


def report_field(elem_id: str) -> gr.JSON:
    """The full report, folded away."""
    with gr.Accordion("Report", open=False):
        return gr.JSON(show_label=False, elem_id=elem_id, max_height=420)


def cost_field(elem_id: str) -> gr.Markdown:
    """The line that says what a run would cost."""
    return gr.Markdown("Change a field to see what the run will cost.", elem_id=elem_id, elem_classes="hint")


def wire_cost(
    session: Session, line: gr.Markdown, fields: Mapping[str, Any], asked: Callable[[dict[str, Any]], tuple[Model, Cost]]
) -> None:
    """Say what a run would cost when a field changes: where the model is open already and no run is under way.

    asked: checks the fields and gives the model and what to ask; raises GenAttnError for what cannot run.
    """
    names = tuple(fields)

    def cost(*values: Any) -> str:
        try:
            model, told = asked(dict(zip(names, values)))
            if not session.is_open(model):
                return "The run says what it will cost as soon as the model is open."
            if not session.lock.acquire(blocking=False):
                return "A run is under way; it said what it costs."
            try:
                return told()
            finally:
                session.lock.release()
        except GenAttnError as error:
            return f"**This cannot run:** {in_words(error)}"

    # a text is finished when the visitor leaves it
    changes = [field.blur if isinstance(field, gr.Textbox) else field.change for field in fields.values()]
    gr.on(changes, cost, list(fields.values()), line, trigger_mode="always_last", **QUIET)


def downloads(session: Session, elem_id: str) -> tuple[gr.File, Callable[[Any], Any]]:
    """Every file of a run to take along, and how they are found from its report."""
    look: dict[str, Any] = {"file_count": "multiple", "interactive": False, "elem_classes": "downloads"}
    field = gr.File(label="Download", elem_id=elem_id, **look)
    return field, lambda report: session.files_of(report)


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


def seed_used() -> gr.Textbox:
    """The seed of the last run; empty before the first (an empty number field shows 0)."""
    return gr.Textbox(label="Seed used", interactive=False, placeholder="after a run", elem_classes="seed-used")


def size_fields(session: Session, model: str | None, *names: str) -> dict[str, gr.Number]:
    """Height, width, `names` (of "frames" and "steps") and guidance scale; 0 means what the model was made for."""
    known = session.models[model].defaults if model else {}
    fields = {}
    with gr.Row(elem_classes="tight"):
        for name in ("height", "width", *names, "guidance_scale"):
            label = {"guidance_scale": "CFG scale"}.get(name, name.capitalize())
            fields[name] = optional_number(label, "0: the model's", known.get(name), name != "guidance_scale")
    return fields


def pixel_classes(session: Session, names: Iterable[str]) -> list[str]:
    """The class of pictures so small that their pixels are to be seen, where all these models make such."""
    return ["small"] if all(session.models[name].defaults.get("height", 512) <= 128 for name in names) else []


def optional_number(label: str, zero: str, value: float | None = None, whole: bool = True, **more: Any) -> gr.Number:
    """A number that may be left out: Gradio's page sends 0 for an empty field, and `zero` says what 0 stands for."""
    look: dict[str, Any] = {"precision": 0 if whole else None, "min_width": 80, "info": zero if value is None else None}
    return gr.Number(value or 0, label=label, **{**look, **more})


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


def in_decibels(psnr: float | None) -> str:
    """A PSNR for people; that of equal clips is infinite, which JSON cannot hold and the browser sends back as nothing."""
    return "equal" if psnr is None or math.isinf(psnr) else f"{psnr:.1f} dB"


def cards(*facts: tuple[str, str]) -> str:
    """Figures side by side: (value, what it is)."""
    inner = "".join(f"<div class='card'><b>{plain(value)}</b><span>{plain(name)}</span></div>" for value, name in facts)
    return f"<div class='cards'>{inner}</div>"
