"""A LoRA that teaches tiny-wan-long the motions that go on, by the curriculum that the model itself was made with.

    python -m genattn.pipelines.tiny.studies.endless --model assets/tiny-wan-long --run-dir runs/endless

Of three clips one shows a motion that the model knows already, and of three of either kind two show objects at their usual
places: a caption says all there is to see in those, and from the rest a motion is learned at any phase. Of five steps two show
single latent frames, two short windows and one a whole clip; the last ones whole clips alone. Frames carry their place in the
clip, so that pieces teach where a thing is when, at a fraction of a clip's cost. A run that was stopped goes on.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.pipelines.wan.pipeline_wan import WanPipeline

from genattn.errors import GenAttnError
from genattn.pipelines.finetune.cache import ClipSize, LatentCache, load_clip
from genattn.pipelines.finetune.data import find_clips
from genattn.pipelines.finetune.lora import LoraTrainer, add_lora, save_lora
from genattn.pipelines.finetune.tune import trainable
from genattn.pipelines.tiny.denoiser import TinyDenoiser, flow_loss
from genattn.pipelines.tiny.export import DEFAULTS_FILE, GenerationDefaults
from genattn.pipelines.tiny.studies.finetune import write_clip
from genattn.pipelines.tiny.text import ENDLESS_TEXT_TOKENS, tokenize
from genattn.pipelines.tiny.world import ENDLESS, MOTIONS, Scene, sample_scene, settle
from genattn.pipelines.training.trainer import TrainSettings, train

PAIRS = 0.1
# latent frames of each clip and clips in a step; 0 frames: whole clips
STEPS = ((0, 1), (1, 12), (4, 3), (1, 12), (4, 3))


def training_scene(number: int) -> Scene:
    """What training clip `number` >= 0 shows."""
    known = number % 3 == 2
    scene = sample_scene(number, two_objects=PAIRS, motions=tuple(MOTIONS if known else ENDLESS))
    return scene if number // 3 % 3 == 2 else settle(scene)


def encoded_clips(pipe: Any, folder: Path, count: int, size: ClipSize, fps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents with their places float32 [N, C, F, h, w] and token ids [N, 24] of the first clips, made where they are not."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write_clip(folder / "clips" / f"{number:04d}.mp4", training_scene(number), size, fps)
    clips = find_clips(folder / "clips")
    files = LatentCache(trainable(pipe), folder / "cache", size).fill(clips)
    latents = torch.stack([latent for latent, _ in map(load_clip, files) if latent is not None])
    return latents, token_ids(pipe, [clip.caption for clip in clips.clips])


def token_ids(pipe: Any, captions: Sequence[str]) -> torch.Tensor:
    """Token ids int64 [N, 24], padded with 0: room for two objects with endless motions."""
    return tokenize(pipe.tokenizer, list(captions), ENDLESS_TEXT_TOKENS)


def draw_pieces(
    latents: torch.Tensor, ids: torch.Tensor, step: int, whole: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step shows: pieces [B, C, f, h, w] of random clips, and their ids [B, L].

    Args:
        latents: [N, C, F, h, w].
        ids: int [N, L].
        step: its number.
        whole: show a whole clip whatever the number.
        generator: CPU generator.
    """
    frames, batch = STEPS[0] if whole else STEPS[step % len(STEPS)]
    frames = frames or latents.shape[2]
    chosen = torch.randint(len(latents), (batch,), generator=generator)
    first = torch.randint(latents.shape[2] - frames + 1, (batch,), generator=generator).tolist()
    pieces = [latents[clip, :, start : start + frames] for clip, start in zip(chosen.tolist(), first, strict=True)]
    return torch.stack(pieces), ids[chosen]


def train_lora(
    pipe: Any,
    latents: torch.Tensor,
    ids: torch.Tensor,
    run_dir: Path,
    rank: int,
    settings: TrainSettings,
    mixed_precision: str = "no",
) -> int:
    """Train a LoRA on the pipeline's attention into run_dir/lora; the pipeline keeps it. Returns the steps done in all."""
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    set_seed(settings.seed)
    denoiser = TinyDenoiser(latents.shape[1], len(pipe.tokenizer))
    denoiser.transformer, denoiser.text_encoder = pipe.transformer, pipe.text_encoder.requires_grad_(False)
    add_lora(pipe.transformer, rank, rank)
    empty = token_ids(pipe, [""])[0]

    def loss(pieces: torch.Tensor, asked: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return flow_loss(denoiser, pieces, asked, empty, generator)

    def loss_of(model: Any, step: int, generator: torch.Generator) -> torch.Tensor:
        whole = step >= settings.steps * (1 - settings.decay / 4)
        pieces, asked = draw_pieces(latents, ids, step, whole, generator)
        return model(pieces, asked, generator)

    def saved(model: Any, step: int) -> None:
        save_lora(pipe, run_dir / "lora", {"steps": step, "of": settings.steps, "rank": rank, "clips": len(latents)})

    trainer = LoraTrainer(pipe.transformer, loss)
    return train(trainer, loss_of, settings, accelerator, run_dir / "training.safetensors", saved)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny.studies.endless`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-wan-long"), help="the exported pipeline")
    parser.add_argument("--run-dir", type=Path, required=True, help="where clips, latents, checkpoint and LoRA go")
    parser.add_argument("--clips", type=int, default=240, help="training clips")
    parser.add_argument("--steps", type=int, default=1100, help="training steps")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop by the clock; the same command goes on")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="AdamW's")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="bf16", help="of the forward")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    options = parser.parse_args(arguments)
    if options.clips < 1:
        raise GenAttnError(f"clips must be >= 1, got {options.clips}; ask for more")
    defaults = GenerationDefaults(**json.loads((options.model / DEFAULTS_FILE).read_text()))
    pipe = WanPipeline.from_pretrained(options.model).to(torch.float32)
    size = ClipSize(defaults.frames, defaults.height, defaults.width)
    latents, ids = encoded_clips(pipe, options.run_dir, options.clips, size, defaults.fps)
    settings = TrainSettings(
        options.steps, options.minutes, options.learning_rate, 30, 0.4, ema=0.99, seed=options.seed, save_minutes=4.0
    )
    done = train_lora(pipe, latents, ids, options.run_dir, options.rank, settings, options.mixed_precision)
    print(f"{done} steps on {len(latents)} clips; load {options.run_dir / 'lora'}")


if __name__ == "__main__":
    main()
