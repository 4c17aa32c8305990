"""Train and export `tiny-animatediff`: a stock `AnimateDiffPipeline` small enough to ship, trained on the tiny world.

    latents      16-frame training clips through tiny-sd3's autoencoder, frame by frame -> run/clips, run/settled-clips
    unet         the whole UNetMotionModel with its text encoder, which begins as tiny-sd3's: single frames first, then a
                 few frames of each clip, then whole clips; v-prediction, zero terminal SNR
    export       the averaged weights as a pipeline folder in 16 bit

    python -m genattn.pipelines.tiny.animatediff train --run-dir runs/tiny-animatediff --cpu
    python -m genattn.pipelines.tiny.studies.broadway --model assets/tiny-animatediff --card-from runs/tiny-animatediff

Every phase resumes where it was stopped; `--minutes` stops one by the clock. `studies/broadway.py` judges the result.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AnimateDiffPipeline, AutoencoderKL
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextModelWithProjection

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.card import device_name, folder_bytes, journal
from genattn.pipelines.tiny.denoiser import CAPTION_DROPOUT
from genattn.pipelines.tiny.export import GenerationDefaults, write_pipeline
from genattn.pipelines.tiny.latents import SHARD, cache_latents, load_latents
from genattn.pipelines.tiny.motion import (
    FRAMES,
    MotionSize,
    TinyMotion,
    build_clip_tokenizer,
    build_scheduler,
    motion_adapter_of,
    tokenize,
)
from genattn.pipelines.training.command import run_command, training_parser
from genattn.pipelines.training.places import object_weight
from genattn.pipelines.training.trainer import TrainSettings, train

PICTURES, FEW_FRAMES = 48, 4
CLIP_BATCH = 4
PHASES = ("latents", "unet", "export")
DEFAULTS = GenerationDefaults(height=64, width=64, frames=FRAMES, steps=12, guidance_scale=3.0, fps=8)


def adopt_autoencoder(run_dir: Path, folder: Path) -> None:
    """Take a trained tiny-sd3's autoencoder and text encoder for a run, where it has none yet.

    AnimateDiff's pipelines know a scale of the latents but no shift, so the shift is dropped.

    Raises:
        GenAttnError: if the folder holds no pipeline.
    """
    if not (folder / "vae" / "config.json").exists():
        raise GenAttnError(f"a run begins with tiny-sd3's autoencoder, got {folder} without vae/config.json; give its folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / "vae").exists():
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        vae.register_to_config(shift_factor=None)
        vae.save_pretrained(run_dir / "vae")
    if not (run_dir / "text_encoder").exists():
        shutil.copytree(folder / "text_encoder", run_dir / "text_encoder")


def load_vae(run_dir: Path) -> Any:
    """The autoencoder of a run.

    Raises:
        GenAttnError: if the run has none.
    """
    if not (run_dir / "vae" / "config.json").exists():
        raise GenAttnError(f"a run must hold an autoencoder, got no {run_dir / 'vae'}; begin with tiny-sd3's folder")
    return AutoencoderKL.from_pretrained(run_dir / "vae").eval()


def begin_text_encoder(model: TinyMotion, run_dir: Path) -> None:
    """Fill the text encoder, in place, with the embeddings and first layers of the one that the run adopted."""
    trained = CLIPTextModelWithProjection.from_pretrained(run_dir / "text_encoder").text_model.state_dict()
    own = model.text_encoder.state_dict()
    prefix = "text_model." if any(name.startswith("text_model.") for name in own) else ""
    first = {prefix + name: value for name, value in trained.items() if "final_layer_norm" not in name}
    model.text_encoder.load_state_dict({name: value for name, value in first.items() if name in own}, strict=False)


def make_latents(run_dir: Path, accelerator: Accelerator, shards: range, minutes: float, settled: bool = False) -> int:
    """Encode shards of 64 training clips, [64, 4, 16, 16, 16] each, objects at their usual places if `settled`.

    Returns how many of the shards there are.
    """
    vae = load_vae(run_dir).to(accelerator.device)
    return cache_latents(vae, run_dir / ("settled-clips" if settled else "clips"), shards, minutes, FRAMES, settled=settled)


def velocity_loss(
    model: nn.Module,
    scheduler: Any,
    latents: torch.Tensor,
    ids: torch.Tensor,
    empty_ids: torch.Tensor,
    generator: torch.Generator,
    frames: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of the velocity at random timesteps, objects weighted, a tenth of the captions dropped.

    Args:
        latents: scaled [B, 4, F, H, W]; ids: int [B, L]; empty_ids: int [L]; generator: CPU generator.
        frames: int [B, F], which frames of the clip the latents are; the first F if not given.
    """
    batch, device = len(latents), latents.device
    timestep = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator).to(device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    drop = (torch.rand(batch, generator=generator) < CAPTION_DROPOUT).to(device)
    ids = torch.where(drop[:, None], empty_ids.to(device), ids.to(device))
    predicted = model(scheduler.add_noise(latents, noise, timestep), timestep, ids, frames)
    error = (predicted.float() - scheduler.get_velocity(latents, noise, timestep)).square()
    return (error * object_weight(latents)).mean()


def draw_frames(step: int, still_steps: int, few_steps: int, generator: torch.Generator) -> torch.Tensor:
    """Which frames a step shows: int [B, F], sorted in every clip.

    One frame of each of 48 clips until `still_steps`, four of each of 12 until `few_steps`, but for every third step, and
    then whole clips, but for every eighth step.
    """
    if step < still_steps or step % 8 == 0:
        return torch.randint(FRAMES, (PICTURES, 1), generator=generator)
    if step < few_steps and step % 3:
        picks = torch.rand(PICTURES // FEW_FRAMES, FRAMES, generator=generator).argsort(1)[:, :FEW_FRAMES]
        return picks.sort(1).values
    return torch.arange(FRAMES).repeat(CLIP_BATCH, 1)


def train_unet(
    run_dir: Path,
    accelerator: Accelerator,
    settings: TrainSettings,
    still_steps: int,
    few_steps: int,
    size: MotionSize | None = None,
) -> int:
    """Train text encoder and motion UNet; returns the steps done.

    For half of the still steps every object is at its usual place, from then on in every other step (why:
    `wan.train_transformer`). What the steps show: `draw_frames`.
    """
    set_seed(settings.seed)
    tokenizer, scheduler = build_clip_tokenizer(), build_scheduler()
    scale = load_vae(run_dir).config.scaling_factor
    cached = [load_latents(run_dir / name) for name in ("settled-clips", "clips")]
    sets = [(latents, tokenize(tokenizer, captions)) for latents, captions in cached]
    empty = tokenize(tokenizer, [""])[0]
    model = TinyMotion(len(tokenizer), size)
    if (run_dir / "text_encoder").exists():
        begin_text_encoder(model, run_dir)

    def loss_of(module: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        latents, ids = sets[0 if step < still_steps // 2 or step % 2 else 1]
        frames = draw_frames(step, still_steps, few_steps, generator)
        chosen = torch.randint(len(latents), (len(frames),), generator=generator)
        batch = latents[chosen[:, None], :, frames].transpose(1, 2).float() * scale
        frames = frames.to(accelerator.device)
        return velocity_loss(module, scheduler, batch.to(accelerator.device), ids[chosen], empty, generator, frames)

    return train(model, loss_of, settings, accelerator, run_dir / "unet.safetensors")


def assemble(run_dir: Path, size: MotionSize | None = None) -> tuple[Any, int]:
    """The pipeline of a run, in float32, and the number of training steps behind it.

    Raises:
        GenAttnError: if a phase is missing or the weights are of another size.
    """
    for part in ("vae/config.json", "unet.safetensors"):
        if not (run_dir / part).exists():
            raise GenAttnError(f"a run must hold {part} before it is exported, got {run_dir} without; train first")
    tokenizer = build_clip_tokenizer()
    model = TinyMotion(len(tokenizer), size)
    with safe_open(run_dir / "unet.safetensors", "pt") as file:
        steps = int(json.loads(file.metadata()["state"])["step"])
        names = [name for name in file.keys() if name.startswith("ema.")]  # noqa: SIM118
        averages = {name.removeprefix("ema."): file.get_tensor(name) for name in names}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if shapes != {name: value.shape for name, value in averages.items()}:
        raise GenAttnError(f"the weights must be of size {size or MotionSize()}, got others in {run_dir}; say which")
    model.load_state_dict(averages)
    pipeline = AnimateDiffPipeline(
        vae=load_vae(run_dir),
        text_encoder=model.text_encoder.eval(),
        tokenizer=tokenizer,
        unet=model.unet.eval(),
        motion_adapter=motion_adapter_of(model.unet, size or MotionSize()),
        scheduler=build_scheduler(),
    )
    return pipeline, steps


def export(run_dir: Path, folder: Path, size: MotionSize | None = None) -> int:
    """Write a run's pipeline to `folder`, whole or not at all, a README.md kept; returns the training steps behind it."""
    pipeline, steps = assemble(run_dir, size)
    for part in (pipeline.unet, pipeline.vae, pipeline.motion_adapter):
        part.to(torch.float16)
    write_pipeline(pipeline, folder, DEFAULTS, run_dir)
    return steps


def run_training(options: argparse.Namespace) -> None:
    """The command `train`."""
    accelerator = Accelerator(cpu=options.cpu, mixed_precision=options.mixed_precision)
    run_dir, device = options.run_dir, device_name(options.cpu)
    adopt_autoencoder(run_dir, options.begin_with)
    if "latents" in options.phases:
        shards = range(*options.shards)
        settled = range(shards.start, shards.start + (len(shards) + 1) // 2)
        with journal(run_dir, "latents", device) as done:
            done["clips"] = SHARD * make_latents(run_dir, accelerator, shards, options.minutes)
            done["settled"] = SHARD * make_latents(run_dir, accelerator, settled, options.minutes, settled=True)
    if "unet" in options.phases:
        settings = TrainSettings(options.steps, options.minutes, options.learning_rate, decay=options.decay, seed=options.seed)
        with journal(run_dir, "unet", device) as done:
            done["steps"] = train_unet(run_dir, accelerator, settings, options.still_steps, options.few_steps)
    if "export" in options.phases:
        steps = export(run_dir, options.out)
        accelerator.print(f"{options.out}: {steps} steps, {folder_bytes(options.out) / 1e6:.1f} MB")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser, _, training = training_parser("genattn.pipelines.tiny.animatediff", __doc__, PHASES, run_training)
    training.add_argument("--begin-with", type=Path, default=Path("assets/tiny-sd3"), help="a trained tiny-sd3")
    training.add_argument("--shards", type=int, nargs=2, default=(0, 64), help="first and end shard of 64 clips")
    training.add_argument("--steps", type=int, default=20000, help="last step of the UNet")
    training.add_argument("--still-steps", type=int, default=4000, help="of these, on single frames")
    training.add_argument("--few-steps", type=int, default=14000, help="step until which most show a few frames of a clip")
    training.add_argument("--learning-rate", type=float, default=1e-3, help="peak rate of the UNet")
    training.add_argument("--decay", type=float, default=0.25, help="share of the steps over which the rate falls")
    training.add_argument("--out", type=Path, default=Path("assets/tiny-animatediff"), help="where the pipeline goes")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny.animatediff`."""
    run_command(build_parser(), arguments)


if __name__ == "__main__":
    main()
