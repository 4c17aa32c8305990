"""The command hunt: which attention heads to perturb, for one's own model, prompts and objective."""

import inspect
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genattn.apps.cli import options
from genattn.apps.cli.printing import in_print, print_json, print_lines, print_table
from genattn.apps.cli.progress import progress_bar
from genattn.apps.cli.stopping import same_command_goes_on
from genattn.apps.sampling.prompt_file import read_prompts
from genattn.errors import GenAttnError
from genattn.one_writer import only_writer

if TYPE_CHECKING:
    from genattn.apps.sampling.run import SamplingSettings


@options.sampling_options()
def hunt_command(
    prompts: Annotated[Path, typer.Option(help="A text file of prompts, one per line. Heads are chosen on these.")],
    objective: Annotated[
        list[str],
        typer.Option(
            help="What to maximise: NAME or NAME=WEIGHT, such as sharpness, -warmth, "
            "clip_score:PATH, module:function. Repeat for several."
        ),
    ],
    settings: "SamplingSettings",
    held_out: Annotated[Path | None, typer.Option(help="A text file of other prompts, for the last check.")] = None,
    floor: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: an objective whose mean score must not fall below the value.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the search.")] = 1,
    top_k: Annotated[int, typer.Option("--top-k", help="Heads added in each round.")] = 3,
    heads: Annotated[str | None, typer.Option(help='Heads to choose from, e.g. "L6-11"; default: all.')] = None,
    min_layer: Annotated[int, typer.Option(help="First layer to search. Guidance by later layers is cheaper.")] = 0,
    u: Annotated[float, typer.Option(help="How strongly heads are disturbed during the search, 0 to 1.")] = 1.0,
    tune_u: Annotated[str, typer.Option(help="Strengths to try on the final set, such as 0.25,0.5,1.")] = "",
    scale: Annotated[float, typer.Option(help="Guidance strength: how far to move away from the disturbed result.")] = 3.0,
    target: Annotated[
        str,
        typer.Option(
            help="What a disturbed head computes instead: identity, identity_image, "
            "image_to_image, uniform, mean_query or zero."
        ),
    ] = "identity",
    halving: Annotated[
        int, typer.Option(help="2: try all heads on few prompts and the best on all; 1: all heads on all prompts.")
    ] = 1,
    probe_keep: Annotated[
        int | None, typer.Option(help="How many heads the cheap first check passes on to the full one. 0: no full check.")
    ] = None,
    returned: Annotated[
        str, typer.Option(help="best: the heads of the best round; all: those of all rounds, as in the paper.")
    ] = "best",
    batch: Annotated[int, typer.Option(help="Candidates per model call.")] = 4,
    call: Annotated[str, typer.Option(help="Further arguments for the pipeline's call, as JSON.")] = "{}",
    log: Annotated[
        Path, typer.Option(help="File that keeps every score. After a stop the same command goes on from it.")
    ] = Path("out/hunt.jsonl"),
    out: Annotated[Path, typer.Option("--out", "-o", help="The head set to write.")] = Path("out/heads.json"),
    as_json: options.Json = False,
) -> None:
    """Find the attention heads that guide best when they are disturbed. Several processes share the work under
    `accelerate launch`.

    Example: genattn hunt --prompts captions.txt --objective genattn.pipelines.tiny.oracle_objective:caption_match --rounds 2
    """
    from accelerate import PartialState

    from genattn.apps.sampling.output_files import check_out
    from genattn.apps.sampling.pipeline_calls import taken_arguments
    from genattn.apps.sampling.run import call_arguments, open_pipeline, refuse_early
    from genattn.guidance.headhunter.hunter import HeadHunter
    from genattn.guidance.headhunter.objectives import load_objective

    same_command_goes_on(log)
    check_out(out, (".json",))
    check_out(log, (".jsonl",), "--log")
    weights = dict(_weighed(text) for text in objective)
    floors = dict(_number(text, "floor") for text in floor or ())
    judges = {name: load_objective(name) for name in weights}
    deciding = read_prompts(prompts)
    checking = read_prompts(held_out, "--held-out") if held_out else ()
    more, grid = _json(call), _numbers(tune_u)
    refuse_early(settings)
    pipe = open_pipeline(settings)
    call_arguments(pipe, settings)  # sizes, and frames for a picture model: refused as `generate` does
    strange = sorted(set(more) - set(taken_arguments(pipe)))
    if strange:
        raise GenAttnError(f"--call names {', '.join(strange)}, and {type(pipe).__name__} takes no such argument")
    state = PartialState()
    alone = only_writer(log, "--log") if state.is_main_process else nullcontext()
    with alone, progress_bar("trials") as tell:
        hunter = HeadHunter(
            pipe,
            judges,
            deciding,
            held_out=checking,
            log=log,
            weights=weights,
            floors=floors,
            rounds=rounds,
            top_k=top_k,
            pool=heads,
            min_layer=min_layer,
            u=u,
            u_grid=grid,
            scale=scale,
            target=target,
            halving=halving,
            probe_keep=probe_keep,
            returned=returned,
            batch=batch,
            call={**_understood(pipe, settings), **more},
            accelerator=state,
            progress=tell if state.is_main_process else None,
        )
        found = hunter.run()
    if state.is_main_process:
        found.save(out)
        _show(found, out, as_json)


