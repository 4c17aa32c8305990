"""Train, export and evaluate `tiny-wan`: a stock `WanPipeline` small enough to ship, trained on the tiny world.

    vae          stills, then short clips -> run/vae
    latents      training clips through the autoencoder -> run/stills, run/clips
    transformer  stills, then some latent frames of each clip, then all of them
    export       the averaged weights as a pipeline folder in 16 bit
    evaluate     (a command of its own) held-out captions, judged by the oracle

    python -m genattn.pipelines.tiny_wan train --run-dir runs/tiny-wan --cpu
    python -m genattn.pipelines.tiny_wan evaluate --model assets/tiny-wan --count 200

Every phase resumes where it was stopped; `--minutes` stops one by the clock.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLWan
from torch import nn

from genattn.errors import GenAttnError
from genattn.pipelines.tiny_denoiser import DenoiserSize, TinyDenoiser, choose_frames, flow_loss, tokenize
from genattn.pipelines.tiny_latents import cache_latents, load_latents, measure_latents
from genattn.pipelines.tiny_text import build_tokenizer
from genattn.pipelines.tiny_trainer import TrainSettings, step_generator, train
from genattn.pipelines.tiny_vae import build_vae, psnr, still_convolutions, training_clips, vae_loss

PHASES = ("vae", "latents", "transformer", "export")
STILL_BATCH, SUBSET_BATCH, CLIP_BATCH = 32, 12, 8
SUBSET_FRAMES = 3


def train_vae(run_dir: Path, accelerator: Accelerator, settings: TrainSettings, still_steps: int) -> int:
    """Stills until `still_steps`, then clips of five and nine frames; saves run_dir/vae. Returns the steps done."""
    set_seed(settings.seed)
    vae = build_vae()

    def loss_of(model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        if step < still_steps:
            with still_convolutions(model):
                return vae_loss(model, training_clips(12, 1, 64, generator).to(accelerator.device), generator)
        frames = 5 if step % 2 else 9
        clips = training_clips(20 // frames, frames, 64, generator).to(accelerator.device)
        return vae_loss(model, clips, generator)

    def on_save(model: nn.Module, step: int) -> None:
        shown = [training_clips(4, frames, 64, step_generator(12345, frames)) for frames in (1, 13)]
        stills, clips = (psnr(model, shot.to(accelerator.device)) for shot in shown)
        accelerator.print(f"vae step {step}: {stills:.2f} dB on stills, {clips:.2f} dB on 13 frames", flush=True)
        model.save_pretrained(run_dir / "vae")

    return train(vae, loss_of, settings, accelerator, run_dir / "vae.safetensors", on_save)


def make_latents(
    run_dir: Path, accelerator: Accelerator, clips: range, stills: range, minutes: float
) -> tuple[int, int]:
    """Encode shards of training clips and stills; returns how many of each there are now."""
    vae = load_vae(run_dir).to(accelerator.device)
    counts = (
        cache_latents(vae, run_dir / "stills", stills, minutes, frames=1),
        cache_latents(vae, run_dir / "clips", clips, minutes),
    )
    statistics = run_dir / "latents.json"
    if not statistics.exists() and counts[1]:
        mean, std = measure_latents(load_latents(run_dir / "clips")[0])
        statistics.write_text(json.dumps({"latents_mean": mean, "latents_std": std}))
    return counts


def load_vae(run_dir: Path) -> AutoencoderKLWan:
    """The autoencoder that phase vae trained.

    Raises:
        GenAttnError: if it has not.
    """
    if not (run_dir / "vae" / "config.json").exists():
        raise GenAttnError(f"phase vae must come first, got no {run_dir / 'vae'}; run train --phases vae")
    return AutoencoderKLWan.from_pretrained(run_dir / "vae").eval()


def latent_statistics(run_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents, each [C, 1, 1, 1].

    Raises:
        GenAttnError: if phase latents has not measured them.
    """
    path = run_dir / "latents.json"
    if not path.exists():
        raise GenAttnError(f"phase latents must come first, got no {path}; run train --phases latents")
    values = json.loads(path.read_text())
    mean, std = (torch.tensor(values[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, std


class LatentBatches:
    """Random batches of cached latents, normalised, with their tokens; a folder is read when first asked for."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.tokenizer = build_tokenizer()
        self.mean, self.std = latent_statistics(run_dir)
        self.empty = tokenize(self.tokenizer, [""])[0]
        self._loaded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def draw(self, kind: str, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents float32 [batch, C, F, H, W] and token ids [batch, L] from folder `kind`, clips or stills."""
        if kind not in self._loaded:
            latents, captions = load_latents(self.run_dir / kind)
            self._loaded[kind] = latents, tokenize(self.tokenizer, captions)
        latents, ids = self._loaded[kind]
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        return (latents[chosen].float() - self.mean) / self.std, ids[chosen]


def train_transformer(
    run_dir: Path,
    accelerator: Accelerator,
    settings: TrainSettings,
    still_steps: int,
    subset_steps: int,
    size: DenoiserSize | None = None,
    compile_blocks: bool = False,
    on_save: Callable[[nn.Module, int], None] | None = None,
) -> int:
    """Stills until `still_steps`, three frames of each clip until `subset_steps`, then whole clips.

    Every tenth step after the stills is one of stills, lest a single frame be forgotten. Returns the steps done.
    """
    set_seed(settings.seed)
    batches = LatentBatches(run_dir)
    model = TinyDenoiser(batches.mean.shape[0], len(batches.tokenizer), size)
    if compile_blocks:
        model.transformer.compile_repeated_blocks(dynamic=False)

    def loss_of(module: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        if step < still_steps or step % 10 == 0:
            (latents, ids), frames = batches.draw("stills", STILL_BATCH, generator), None
        else:
            few = step < subset_steps
            latents, ids = batches.draw("clips", SUBSET_BATCH if few else CLIP_BATCH, generator)
            frames = choose_frames(SUBSET_FRAMES if few else latents.shape[2], generator)
            latents = latents if frames is None else latents[:, :, frames]
        return flow_loss(module, latents.to(accelerator.device), ids, batches.empty, frames, generator)

    return train(model, loss_of, settings, accelerator, run_dir / "transformer.safetensors", on_save)


def run_training(options: argparse.Namespace) -> None:
    """The command `train`."""
    accelerator = Accelerator(cpu=options.cpu, mixed_precision=options.mixed_precision)
    options.run_dir.mkdir(parents=True, exist_ok=True)
    common = {"minutes": options.minutes, "seed": options.seed}
    if "vae" in options.phases:
        settings = TrainSettings(options.vae_steps, learning_rate=8e-4, save_minutes=2.0, **common)
        train_vae(options.run_dir, accelerator, settings, options.vae_still_steps)
    if "latents" in options.phases:
        clips, stills = (range(*shards) for shards in (options.clip_shards, options.still_shards))
        make_latents(options.run_dir, accelerator, clips, stills, options.minutes)
    if "transformer" in options.phases:
        settings = TrainSettings(options.steps, learning_rate=options.learning_rate, **common)
        curriculum = options.still_steps, options.subset_steps
        train_transformer(options.run_dir, accelerator, settings, *curriculum, compile_blocks=options.compile)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m genattn.pipelines.tiny_wan", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    training.set_defaults(run=run_training)
    training.add_argument("--run-dir", type=Path, required=True, help="where checkpoints and cached latents go")
    training.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="which to run, in order")
    training.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    training.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="autocast")
    training.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    training.add_argument("--seed", type=int, default=0, help="seed of everything random")
    training.add_argument("--minutes", type=float, default=1e9, help="wall-clock limit of each phase")
    training.add_argument("--vae-steps", type=int, default=1650, help="last step of the autoencoder")
    training.add_argument("--vae-still-steps", type=int, default=950, help="of these, on stills")
    training.add_argument("--clip-shards", type=int, nargs=2, default=(0, 64), help="first and end shard of 64 clips")
    training.add_argument("--still-shards", type=int, nargs=2, default=(0, 100), help="the same for stills")
    training.add_argument("--steps", type=int, default=7000, help="last step of the transformer")
    training.add_argument("--still-steps", type=int, default=1500, help="of these, on stills")
    training.add_argument("--subset-steps", type=int, default=3500, help="step at which whole clips begin")
    training.add_argument("--learning-rate", type=float, default=1e-3, help="peak rate of the transformer")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny_wan`."""
    options = build_parser().parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
