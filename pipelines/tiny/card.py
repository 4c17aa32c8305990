"""The model card of a tiny pipeline, generated from what was recorded and measured: no figure in it is typed.

`journal.jsonl` in the run's folder has a line for each call of a training phase: steps, minutes, device, perhaps a note.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.evaluate import provenance
from genattn.pipelines.tiny.export import DEFAULTS_FILE, JOURNAL, GenerationDefaults
from genattn.pipelines.training.places import POSITION_CHANNELS

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# {name}

A complete, trained Wan text-to-video pipeline of {megabytes:.1f} MB: coloured shapes that move. It is made to test and
show attention, guidance and long-video methods where no model can be downloaded; it knows only its tiny world.

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("assets/{name}")
pipe("a red circle moves right on a dark background", height={height}, width={width}, num_frames={frames},
     num_inference_steps={steps}, guidance_scale={guidance_scale})
```

Captions: "a [small|large] COLOUR SHAPE MOTION [and a ... ] on a BACKGROUND background", with
COLOUR {colours}; SHAPE {shapes}; MOTION {motions}; BACKGROUND {backgrounds}.
Any other text can be tokenised, but means nothing to the model.

## Parts
- `WanTransformer3DModel`, {layers} layers x {heads} heads of {head_dim}, patch {patch}: {transformer_weights:.2f} M weights
- `AutoencoderKLWan`, 4x in space, 4x in time: {vae_weights:.2f} M; {z_dim} channels, the last {places} are positions (Limits)
- `UMT5EncoderModel`: {text_weights:.2f} M, with a word tokenizer of its own
- `FlowMatchEulerDiscreteScheduler`, shift {shift}

{height} x {width} x {frames} pixels are {grid} latents: {latent_frames} frames of {frame_tokens} tokens, {tokens} in all.

## Training
{device_line}
Seed {seed}. Data: {clips} clips and {stills} stills drawn by `pipelines/tiny/world.py`, {pairs} with two objects; 30 of the 240
colour x shape x motion combinations are held out.

| phase | steps | minutes | device |
| --- | --- | --- | --- |
{training}
{notes}{commands}
## Scores
{evaluated} clips of captions that training never saw, sampled with the stock pipeline ({eval_steps} steps, guidance
{eval_guidance}) and judged by `pipelines/tiny/oracle.py`; shares with Wilson's 95 % interval.
Unseen: the combination of colour, shape and motion was held out.
Measured on {measured_on}, {date}, commit {commit}, torch {torch}, diffusers {diffusers}.

| | {splits} |
| --- | {rules} |
{scores}

## Limits
The scores show what it cannot do. Other frame counts or sizes than {frames} frames of {height} x {width} were never trained on,
except single frames.
The last {places} latent channels are cosines along frames, rows and columns that the denoiser makes for itself: rotary
embeddings are relative, and this model began to follow captions in motion only once it had them. The decoder ignores them
and the encoder leaves them 0, so latents encoded from a clip need them added (`training/places.py`) before
they are denoised.

Licence: Apache-2.0, weights and code. Made by `python -m genattn.pipelines.tiny.wan`.
"""


