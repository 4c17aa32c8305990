"""The model card of tiny-animatediff, generated from its journal and BroadWay's study: no figure in it is typed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.card import count_weights, folder_bytes, read_journal, training_line
from genattn.pipelines.tiny.export import DEFAULTS_FILE, GenerationDefaults

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# tiny-animatediff

A complete, trained `AnimateDiffPipeline` of {megabytes:.1f} MB: clips of coloured shapes that move. It is made to test and show
methods on real motion modules where no model can be downloaded; it knows only its tiny world.

```python
from diffusers import AnimateDiffPipeline

pipe = AnimateDiffPipeline.from_pretrained("assets/tiny-animatediff")
pipe("a red circle moves right on a dark background", height={height}, width={width}, num_frames={frames},
     num_inference_steps={steps}, guidance_scale={guidance_scale})
```

## Parts
- `UNetMotionModel`, channels {channels}, {heads} heads: {unet_weights:.2f} M weights; of these the motion modules,
  {motion_weights:.2f} M, are also there as a `MotionAdapter`
- `AutoencoderKL`, that of tiny-sd3, 4x in space, 4 channels: {vae_weights:.2f} M
- `CLIPTextModel` of two layers, which began with the weights of tiny-sd3's: {text_weights:.2f} M
- `DDIMScheduler`, v-prediction, zero terminal SNR

## Training
Clips of {frames} frames drawn by `pipelines/tiny/world.py`, 15 % with two objects; 30 of the 240 colour x shape x motion
combinations are held out. In every other step the objects are at their usual places. Training shows one frame of each clip at
first, then four, then all of them.

| phase | steps | minutes | device |
| --- | --- | --- | --- |
{training}
{notes}
## Scores
{clips} captions that training never saw, half of them of held-out combinations, {study_steps} denoising steps of the stock
pipeline, judged by `pipelines/tiny/oracle.py` and optical flow. `docs/broadway.md` shows how BroadWay changes these scores.
Measured on {device}, {date}, commit {commit}, torch {torch}, diffusers {diffusers}.

| measure | stock |
| --- | --- |
{scores}

Chance is 1 in 6 for a colour, 1 in 5 for a shape, 1 in 8 for a motion.

## Limits
The scores show what it cannot do: the asked motion is there in about half of the clips. Other frame counts and sizes were never
trained on. Text outside of the captions of its world means nothing to it.

Licence: Apache-2.0, weights and code. Made by `python -m genattn.pipelines.tiny.animatediff`.
"""
SCORED = ("colour", "shape", "motion", "consistency", "smoothness", "flickering", "dynamic_degree", "motion_amount")


def write_motion_card(folder: Path, run_dir: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write README.md into an exported folder.

    Args:
        folder: the exported pipeline.
        run_dir: the run it came from, with its journal.
        rows: the rows of `studies/broadway.py`, with their provenance; that of "stock" is shown.

    Raises:
        GenAttnError: if no row is of the stock pipeline.
    """
    stock = next((row for row in rows if row["variant"] == "stock"), None)
    if stock is None:
        raise GenAttnError(f"a card needs the row of stock, got {[row['variant'] for row in rows]}; measure it")
    config = json.loads((folder / "unet" / "config.json").read_text())
    entries = read_journal(run_dir)
    text = CARD.format(
        **vars(GenerationDefaults(**json.loads((folder / DEFAULTS_FILE).read_text()))),
        megabytes=folder_bytes(folder) / 1e6,
        channels=", ".join(map(str, config["block_out_channels"])),
        heads=config["motion_num_attention_heads"],
        unet_weights=count_weights(folder / "unet"),
        motion_weights=count_weights(folder / "motion_adapter"),
        vae_weights=count_weights(folder / "vae"),
        text_weights=count_weights(folder / "text_encoder"),
        training="\n".join(map(training_line, entries)),
        notes="".join(f"\n{entry['note']}\n" for entry in entries if "note" in entry),
        study_steps=stock["steps"],
        **{name: stock[name] for name in ("clips", "device", "date", "commit", "torch", "diffusers")},
        scores="\n".join(f"| {name.replace('_', ' ')} | {stock[name]:.3f} |" for name in SCORED),
    )
    (folder / "README.md").write_text(text)
