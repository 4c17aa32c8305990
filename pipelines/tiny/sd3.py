"""Train and export `tiny-sd3`: a stock `StableDiffusion3Pipeline` small enough to ship, trained on the tiny world's stills.

    vae          a stock AutoencoderKL, 4x in space
    transformer  SD3Transformer2DModel, six joint blocks of four heads, with two small CLIP text encoders, by flow matching
    export       the averaged weights as a pipeline folder, 16 bit where it counts

    python -m genattn.pipelines.tiny.sd3 train --run-dir runs/tiny-sd3
    python -m genattn.pipelines.tiny.studies.sd3 --model assets/tiny-sd3 --run-dir runs/tiny-sd3

Every phase resumes where it was stopped. The captions need no T5, but the stock pipeline loads without further words only with
all three text encoders: the third is a stub of one layer that answers zeros, as the pipeline itself does where it is missing.
The joint attention sees those zeros, 256 of them by default; training shows them at varying lengths.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors import safe_open
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.card import device_name, folder_bytes, journal
from genattn.pipelines.tiny.export import GenerationDefaults, write_pipeline
from genattn.pipelines.tiny.text import build_tokenizer
from genattn.pipelines.tiny.vae import to_model_range, training_clips
from genattn.pipelines.tiny.world import caption, render, sample_scene, settle
from genattn.pipelines.training.command import run_command, training_parser
from genattn.pipelines.training.places import object_weight
from genattn.pipelines.training.trainer import TrainSettings, step_generator, train

PHASES = ("vae", "transformer", "export")
TEXT_TOKENS, TEXT_WIDTH = 24, 64
FLOW_SHIFT, CAPTION_DROPOUT = 3.0, 0.1
MISSING_T5_LENGTHS = (256, 256, 77, 16)
SIZE, LATENT_CHANNELS, TWO_OBJECTS = 64, 4, 0.15


@dataclass(frozen=True)
class Sd3Size:
    """Shape of the transformer: `layers` joint blocks of `heads` heads of `head_dim`."""

    layers: int = 6
    heads: int = 4
    head_dim: int = 32

    def __post_init__(self) -> None:
        if min(self.layers, self.heads) < 1 or self.head_dim < 2 or self.head_dim % 2:
            raise GenAttnError(f"sizes must be >= 1 and head_dim even, got {self}; enlarge the model")


def build_image_vae() -> AutoencoderKL:
    """A fresh autoencoder: [B, 3, 4 h, 4 w] <-> [B, 4, h, w]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def caption_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny models' tokenizer at the length that both CLIP encoders take."""
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TEXT_TOKENS
    return tokenizer


class TinySd3(nn.Module):
    """Both text encoders and the transformer as one trainable module."""

    def __init__(self, size: Sd3Size | None = None) -> None:
        super().__init__()
        size, tokenizer = size or Sd3Size(), caption_tokenizer()
        self.text_encoder, self.text_encoder_2 = (_clip(tokenizer) for _ in range(2))
        width = size.heads * size.head_dim
        self.transformer = SD3Transformer2DModel(
            sample_size=SIZE // 4,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=size.layers,
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=width,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=SIZE // 4,
            qk_norm="rms_norm",
        )

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor, missing: int = 256) -> torch.Tensor:
        """Predicted velocity [B, 4, h, w] of latents at noise levels sigma [B]; ids int [B, 24], `missing` zeros for T5."""
        parts = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        embeds = torch.cat([part.hidden_states[-2] for part in parts], -1)
        embeds = torch.cat([embeds, embeds.new_zeros(len(ids), 1, embeds.shape[-1])], 1)
        pooled = torch.cat([part.text_embeds for part in parts], -1)
        with RepeatedLastKey(missing):
            out: torch.Tensor = self.transformer(noisy, embeds, pooled, sigma * 1000, return_dict=False)[0]
        return out


class RepeatedLastKey(TorchFunctionMode):
    """Within, every attention weighs its last key as if it stood there `times` times.

    The zeros in place of T5's answer carry no position, so they stay equal through every block: one of them with
    log(times) added to its logits is exact, at a third of the work.
    """

    def __init__(self, times: int) -> None:
        super().__init__()
        self.bias = math.log(times)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            key = args[1]
            bias = key.new_zeros(1, 1, 1, key.shape[-2])
            bias[..., -1] = self.bias
            kwargs = {**(kwargs or {}), "attn_mask": bias}
        return func(*args, **(kwargs or {}))


