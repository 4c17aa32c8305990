"""The model card of tiny-sd3, generated from its journal and the head study's rows: no figure in it is typed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genattn.pipelines.tiny.card import count_weights, folder_bytes, read_journal, training_line
from genattn.pipelines.tiny.export import DEFAULTS_FILE, GenerationDefaults

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny-sd3

A complete, trained `StableDiffusion3Pipeline` of {megabytes:.1f} MB: pictures of coloured shapes. It is made to test and show
guidance on single attention heads where no model can be downloaded; it knows only its tiny world.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("assets/tiny-sd3")
pipe("a red circle moves right on a dark background", height={height}, width={width},
     num_inference_steps={steps}, guidance_scale={guidance_scale})
```

## Parts
- `SD3Transformer2DModel`, {layers} joint blocks x {heads} heads of {head_dim}: {transformer_weights:.2f} M weights
- `AutoencoderKL`, 4x in space, 4 channels: {vae_weights:.2f} M
- two `CLIPTextModelWithProjection`, {text_weights:.2f} M together; the third encoder, a T5 of one layer, gives zeros

## Training
Stills drawn by `pipelines/tiny/world.py`, 15 % with two objects; 30 of the 240 colour x shape x motion combinations are held
out. For a third of the steps every object is at its usual place, then half of them are.

| phase | steps | minutes | device |
| --- | --- | --- | --- |
{training}
{notes}
## Scores
{captions} captions that neither training nor the hunt saw, half of them of held-out combinations, {study_steps} denoising
steps, {length} zeros for the third encoder, judged by `pipelines/tiny/oracle.py`. Match: the share of what a caption asks for
that is in the picture, with a bootstrap interval of 95 %. The last column is how much better the hunted heads are, paired by
caption. Heads {found}, found on {hunting} other captions. Hunted heads, whole layer and random sets cost one
more pass each, like CFG. Measured on {device}, {date}, commit {commit}, torch {torch}, diffusers {diffusers}.

| condition | match | colour | shape | size | hunted minus this |
| --- | --- | --- | --- | --- | --- |
{scores}

## Limits
The scores show what it can do: single shapes and pairs of its own world at one size. Other sizes were never trained on. Text
outside of the captions of its world means nothing to it. CFG does better than head guidance on this model.

Licence: Apache-2.0, weights and code. Made by `python -m genattn.pipelines.tiny.sd3` and `studies/sd3.py`.
"""


def write_sd3_card(folder: Path, run_dir: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write README.md into an exported folder.

    Args:
        folder: the exported pipeline.
        run_dir: the run it came from, with its journal.
        rows: the rows of `studies/sd3.py`, with their provenance.
    """
    config = json.loads((folder / "transformer" / "config.json").read_text())
    entries, shown = read_journal(run_dir), [row for row in rows if row["condition"] != "probe"]
    text = CARD.format(
        **vars(GenerationDefaults(**json.loads((folder / DEFAULTS_FILE).read_text()))),
        megabytes=folder_bytes(folder) / 1e6,
        layers=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        transformer_weights=count_weights(folder / "transformer"),
        vae_weights=count_weights(folder / "vae"),
        text_weights=count_weights(folder / "text_encoder") + count_weights(folder / "text_encoder_2"),
        training="\n".join(map(training_line, entries)),
        notes="".join(f"\n{entry['note']}\n" for entry in entries if "note" in entry),
        captions=shown[0]["captions"],
        study_steps=shown[0]["steps"],
        length=shown[0]["max_sequence_length"],
        found=shown[0]["heads"],
        hunting=shown[0]["hunting"],
        **{name: shown[0][name] for name in ("device", "date", "commit", "torch", "diffusers")},
        scores="\n".join(map(_line, shown)),
    )
    (folder / "README.md").write_text(text)


def _line(row: dict[str, Any]) -> str:
    match = f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    gain = f"{row['hunted_minus']:+.3f} ({row['minus_low']:+.3f} to {row['minus_high']:+.3f})"
    marks = " | ".join(f"{row[mark]:.3f}" for mark in ("colour", "shape", "size"))
    return f"| {row['condition']} | {match} | {marks} | {'' if row['condition'] == 'hunted' else gain} |"