@contextmanager
def journal(run_dir: Path, phase: str, device: str, options: str = "") -> Iterator[dict[str, int]]:
    """Within, fill the dictionary with what was done; a line with it, the minutes and the device is written after.

    Args:
        run_dir: the run, made if missing.
        phase: what was done.
        device: on what.
        options: what was typed beyond the defaults; entries without any have none.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    begun, done = time.monotonic(), dict[str, int]()
    try:
        yield done
    finally:
        line = {"phase": phase, "minutes": round((time.monotonic() - begun) / 60, 2), "device": device, **done}
        if options:
            line["options"] = options
        with (run_dir / JOURNAL).open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_journal(run_dir: Path) -> list[dict[str, str | int | float]]:
    """One entry per phase, in order of appearance: its last counts, its minutes in all.

    Raises:
        GenAttnError: if there is no journal.
    """
    path = run_dir / JOURNAL
    if not path.exists():
        raise GenAttnError(f"a run must have a {JOURNAL}, got none in {run_dir}; train first")
    phases: dict[str, dict[str, str | int | float]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        minutes = float(phases.get(entry["phase"], {}).get("minutes", 0.0)) + entry["minutes"]
        phases[entry["phase"]] = {**phases.get(entry["phase"], {}), **entry, "minutes": round(minutes, 1)}
    return list(phases.values())


def model_card(folder: Path, run_dir: Path, rows: Sequence[dict[str, float | int | str]], seed: int) -> str:
    """The card's text.

    Args:
        folder: the exported pipeline.
        run_dir: the run it came from, with its journal.
        rows: the rows of `evaluate.evaluate`, one per split.
        seed: the training seed.
    """
    from genattn.pipelines.tiny import world as world

    configs = {part: json.loads((folder / part / "config.json").read_text()) for part in ("transformer", "vae")}
    entries = read_journal(run_dir)
    counts = {key: value for entry in entries for key, value in entry.items() if key in ("clips", "stills")}
    defaults = GenerationDefaults(**json.loads((folder / DEFAULTS_FILE).read_text()))
    device = str(entries[-1]["device"])
    minutes = sum(float(entry["minutes"]) for entry in entries)
    made = "Trained on a CPU" if device.startswith("CPU") else "Trained on a GPU"
    patch = configs["transformer"]["patch_size"]
    scale = configs["vae"]["scale_factor_temporal"], *[configs["vae"]["scale_factor_spatial"]] * 2
    grid = [(defaults.frames - 1) // scale[0] + 1, defaults.height // scale[1], defaults.width // scale[2]]
    tokens = [size // side for size, side in zip(grid, patch, strict=True)]
    return CARD.format(
        **asdict(defaults),
        name=folder.name,
        patch=" x ".join(str(side) for side in patch),
        grid=" x ".join(str(size) for size in grid),
        latent_frames=tokens[0],
        frame_tokens=tokens[1] * tokens[2],
        tokens=math.prod(tokens),
        commands=_commands(folder.name, entries),
        megabytes=folder_bytes(folder) / 1e6,
        colours=", ".join(world.COLOURS),
        shapes=", ".join(world.SHAPES),
        motions=", ".join(f'"{verb}"' for verb in world.MOTIONS.values()),
        backgrounds=", ".join(world.BACKGROUNDS),
        layers=configs["transformer"]["num_layers"],
        heads=configs["transformer"]["num_attention_heads"],
        head_dim=configs["transformer"]["attention_head_dim"],
        z_dim=configs["vae"]["z_dim"],
        places=POSITION_CHANNELS,
        transformer_weights=count_weights(folder / "transformer"),
        vae_weights=count_weights(folder / "vae"),
        text_weights=count_weights(folder / "text_encoder"),
        shift=json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["shift"],
        device_line=f"{made} for {minutes:.0f} minutes in all, while other programs ran on that machine.",
        seed=seed,
        pairs=_pairs(entries),
        clips=counts.get("clips", 0),
        stills=counts.get("stills", 0),
        training="\n".join(training_line(entry) for entry in entries),
        notes="".join(f"\n{entry['note']}\n" for entry in entries if "note" in entry),
        evaluated=rows[0]["clips"],
        eval_steps=rows[0]["steps"],
        eval_guidance=rows[0]["guidance_scale"],
        measured_on=rows[0]["device"],
        **{name: rows[0][name] for name in ("date", "commit", "torch", "diffusers")},
        splits=" | ".join(f"{row['split']} ({row['clips']} clips)" for row in rows),
        rules=" | ".join("---" for _ in rows),
        scores="\n".join(_score_line(name, rows) for name in SCORED),
    )


SCORED = ("colour", "shape", "motion", "size", "background", "count", "consistency", "flicker", "motion_amount")


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_card(folder: Path, run_dir: Path, rows: Sequence[dict[str, float | int | str]], seed: int) -> None:
    """Write README.md into an exported folder."""
    (folder / "README.md").write_text(model_card(folder, run_dir, rows, seed))


def device_name(cpu: bool = False) -> str:
    """The device of this machine, as journals and tables name it; the processor where `cpu`."""
    return provenance(cpu)["device"]


def training_line(entry: dict[str, str | int | float]) -> str:
    """A row of the card's table of training phases."""
    return f"| {entry['phase']} | {entry.get('steps', '')} | {entry['minutes']} | {entry['device']} |"


def _pairs(entries: Sequence[dict[str, str | int | float]]) -> str:
    """The share of scenes with two objects, as the latents were asked for: "15 %", or "15 %, later 50 %"."""
    shares = [15]
    for entry in entries:
        words = str(entry.get("options", "")).split()
        if "--two-objects" in words and str(entry["phase"]).startswith("latents"):
            shares.append(round(100 * float(words[words.index("--two-objects") + 1])))
    return ", later ".join(f"{share} %" for share in dict.fromkeys(shares))


def _commands(name: str, entries: Sequence[dict[str, str | int | float]]) -> str:
    """The commands of the phases whose options the journal holds, as a card's paragraph; empty without any."""
    lines = [
        f"python -m genattn.pipelines.tiny.wan train --run-dir runs/{name} --phases {str(entry['phase']).split(':')[0]} "
        f"{entry['options']}"
        for entry in entries
        if "options" in entry
    ]
    if not lines:
        return ""
    going_on = f"Training goes on from this folder with the same options and `--begin-with assets/{name}` in a fresh run."
    return "\n```sh\n" + "\n".join(lines) + f"\n```\n\n{going_on}\n"


def _score_line(name: str, rows: Sequence[dict[str, float | int | str]]) -> str:
    cells = []
    for row in rows:
        bounds = f" ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})" if f"{name}_low" in row else ""
        cells.append(f"{float(row[name]):.3f}{bounds}")
    return f"| {name.replace('_', ' ')} | {' | '.join(cells)} |"


def count_weights(folder: Path) -> float:
    """Millions of weights in a folder's safetensors files."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total / 1e6