def _clip(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModelWithProjection:
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=TEXT_WIDTH,
        **ends,
    )
    return CLIPTextModelWithProjection(config)


def silent_t5() -> T5EncoderModel:
    """A stock T5 encoder of the least size whose answer is zero for every text."""
    config = T5Config(
        vocab_size=len(build_tokenizer()), d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1, dropout_rate=0.0
    )
    encoder = T5EncoderModel(config).eval()
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def image_loss(vae: AutoencoderKL, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """L1 + MSE, five times as heavy on and beside objects, plus a small KL term; images [B, 3, H, W] in [-1, 1]."""
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
    error = (vae.decode(posterior.mean + posterior.std * noise).sample.float() - images).abs()
    objects = ((images - images[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
    weight = 1.0 + 4.0 * F.max_pool2d(objects, 5, stride=1, padding=2)
    return (weight / weight.mean() * (error + 2.0 * error**2)).mean() + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()


def draw_stills(batch: int, generator: torch.Generator, settled: float = 0.0) -> tuple[torch.Tensor, list[str]]:
    """Pictures [batch, 3, 64, 64] in [-1, 1] of random training scenes, a share `settled` at usual places, with captions."""
    seeds = torch.randint(0, 2**31, (batch,), generator=generator).tolist()
    scenes = [sample_scene(seed, two_objects=TWO_OBJECTS) for seed in seeds]
    at_rest = round(settled * batch)
    scenes = [*map(settle, scenes[:at_rest]), *scenes[at_rest:]]
    clips = np.stack([render(scene, 1, SIZE, SIZE) for scene in scenes])
    return to_model_range(clips)[:, :, 0], [caption(scene) for scene in scenes]


def train_image_vae(run_dir: Path, accelerator: Accelerator, settings: TrainSettings, batch: int = 16) -> int:
    """Train the autoencoder and write it, with its latents' mean and spread, to run_dir/vae; returns the steps done."""
    set_seed(settings.seed)

    def loss_of(model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        return image_loss(model, training_clips(batch, 1, SIZE, generator)[:, :, 0].to(accelerator.device), generator)

    def on_save(model: Any, step: int) -> None:
        images, _ = draw_stills(64, step_generator(12345, 0))
        with torch.no_grad():
            latents = model.encode(images.to(accelerator.device)).latent_dist.mode()
            decoded = model.decode(latents).sample.float().cpu()
        model.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
        decibels = float(10 * torch.log10(4.0 / (decoded - images).square().mean()))
        accelerator.print(f"vae step {step}: {decibels:.2f} dB", flush=True)
        model.save_pretrained(run_dir / "vae")

    return train(build_image_vae(), loss_of, settings, accelerator, run_dir / "vae.safetensors", on_save)


def load_image_vae(run_dir: Path) -> AutoencoderKL:
    """The autoencoder of phase vae; raises GenAttnError if it is not there."""
    if not (run_dir / "vae" / "config.json").exists():
        raise GenAttnError(f"phase vae must come first, got no {run_dir / 'vae'}; run train --phases vae")
    return AutoencoderKL.from_pretrained(run_dir / "vae").eval()


def train_joint_transformer(
    run_dir: Path, accelerator: Accelerator, settings: TrainSettings, batch: int = 64, size: Sd3Size | None = None
) -> int:
    """Train text encoders and transformer on latents made as they are needed; returns the steps done.

    For a third of the steps every object is at its usual place, then half of them are (why: `wan.train_transformer`).
    """
    set_seed(settings.seed)
    vae, tokenizer = load_image_vae(run_dir).to(accelerator.device).requires_grad_(False), caption_tokenizer()

    def loss_of(model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        images, captions = draw_stills(batch, generator, settled=1.0 if step < settings.steps // 3 else 0.5)
        latents = vae.encode(images.to(accelerator.device)).latent_dist.mode()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return velocity_loss(model, latents, tokenize_captions(tokenizer, captions), generator)

    return train(TinySd3(size), loss_of, settings, accelerator, run_dir / "transformer.safetensors")


def tokenize_captions(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids int64 [B, 24], as the pipeline makes them."""
    ids: torch.Tensor = tokenizer(
        captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def velocity_loss(model: nn.Module, latents: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the velocity at random noise levels, a tenth of the captions dropped."""
    batch, device = len(latents), latents.device
    sigma = torch.sigmoid(torch.randn(batch, generator=generator))
    sigma = (FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)).to(device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    empty = tokenize_captions(caption_tokenizer(), [""])
    dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
    ids = torch.where(dropped[:, None], empty, ids).to(device)
    missing = MISSING_T5_LENGTHS[int(torch.randint(len(MISSING_T5_LENGTHS), (1,), generator=generator))]
    level = sigma.view(-1, 1, 1, 1)
    predicted = model((1 - level) * latents + level * noise, sigma, ids, missing)
    weight = object_weight(latents[:, :, None])[:, :, 0]
    return ((predicted.float() - (noise - latents)).square() * weight).mean()


def assemble_sd3(run_dir: Path, size: Sd3Size | None = None) -> tuple[StableDiffusion3Pipeline, int]:
    """The pipeline of a run, in float32, and the training steps behind it; raises GenAttnError if a phase is missing."""
    vae, weights = load_image_vae(run_dir), run_dir / "transformer.safetensors"
    if not weights.exists():
        raise GenAttnError(f"phase transformer must come before the export, got no {weights}; train first")
    model = TinySd3(size)
    with safe_open(weights, "pt") as file:
        steps = int(json.loads(file.metadata()["state"])["step"])
        averages = {name.removeprefix("ema."): file.get_tensor(name) for name in file.keys() if name.startswith("ema.")}  # noqa: SIM118
    if {k: v.shape for k, v in model.state_dict().items()} != {k: v.shape for k, v in averages.items()}:
        raise GenAttnError(f"the weights must be of size {size or Sd3Size()}, got others in {run_dir}; say which")
    model.load_state_dict(averages)
    parts: dict[str, Any] = {"text_encoder": model.text_encoder.eval(), "text_encoder_2": model.text_encoder_2.eval()}
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        vae=vae,
        tokenizer=caption_tokenizer(),
        tokenizer_2=caption_tokenizer(),
        text_encoder_3=silent_t5(),
        tokenizer_3=build_tokenizer(),
        **parts,
    )
    return pipeline, steps


def export_sd3(run_dir: Path, folder: Path, defaults: GenerationDefaults, size: Sd3Size | None = None) -> int:
    """Write a run's pipeline to `folder`, whole or not at all, a README.md kept; returns the training steps behind it."""
    pipeline, steps = assemble_sd3(run_dir, size)
    for part in (pipeline.transformer, pipeline.vae):
        for parameter in part.parameters():
            parameter.data = parameter.data.half()
    write_pipeline(pipeline, folder, defaults, run_dir)
    return steps


def run_training(options: argparse.Namespace) -> None:
    """The command `train`."""
    accelerator = Accelerator(cpu=options.cpu, mixed_precision=options.mixed_precision)
    run_dir, device = options.run_dir, device_name(options.cpu)
    common = {"minutes": options.minutes, "seed": options.seed}
    if "vae" in options.phases:
        with journal(run_dir, "vae", device) as done:
            done["steps"] = train_image_vae(
                run_dir, accelerator, TrainSettings(options.vae_steps, learning_rate=1e-3, **common)
            )
    if "transformer" in options.phases:
        settings = TrainSettings(options.steps, learning_rate=options.learning_rate, **common)
        with journal(run_dir, "transformer", device) as done:
            done["steps"] = train_joint_transformer(run_dir, accelerator, settings, options.batch)
    if "export" in options.phases:
        defaults = GenerationDefaults(SIZE, SIZE, 1, options.sampling_steps, options.guidance_scale, 1)
        steps = export_sd3(run_dir, options.out, defaults)
        accelerator.print(f"{options.out}: {steps} steps, {folder_bytes(options.out) / 1e6:.1f} MB")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser, _, training = training_parser("genattn.pipelines.tiny.sd3", __doc__, PHASES, run_training)
    training.add_argument("--vae-steps", type=int, default=3000, help="last step of the autoencoder")
    training.add_argument("--vae-batch", type=int, default=16, help="stills per step of the autoencoder")
    training.add_argument("--steps", type=int, default=30000, help="last step of the transformer")
    training.add_argument("--batch", type=int, default=64, help="stills per step of the transformer")
    training.add_argument("--learning-rate", type=float, default=1e-3, help="peak rate of the transformer")
    training.add_argument("--out", type=Path, default=Path("assets/tiny-sd3"), help="where the pipeline is exported to")
    training.add_argument("--sampling-steps", type=int, default=20, help="denoising steps written as the default")
    training.add_argument("--guidance-scale", type=float, default=3.0, help="guidance scale written as the default")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny.sd3`."""
    run_command(build_parser(), arguments)


if __name__ == "__main__":
    main()
