"""Train, export and evaluate `tiny-wan`: a stock `WanPipeline` small enough to ship, trained on the tiny world.

    vae          stills, then short clips -> run/vae
    text         captions alone: which word goes with which -> run/text.safetensors
    latents      training clips through the autoencoder -> run/stills, run/clips
    transformer  stills, then single frames from anywhere in a clip, then whole clips
    export       the averaged weights as a pipeline folder in 16 bit
    evaluate     (a command of its own) held-out captions, judged by the oracle

    python -m genattn.pipelines.tiny.wan train --run-dir runs/tiny-wan --cpu
    python -m genattn.pipelines.tiny.wan evaluate --model assets/tiny-wan --count 200

Every phase resumes where it was stopped; `--minutes` stops one by the clock.
"""

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from torch import nn
from transformers import UMT5EncoderModel

import genattn
from genattn import Pattern
from genattn.errors import GenAttnError
from genattn.pipelines.tiny.card import device_name, folder_bytes, journal, write_card
from genattn.pipelines.tiny.curriculum import Curriculum, LatentBatches, draw_step
from genattn.pipelines.tiny.denoiser import DenoiserSize, TinyDenoiser, flow_loss
from genattn.pipelines.tiny.evaluate import FIRST_SEED, Sampling, append_rows, evaluate, evaluation_scenes
from genattn.pipelines.tiny.export import DEFAULTS_FILE, GenerationDefaults, export
from genattn.pipelines.tiny.latents import SHARD, cache_latents, load_latents, measure_latents
from genattn.pipelines.tiny.resume import adopt, start_from
from genattn.pipelines.tiny.text import CaptionReader, build_text_encoder, build_tokenizer
from genattn.pipelines.tiny.vae import CLIP_FRAMES, build_vae, psnr, still_convolutions, training_clips, vae_loss
from genattn.pipelines.training.command import run_command, training_parser
from genattn.pipelines.training.places import POSITION_CHANNELS
from genattn.pipelines.training.trainer import TrainSettings, step_generator, train

PHASES = ("vae", "text", "latents", "transformer", "export")


