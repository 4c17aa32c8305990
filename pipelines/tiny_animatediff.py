"""Train and export `tiny-animatediff`: a stock `AnimateDiffPipeline` small enough to ship, trained on the tiny world.

    vae          stills through a stock AutoencoderKL, 4x in space -> run/vae
    latents      16-frame training clips, frame by frame -> run/clips
    unet         the whole UNetMotionModel with its text encoder: stills first, then clips; v-prediction, zero terminal SNR
    export       the averaged weights as a pipeline folder in 16 bit, with its model card

    python -m genattn.pipelines.tiny_animatediff train --run-dir runs/tiny-animatediff --cpu
    python -m genattn.pipelines.tiny_animatediff export --run-dir runs/tiny-animatediff --folder assets/tiny-animatediff

Every phase resumes where it was stopped; `--minutes` stops one by the clock. `tiny_broadway_study` judges the result.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, MotionAdapter, UNetMotionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from genattn.errors import GenAttnError
from genattn.pipelines.tiny_denoiser import CAPTION_DROPOUT, count_parameters
from genattn.pipelines.tiny_export import DEFAULTS_FILE, GenerationDefaults
from genattn.pipelines.tiny_latents import SHARD, load_latents
from genattn.pipelines.tiny_text import build_tokenizer
from genattn.pipelines.tiny_trainer import TrainSettings, train
from genattn.pipelines.tiny_vae import to_model_range, training_clips
from genattn.pipelines.tiny_world import caption, render, sample_scene

FRAMES = 16
TEXT_TOKENS = 24
STILL_BATCH, CLIP_BATCH = 48, 4
KL_WEIGHT = 1e-4
PHASES = ("vae", "latents", "unet")
DEFAULTS = GenerationDefaults(height=64, width=64, frames=FRAMES, steps=25, guidance_scale=4.0, fps=8)


@dataclass(frozen=True)
class MotionSize:
    """Channels of the UNet's four levels, layers of each, heads of the motion modules, width of the text."""

    channels: tuple[int, int, int, int] = (32, 64, 64, 96)
    layers: int = 1
    heads: int = 4
    text_width: int = 64

    def __post_init__(self) -> None:
        if min(*self.channels, self.layers, self.heads) < 1 or any(c % 8 or c % self.heads for c in self.channels):
            raise GenAttnError(f"channels must be multiples of 8 and of heads, layers and heads >= 1, got {self}; change them")


class TinyMotion(nn.Module):
    """Text encoder and motion UNet as one trainable module."""

    def __init__(self, vocabulary: int, size: MotionSize | None = None) -> None:
        super().__init__()
        size = size or MotionSize()
        self.text_encoder = build_text_encoder(vocabulary, size)
        self.unet = build_unet(size)

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predicted velocity [B, C, F, H, W] for noisy latents of that shape, timestep int [B], token ids [B, L]."""
        embeds = self.text_encoder(ids)[0].repeat_interleave(noisy.shape[2], 0)
        return self.unet(noisy, timestep, embeds).sample


def build_text_encoder(vocabulary: int, size: MotionSize) -> CLIPTextModel:
    """A fresh CLIP text encoder of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=size.text_width,
            intermediate_size=2 * size.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def build_unet(size: MotionSize) -> Any:
    """A fresh `UNetMotionModel` over latents of four channels: four levels, the lowest without cross-attention."""
    return UNetMotionModel(
        sample_size=16,
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        down_block_types=("CrossAttnDownBlockMotion",) * 3 + ("DownBlockMotion",),
        up_block_types=("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * 3,
        cross_attention_dim=size.text_width,
        num_attention_heads=size.heads,
        motion_num_attention_heads=size.heads,
        motion_max_seq_length=2 * FRAMES,
        norm_num_groups=8,
    )


def build_vae(channels: tuple[int, int, int] = (16, 32, 48)) -> Any:
    """A fresh `AutoencoderKL` of single frames: [B, 3, 4 h, 4 w] <-> [B, 4, h, w]."""
    return AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        force_upcast=False,
    )


def build_scheduler() -> Any:
    """DDIM that begins at pure noise, so that backgrounds of any brightness can be had."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def build_clip_tokenizer() -> PreTrainedTokenizerFast:
    """The world's words, padded to the text encoder's length."""
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TEXT_TOKENS
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids int64 [B, 24], as the stock pipeline makes them."""
    settings = {"padding": "max_length", "max_length": TEXT_TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **settings).input_ids