def _understood(pipe: Any, settings: "SamplingSettings") -> dict[str, Any]:
    """What was given, and the model's own defaults for the rest, as far as the pipeline's call takes it."""
    from genattn.apps.sampling.inputs import read_picture
    from genattn.apps.sampling.run import own_defaults

    own = own_defaults(pipe)
    known = {
        "height": settings.height or own.get("height"),
        "width": settings.width or own.get("width"),
        "num_frames": settings.frames or own.get("frames"),
        "num_inference_steps": settings.steps or own.get("steps"),
        "guidance_scale": own.get("guidance_scale") if settings.guidance_scale is None else settings.guidance_scale,
        "negative_prompt": settings.negative_prompt,
        "image": None if settings.image is None else read_picture(settings.image),
    }
    taken = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in known.items() if value is not None and name in taken}


def _weighed(text: str) -> tuple[str, float]:
    """ "sharpness=0.5" -> ("sharpness", 0.5), "sharpness" -> ("sharpness", 1.0)."""
    return _number(text, "objective") if "=" in text else (text, 1.0)


def _number(text: str, option: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise GenAttnError(f"--{option} must be NAME=NUMBER, got {text!r}; write e.g. sharpness=0.5") from error


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise GenAttnError(f"--call must be a JSON object, got {text!r} ({error}); write e.g. '{{\"height\": 512}}'") from error
    if not isinstance(found, dict):
        raise GenAttnError(f"--call must be a JSON object, got {text!r}; write e.g. '{{\"height\": 512}}'")
    return found


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise GenAttnError(f"--tune-u must be numbers joined by commas, e.g. 0.25,0.5,1, got {text!r}") from None


def _show(found: Any, out: Path, as_json: bool) -> None:
    if as_json:
        print_json(found.to_dict())
        return
    notes = found.notes
    print_table(
        [
            {"round": i + 1, "heads": ", ".join(r["added"]), "score": f"{r['score']:.4f}", **r["means"]}
            for i, r in enumerate(notes["rounds"])
        ]
    )
    lines = [f"unguided: {in_print(notes['baseline'])}", f"stopped: {notes['stopped']}", f"head set: {out}"]
    if notes["held_out"]:
        told = [
            f"{n} {g:+.4f} [{notes['held_out']['low'][n]:+.4f}, {notes['held_out']['high'][n]:+.4f}]"
            for n, g in notes["held_out"]["gain"].items()
        ]
        lines.insert(1, "held out, gain over unguided: " + ", ".join(told))
    print_lines(*lines)