def train_vae(run_dir: Path, accelerator: Accelerator, settings: TrainSettings, still_steps: int) -> int:
    """Stills until `still_steps`, then clips of five and nine frames; saves run_dir/vae. Returns the steps done."""
    set_seed(settings.seed)
    vae = build_vae()

    def loss_of(model: Any, step: int, generator: torch.Generator) -> torch.Tensor:
        if step < still_steps:
            with still_convolutions(model):
                return vae_loss(model, training_clips(12, 1, 64, generator).to(accelerator.device), generator)
        frames = 5 if step % 2 else 9
        clips = training_clips(20 // frames, frames, 64, generator).to(accelerator.device)
        return vae_loss(model, clips, generator)

    def on_save(model: Any, step: int) -> None:
        shown = [training_clips(4, frames, 64, step_generator(12345, frames)) for frames in (1, 13)]
        stills, clips = (psnr(model, shot.to(accelerator.device)) for shot in shown)
        accelerator.print(f"vae step {step}: {stills:.2f} dB on stills, {clips:.2f} dB on 13 frames", flush=True)
        model.save_pretrained(run_dir / "vae")

    return train(vae, loss_of, settings, accelerator, run_dir / "vae.safetensors", on_save)


def train_text(run_dir: Path, accelerator: Accelerator, settings: TrainSettings, begin_with: Path | None = None) -> int:
    """Teach the text encoder on captions alone which word goes with which (`text.CaptionReader`); saves run_dir/text_encoder.

    `begin_with` is an exported pipeline whose encoder to go on with; its embeddings are held. Returns the steps done.
    """
    set_seed(settings.seed)
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(len(tokenizer))
    if begin_with is not None:
        encoder = UMT5EncoderModel.from_pretrained(begin_with / "text_encoder", dtype=torch.float32)
    reader = CaptionReader(encoder, tokenizer, 0.0 if begin_with is None else 1.0)

    def loss_of(model: Any, step: int, generator: torch.Generator) -> torch.Tensor:
        return model(*(part.to(accelerator.device) for part in reader.draw(128, generator)))

    def on_save(model: Any, step: int) -> None:
        ids, labels = (part.to(accelerator.device) for part in reader.draw(512, step_generator(12345, 0)))
        accelerator.print(f"text step {step}: {model.accuracy(ids, labels):.3f} of the words tell all", flush=True)
        model.text_encoder.save_pretrained(run_dir / "text_encoder")

    return train(reader, loss_of, settings, accelerator, run_dir / "text.safetensors", on_save)


def make_latents(
    run_dir: Path,
    accelerator: Accelerator,
    clips: range,
    stills: range,
    minutes: float,
    clip_frames: int = CLIP_FRAMES,
    settled: tuple[int, int] | None = None,
    pairs: float = 0.15,
) -> tuple[int, int]:
    """Encode shards of training clips and stills, and settled ones; returns how many of the first there are.

    settled: shards of settled clips and of settled stills; None for half as many as of the others.
    pairs: share of scenes with two objects.
    """
    still, moving = settled[1] if settled else (len(stills) + 1) // 2, settled[0] if settled else (len(clips) + 1) // 2
    vae = load_vae(run_dir).to(accelerator.device)
    counts = (
        cache_latents(vae, run_dir / "stills", stills, minutes, frames=1, two_objects=pairs),
        cache_latents(vae, run_dir / "clips", clips, minutes, clip_frames, two_objects=pairs),
    )
    for kind, shards, frames in (("stills", still, 1), ("clips", moving, clip_frames)):
        cache_latents(vae, run_dir / f"settled-{kind}", range(shards), minutes, frames, two_objects=pairs, settled=True)
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


def train_transformer(
    run_dir: Path,
    accelerator: Accelerator,
    settings: TrainSettings,
    curriculum: Curriculum,
    size: DenoiserSize | None = None,
    compile_blocks: bool = False,
    begin_with: Path | None = None,
    on_save: Callable[[nn.Module, int], None] | None = None,
    pattern: Pattern | None = None,
) -> int:
    """Settled stills, then pieces of clips and a whole one now and then, then whole clips: what `curriculum` says.

    Every other step after the stills shows settled scenes: where an object wanders, its shape can hardly be told from its
    caption while the noise hides the place, and shapes are learned last or never; where it does not, they are learned with
    the colours. `begin_with` is an exported pipeline whose weights a run without a checkpoint begins with; an encoder that
    phase text has taught takes the place of its own. With a `pattern` every self-attention is trained through it. Returns the
    steps done.
    """
    set_seed(settings.seed)
    batches = LatentBatches(run_dir)
    model = TinyDenoiser(batches.mean.shape[0] + POSITION_CHANNELS, len(batches.tokenizer), size)
    if begin_with is not None and not (run_dir / "transformer.safetensors").exists():
        start_from(model, begin_with)
    if (run_dir / "text_encoder").exists() and not (run_dir / "transformer.safetensors").exists():
        encoder = UMT5EncoderModel.from_pretrained(run_dir / "text_encoder", dtype=torch.float32)
        model.text_encoder.load_state_dict(encoder.state_dict())
    if compile_blocks:
        model.transformer.compile_repeated_blocks(dynamic=False)

    def loss_of(module: Any, step: int, generator: torch.Generator) -> torch.Tensor:
        latents, ids = draw_step(batches, curriculum, step, generator)
        return flow_loss(module, latents.to(accelerator.device), ids, batches.empty, generator)

    with nullcontext() if pattern is None else genattn.apply(model.transformer, pattern, dense_steps=0, dense_layers=0):
        return train(model, loss_of, settings, accelerator, run_dir / "transformer.safetensors", on_save)


def run_training(options: argparse.Namespace) -> None:
    """The command `train`."""
    accelerator = Accelerator(cpu=options.cpu, mixed_precision=options.mixed_precision)
    run_dir, device, typed = options.run_dir, device_name(options.cpu), changed_options(options)

    def stage(phase: str) -> str:
        return f"{phase}: {options.stage}" if options.stage else phase

    common = {"minutes": options.minutes, "seed": options.seed}
    size = DenoiserSize(patch=options.patch)
    if options.begin_with is not None:
        adopt(run_dir, options.begin_with)
    if "vae" in options.phases:
        settings = TrainSettings(options.vae_steps, learning_rate=8e-4, save_minutes=2.0, **common)
        with journal(run_dir, stage("vae"), device, typed) as done:
            done["steps"] = train_vae(run_dir, accelerator, settings, options.vae_still_steps)
    if "text" in options.phases:
        settings = TrainSettings(options.text_steps, learning_rate=2e-3, decay=0.5, **common)
        with journal(run_dir, stage("text"), device, typed) as done:
            done["steps"] = train_text(run_dir, accelerator, settings, options.begin_with)
    if "latents" in options.phases:
        clips, stills = (range(*shards) for shards in (options.clip_shards, options.still_shards))
        with journal(run_dir, stage("latents"), device, typed) as done:
            shards = make_latents(
                run_dir,
                accelerator,
                clips,
                stills,
                options.minutes,
                options.frames,
                options.settled_shards,
                options.two_objects,
            )
            done["stills"], done["clips"] = (SHARD * count for count in shards)
    if "transformer" in options.phases:
        settings = TrainSettings(options.steps, learning_rate=options.learning_rate, decay=options.decay, **common)
        with journal(run_dir, stage("transformer"), device, typed) as done:
            done["steps"] = train_transformer(
                run_dir, accelerator, settings, curriculum_of(options), size, options.compile, options.begin_with
            )
    if "export" in options.phases:
        defaults = GenerationDefaults(
            frames=options.frames, steps=options.sampling_steps, guidance_scale=options.guidance_scale
        )
        steps = export(run_dir, options.out, defaults, size)
        accelerator.print(f"{options.out}: {steps} steps, {folder_bytes(options.out) / 1e6:.1f} MB")


def curriculum_of(options: argparse.Namespace) -> Curriculum:
    """What the command line says of the transformer's steps."""
    return Curriculum(
        options.still_steps,
        options.frame_steps,
        options.still_batch,
        options.frame_batch,
        options.clip_batch,
        options.window_frames,
        options.whole_every,
        (options.frames - 1) // 4 + 1,
        options.wander_every,
    )


def changed_options(options: argparse.Namespace) -> str:
    """What was typed after `train` beyond the defaults, but for the phases, the limit of time and this machine's folders."""
    usual = vars(build_parser().parse_args(["train", "--run-dir", "."]))
    words: list[str] = []
    for name, value in vars(options).items():
        if name in ("run", "run_dir", "out", "phases", "minutes") or value == usual[name]:
            continue
        words += [f"--{name.replace('_', '-')}"]
        if value is not True:
            parts = value if isinstance(value, list) else [value]
            # a folder's full path says nothing on another machine
            words += [part.name if isinstance(part, Path) and part.is_absolute() else str(part) for part in parts]
    return shlex.join(words)


def run_evaluation(options: argparse.Namespace) -> None:
    """The command `evaluate`: prints a JSON row per split; appends them to a table and writes the card if asked."""
    if not (options.model / "model_index.json").exists():
        raise GenAttnError(f"the model must be a pipeline folder, got {options.model} without model_index.json; export")
    device = "cpu" if options.cpu or not torch.cuda.is_available() else "cuda"
    pipeline = WanPipeline.from_pretrained(options.model).to(device)
    pipeline.set_progress_bar_config(disable=True)
    defaults = GenerationDefaults(**json.loads((options.model / DEFAULTS_FILE).read_text()))
    scale = defaults.guidance_scale if options.guidance_scale is None else options.guidance_scale
    steps = options.sampling_steps or defaults.steps
    sampling = Sampling(steps, scale, options.seed, options.batch, options.max_sequence_length)
    rows = evaluate(pipeline, evaluation_scenes(options.count, options.first_seed), sampling, defaults, options.keep)
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.csv is not None:
        append_rows(options.csv, rows)
    if options.card_from is not None:
        write_card(options.model, options.card_from, rows, options.training_seed)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser, commands, training = training_parser("genattn.pipelines.tiny.wan", __doc__, PHASES, run_training)
    training.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    training.add_argument("--vae-steps", type=int, default=1650, help="last step of the autoencoder")
    training.add_argument("--vae-still-steps", type=int, default=950, help="of these, on stills")
    training.add_argument("--text-steps", type=int, default=1200, help="last step of the text encoder on captions alone")
    training.add_argument("--clip-shards", type=int, nargs=2, default=(0, 64), help="first and end shard of 64 clips")
    training.add_argument("--still-shards", type=int, nargs=2, default=(0, 100), help="the same for stills")
    training.add_argument(
        "--settled-shards", type=int, nargs=2, help="shards of settled clips and of settled stills; default: half as many"
    )
    training.add_argument("--two-objects", type=float, default=0.15, help="share of the scenes that hold two objects")
    training.add_argument("--steps", type=int, default=20000, help="last step of the transformer")
    training.add_argument("--still-steps", type=int, default=1000, help="of these, on stills")
    training.add_argument("--frame-steps", type=int, default=16000, help="step until which the rest are single frames of clips")
    training.add_argument("--still-batch", type=int, default=32, help="stills in a step")
    training.add_argument("--frame-batch", type=int, default=40, help="latent frames in a step of pieces of clips")
    training.add_argument("--clip-batch", type=int, default=8, help="whole clips in a step")
    training.add_argument("--window-frames", type=int, default=1, help="latent frames of every other piece of a clip")
    training.add_argument("--whole-every", type=int, default=3, help="before --frame-steps, every which step is whole clips")
    training.add_argument("--wander-every", type=int, default=2, help="every which step shows objects that stand anywhere")
    training.add_argument("--frames", type=int, default=CLIP_FRAMES, help="frames of a clip, 1 + 4 n")
    training.add_argument("--patch", type=int, choices=(1, 2), default=2, help="latents on each side of a token")
    training.add_argument("--learning-rate", type=float, default=1.3e-3, help="peak rate of the transformer")
    training.add_argument("--decay", type=float, default=0.1, help="share of the steps over which the rate falls")
    training.add_argument("--begin-with", type=Path, help="an exported pipeline to go on from: its autoencoder and weights")
    training.add_argument("--stage", default="", help="what the journal calls this stretch of the phases")
    training.add_argument("--out", type=Path, default=Path("assets/tiny-wan"), help="where the pipeline is exported to")
    training.add_argument("--sampling-steps", type=int, default=25, help="denoising steps written as the default")
    training.add_argument("--guidance-scale", type=float, default=3.0, help="guidance scale written as the default")
    judging = commands.add_parser("evaluate", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    judging.set_defaults(run=run_evaluation)
    judging.add_argument("--model", type=Path, default=Path("assets/tiny-wan"), help="the exported pipeline")
    judging.add_argument("--count", type=int, default=200, help="captions, half of them of unseen combinations")
    judging.add_argument("--first-seed", type=int, default=FIRST_SEED, help="first seed of the scenes asked for")
    judging.add_argument("--seed", type=int, default=0, help="first seed of the noise")
    judging.add_argument("--batch", type=int, default=8, help="clips sampled at a time")
    judging.add_argument("--sampling-steps", type=int, help="denoising steps; the model's default if not given")
    judging.add_argument("--guidance-scale", type=float, help="guidance scale; the model's default if not given")
    judging.add_argument("--max-sequence-length", type=int, default=512, help="tokens that prompts are padded to")
    judging.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    judging.add_argument("--keep", type=Path, help="file of verdicts as they come; a stopped evaluation goes on from it")
    judging.add_argument("--csv", type=Path, help="table to append the rows to")
    judging.add_argument("--card-from", type=Path, help="run folder from which to write the model card")
    judging.add_argument("--training-seed", type=int, default=0, help="seed of the training, for the card")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny.wan`."""
    run_command(build_parser(), arguments)


if __name__ == "__main__":
    main()