def vae_loss(vae: Any, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Absolute and squared error of the reconstruction of [B, 3, H, W], objects weighing more than the plain background."""
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    error = (decoded - images).abs()
    objects = ((images - images[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
    weight = 1.0 + 4.0 * F.max_pool2d(objects, 5, stride=1, padding=2)
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
    return (weight / weight.mean() * (error + 2.0 * error**2)).mean() + KL_WEIGHT * kl


def train_vae(run_dir: Path, accelerator: Accelerator, settings: TrainSettings) -> int:
    """Train the autoencoder on stills; saves run_dir/vae. Returns the steps done."""
    set_seed(settings.seed)

    def loss_of(model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        images = training_clips(16, 1, 64, generator)[:, :, 0].to(accelerator.device)
        return vae_loss(model, images, generator)

    def on_save(model: Any, step: int) -> None:
        model.save_pretrained(run_dir / "vae")

    return train(build_vae(), loss_of, settings, accelerator, run_dir / "vae.safetensors", on_save)


@torch.no_grad()
def make_latents(run_dir: Path, accelerator: Accelerator, shards: range, minutes: float) -> int:
    """Encode shards of 64 training clips, [64, 4, 16, 16, 16] each; measures the scale at the first. Returns their number."""
    folder = run_dir / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    vae = load_vae(run_dir).to(accelerator.device)
    begun, done = time.monotonic(), 0
    for number in tqdm(shards, desc=folder.name, mininterval=5.0):
        path = folder / f"latents-{number:05d}.safetensors"
        if not path.exists():
            if time.monotonic() - begun > minutes * 60:
                continue
            scenes = [sample_scene(seed, two_objects=0.15) for seed in range(SHARD * number, SHARD * (number + 1))]
            clips = (to_model_range(render(scene, FRAMES, 64, 64)[None])[0].to(accelerator.device) for scene in scenes)
            latents = torch.stack([vae.encode(clip.transpose(0, 1)).latent_dist.mode().transpose(0, 1) for clip in clips])
            half_written = path.with_suffix(f".part{os.getpid()}")
            captions = {"captions": json.dumps([caption(scene) for scene in scenes])}
            save_file({"latents": latents.half().cpu().contiguous()}, half_written, metadata=captions)
            os.replace(half_written, path)
        done += 1
    if done and not (run_dir / "scale.json").exists():
        scale = 1.0 / float(load_latents(folder)[0][: 4 * SHARD].float().std())
        (run_dir / "scale.json").write_text(json.dumps({"scaling_factor": scale}))
    return done


def load_vae(run_dir: Path) -> Any:
    """The autoencoder that phase vae trained, with its scale once it is measured.

    Raises:
        GenAttnError: if it has not been trained.
    """
    if not (run_dir / "vae" / "config.json").exists():
        raise GenAttnError(f"phase vae must come first, got no {run_dir / 'vae'}; run train --phases vae")
    scale = run_dir / "scale.json"
    settings = json.loads(scale.read_text()) if scale.exists() else {}
    return AutoencoderKL.from_pretrained(run_dir / "vae", **settings).eval()


def velocity_loss(
    model: nn.Module,
    scheduler: Any,
    latents: torch.Tensor,
    ids: torch.Tensor,
    empty_ids: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the velocity at random timesteps, a tenth of the captions dropped.

    Args:
        latents: scaled [B, 4, F, H, W]; ids: int [B, L]; empty_ids: int [L]; generator: CPU generator.
    """
    batch, device = len(latents), latents.device
    timestep = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator).to(device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    drop = (torch.rand(batch, generator=generator) < CAPTION_DROPOUT).to(device)
    ids = torch.where(drop[:, None], empty_ids.to(device), ids.to(device))
    predicted = model(scheduler.add_noise(latents, noise, timestep), timestep, ids)
    return (predicted.float() - scheduler.get_velocity(latents, noise, timestep)).square().mean()


def train_unet(
    run_dir: Path, accelerator: Accelerator, settings: TrainSettings, still_steps: int, size: MotionSize | None = None
) -> int:
    """Single frames until `still_steps`, then whole clips, every eighth step still one of single frames."""
    set_seed(settings.seed)
    latents, captions = load_latents(run_dir / "clips")
    scale = load_vae(run_dir).config.scaling_factor
    tokenizer, scheduler = build_clip_tokenizer(), build_scheduler()
    ids, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])[0]

    def loss_of(model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        still = step < still_steps or step % 8 == 0
        chosen = torch.randint(len(latents), (STILL_BATCH if still else CLIP_BATCH,), generator=generator)
        batch = latents[chosen].float() * scale
        if still:
            place = torch.randint(FRAMES, (len(chosen),), generator=generator)
            batch = batch[torch.arange(len(chosen)), :, place][:, :, None]
        return velocity_loss(model, scheduler, batch.to(accelerator.device), ids[chosen], empty, generator)

    return train(TinyMotion(len(tokenizer), size), loss_of, settings, accelerator, run_dir / "unet.safetensors")


def assemble(run_dir: Path, size: MotionSize | None = None) -> tuple[Any, int]:
    """The pipeline of a run, in float32, and the number of training steps behind it.

    Raises:
        GenAttnError: if a phase is missing or the weights are of another size.
    """
    for part in ("vae/config.json", "scale.json", "unet.safetensors"):
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


def motion_adapter_of(unet: Any, size: MotionSize) -> Any:
    """The motion modules of a UNet as an adapter, which other UNets of the same sizes can take."""
    adapter: Any = MotionAdapter(
        block_out_channels=size.channels,
        motion_layers_per_block=size.layers,
        motion_num_attention_heads=size.heads,
        motion_max_seq_length=2 * FRAMES,
        motion_norm_num_groups=8,
    )
    adapter.load_state_dict({name: value for name, value in unet.state_dict().items() if "motion_modules" in name})
    return adapter.eval()


def export(run_dir: Path, folder: Path, size: MotionSize | None = None) -> int:
    """Write a run's pipeline and its card to `folder`, whole or not at all; returns the training steps behind it."""
    pipeline, steps = assemble(run_dir, size)
    half_written = folder.with_name(folder.name + ".part")
    shutil.rmtree(half_written, ignore_errors=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.motion_adapter):
        part.to(torch.float16)
    pipeline.save_pretrained(half_written)
    (half_written / DEFAULTS_FILE).write_text(json.dumps(asdict(DEFAULTS), indent=2) + "\n")
    (half_written / "README.md").write_text(model_card(pipeline, steps))
    shutil.rmtree(folder, ignore_errors=True)
    half_written.rename(folder)
    return steps


def model_card(pipeline: Any, steps: int) -> str:
    """What the folder holds and how it was made, as Markdown with the hub's header."""
    counts = {name: count_parameters(getattr(pipeline, name)) for name in ("unet", "vae", "text_encoder")}
    table = "\n".join(f"| {name} | {count:,} |" for name, count in counts.items())
    return (
        "---\nlicense: apache-2.0\nlibrary_name: diffusers\npipeline_tag: text-to-video\n---\n\n# tiny-animatediff\n\n"
        f"A stock `AnimateDiffPipeline` for clips of {FRAMES} frames of 64 x 64 pixels of a captioned world of coloured shapes "
        "that move. It is there to show and test attention methods on real motion modules, not to make videos.\n\n"
        "```python\nfrom diffusers import AnimateDiffPipeline\n\n"
        'pipe = AnimateDiffPipeline.from_pretrained("tiny-animatediff")\n'
        f'frames = pipe("a red circle moves right on a dark background", num_frames={FRAMES}, height=64, width=64,\n'
        f"              num_inference_steps={DEFAULTS.steps}, guidance_scale={DEFAULTS.guidance_scale}).frames[0]\n```\n\n"
        f"| part | weights |\n|---|---|\n{table}\n\n"
        f"Trained for {steps:,} steps of v-prediction on scenes drawn by `pipelines/tiny_world.py`; one in eight combinations "
        "of colour, shape and motion was never shown. Made by `pipelines/tiny_animatediff.py`. No data from anywhere else.\n"
    )


def run_training(options: argparse.Namespace) -> None:
    """The command `train`."""
    accelerator = Accelerator(cpu=options.cpu, mixed_precision=options.mixed_precision)
    options.run_dir.mkdir(parents=True, exist_ok=True)
    common = {"minutes": options.minutes, "seed": options.seed}
    if "vae" in options.phases:
        train_vae(options.run_dir, accelerator, TrainSettings(options.vae_steps, learning_rate=1e-3, **common))
    if "latents" in options.phases:
        make_latents(options.run_dir, accelerator, range(*options.shards), options.minutes)
    if "unet" in options.phases:
        settings = TrainSettings(options.steps, learning_rate=options.learning_rate, **common)
        train_unet(options.run_dir, accelerator, settings, options.still_steps)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m genattn.pipelines.tiny_animatediff", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    training.set_defaults(run=run_training)
    training.add_argument("--run-dir", type=Path, required=True, help="where checkpoints and cached latents go")
    training.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="which to run, in order")
    training.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    training.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="autocast")
    training.add_argument("--seed", type=int, default=0, help="seed of everything random")
    training.add_argument("--minutes", type=float, default=1e9, help="wall-clock limit of each phase")
    training.add_argument("--vae-steps", type=int, default=4000, help="last step of the autoencoder")
    training.add_argument("--shards", type=int, nargs=2, default=(0, 128), help="first and end shard of 64 clips")
    training.add_argument("--steps", type=int, default=20000, help="last step of the UNet")
    training.add_argument("--still-steps", type=int, default=8000, help="of these, on single frames")
    training.add_argument("--learning-rate", type=float, default=6e-4, help="peak rate of the UNet")
    exporting = commands.add_parser("export", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    exporting.set_defaults(run=lambda options: export(options.run_dir, options.folder))
    exporting.add_argument("--run-dir", type=Path, required=True, help="folder of the run")
    exporting.add_argument("--folder", type=Path, required=True, help="where the pipeline goes; replaced whole")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny_animatediff`."""
    options = build_parser().parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
