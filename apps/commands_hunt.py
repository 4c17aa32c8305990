"""The command hunt: which attention heads to perturb, for one's own model, prompts and objective."""

import inspect
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from genattn.apps import options
from genattn.apps.printing import print_json, print_lines, print_table
from genattn.errors import GenAttnError


def hunt_command(
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt a line: these decide.")],
    objective: Annotated[
        list[str],
        typer.Option(help="NAME or NAME=WEIGHT, several allowed: sharpness, -warmth, clip_score:PATH, module:function."),
    ],
    model: options.Model = None,
    held_out: Annotated[Path | None, typer.Option(help="Text file of prompts for the last check.")] = None,
    floor: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: least mean score of an objective.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds R.")] = 1,
    top_k: Annotated[int, typer.Option("--top-k", help="Heads added per round.")] = 3,
    heads: Annotated[str | None, typer.Option(help='Heads to choose from, e.g. "L6-11"; default: all.')] = None,
    min_layer: Annotated[int, typer.Option(help="Leave out layers below: later layers make guidance cheaper.")] = 0,
    u: Annotated[float, typer.Option(help="How far heads are drawn to the target while searching.")] = 1.0,
    tune_u: Annotated[str, typer.Option(help="Weights to try on the final set, e.g. 0.25,0.5,1.")] = "",
    scale: Annotated[float, typer.Option(help="Guidance scale w.")] = 3.0,
    target: Annotated[
        str, typer.Option(help="identity, identity_image, image_to_image, uniform, mean_query, zero.")
    ] = "identity",
    halving: Annotated[int, typer.Option(help="2: few prompts for many heads, all for the best; 1: all for all.")] = 1,
    probe_keep: Annotated[
        int | None, typer.Option(help="Heads that the cheap probe leaves to the full check; 0 trusts it.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Candidates per forward.")] = 4,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    call: Annotated[str, typer.Option(help="More arguments of the pipeline's call, as JSON.")] = "{}",
    log: Annotated[Path, typer.Option(help="Remembers every score; the same command goes on after a kill.")] = Path(
        "out/hunt.jsonl"
    ),
    out: Annotated[Path, typer.Option("--out", "-o", help="The head set.")] = Path("out/heads.json"),
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Find the attention heads whose perturbation guides best; several processes share the work under `accelerate launch`.

    Example: genattn hunt --prompts captions.txt --objective genattn.pipelines.oracle_objective:caption_match --rounds 2
    """
    from accelerate import PartialState

    from genattn.apps.sampling_run import SamplingSettings, open_pipeline, own_defaults
    from genattn.guidance.head_hunter import HeadHunter
    from genattn.guidance.objectives import load_objective

    weights = dict(_weighed(text) for text in objective)
    pipe = open_pipeline(SamplingSettings(model, dtype=dtype, device=device))
    own = own_defaults(pipe)
    known = {"height": own.get("height"), "width": own.get("width"), "num_frames": own.get("frames")}
    known |= {"num_inference_steps": steps or own.get("steps"), "guidance_scale": own.get("guidance_scale")}
    if guidance_scale is not None:
        known["guidance_scale"] = guidance_scale
    state = PartialState()
    hunter = HeadHunter(
        pipe,
        {name: load_objective(name) for name in weights},
        read_prompts(prompts),
        held_out=read_prompts(held_out) if held_out else (),
        log=log,
        weights=weights,
        floors=dict(_number(text, "floor") for text in floor or ()),
        rounds=rounds,
        top_k=top_k,
        pool=heads,
        min_layer=min_layer,
        u=u,
        u_grid=tuple(float(part) for part in tune_u.split(",") if part),
        scale=scale,
        target=target,
        halving=halving,
        probe_keep=probe_keep,
        batch=batch,
        call={**_understood(pipe, known), **_json(call)},
        accelerator=state,
        progress=_tell if state.is_main_process else None,
    )
    found = hunter.run()
    if state.is_main_process:
        out.parent.mkdir(parents=True, exist_ok=True)
        found.save(out)
        _show(found, out, as_json)


def _understood(pipe: Any, known: dict[str, Any]) -> dict[str, Any]:
    """The settings that a pipeline's call takes."""
    taken = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in known.items() if value is not None and name in taken}


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty; raises GenAttnError if there are none."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise GenAttnError(f"prompts must be a readable text file, got {path} ({error}); check the path") from error
    if not lines:
        raise GenAttnError(f"prompts must have a line each, got none in {path}; write some")
    return lines


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


def _tell(done: int, total: int, seconds: float) -> None:
    left = seconds / done * (total - done)
    print(
        f"\r{done}/{total} batches, {left:.0f} s left in this stage ",
        end="\n" if done == total else "",
        file=sys.stderr,
        flush=True,
    )


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
    lines = [f"unguided: {notes['baseline']}", f"stopped: {notes['stopped']}", f"head set: {out}"]
    if notes["held_out"]:
        told = [
            f"{n} {g:+.4f} [{notes['held_out']['low'][n]:+.4f}, {notes['held_out']['high'][n]:+.4f}]"
            for n, g in notes["held_out"]["gain"].items()
        ]
        lines.insert(1, "held out, gain over unguided: " + ", ".join(told))
    print_lines(*lines)
