"""The command about training: finetune."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from genattn.apps.cli import options
from genattn.apps.cli.printing import print_json, print_lines
from genattn.apps.cli.stopping import same_command_goes_on
from genattn.errors import GenAttnError


def finetune_command(
    data: Annotated[
        Path, typer.Option(help="Folder of clips with .txt captions or metadata.jsonl/.csv, or a webdataset .tar.")
    ],
    model: options.Model = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run. An unfinished run in it goes on.")] = Path(
        "out/finetune"
    ),
    attention: options.Attention = "radial",
    pattern_options: options.PatternOptions = None,
    frames_factor: Annotated[float, typer.Option(help="Length in multiples of what the model was made for.")] = 4.0,
    frames: Annotated[int | None, typer.Option("--frames", help="Length in frames, instead of --frames-factor.")] = None,
    height: options.Height = None,
    width: options.Width = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of the LoRA on query, key, value and output.")] = 128,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    minutes: Annotated[
        float, typer.Option(help="Stop after this many minutes; default: never. The same command goes on.", show_default=False)
    ] = 1e9,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-4,
    batch: Annotated[int, typer.Option(help="Clips per step on each GPU.")] = 1,
    dense_layers: Annotated[int, typer.Option(help="First blocks kept dense while training.")] = 2,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations: less memory, a third more time.")] = True,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    context_parallel: Annotated[int, typer.Option(help="GPUs that share one clip's tokens.")] = 1,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints and samples.")] = 10.0,
    sample_prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt to draw at every checkpoint. Repeat the option for several.")
    ] = None,
    sample_steps: Annotated[int | None, typer.Option(help="Denoising steps of the samples; default: the model's.")] = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Train a LoRA for longer videos with sparse attention. Diffusers' own `load_lora_weights` loads it.

    Example: genattn finetune --model assets/tiny-wan --data clips --attention radial --frames-factor 2 --lora-rank 16
    """
    from accelerate import PartialState

    from genattn.apps.sampling.attention_names import pattern_from_name
    from genattn.apps.sampling.load_pipeline import load_pipeline
    from genattn.apps.sampling.output_files import check_folder
    from genattn.apps.sampling.run import default_size
    from genattn.pipelines.finetune.cache import ClipSize
    from genattn.pipelines.finetune.data import find_clips
    from genattn.pipelines.finetune.tune import CHECKPOINT, FinetuneSettings, finetune, longer, trainable
    from genattn.pipelines.training.trainer import TrainSettings

    same_command_goes_on(out / CHECKPOINT)
    check_folder(out, "--out")
    if not 0 <= seed < 2**32:
        raise GenAttnError(f"--seed must lie in 0 to {2**32 - 1} for a training, got {seed}")
    for name, value in (("--frames", frames), ("--height", height), ("--width", width)):
        if value is not None and value < 1:
            raise GenAttnError(f"{name} must be >= 1, got {value}; leave it out for the model's own")
    pattern = pattern_from_name(attention, pattern_options)
    dataset = find_clips(data)
    pipe = load_pipeline(model, dtype, device)
    own = default_size(pipe)
    if "num_frames" not in own:
        raise GenAttnError(f"{type(pipe).__name__} makes pictures; finetune is for video models")
    length = frames or longer(trainable(pipe), own["num_frames"], frames_factor)
    size = ClipSize(length, height or own["height"], width or own["width"])
    training = TrainSettings(steps, minutes, learning_rate, seed=seed, ema=0.98, save_minutes=save_minutes)
    settings = FinetuneSettings(
        size,
        lora_rank,
        dense_layers=dense_layers,
        batch=batch,
        gradient_checkpointing=gradient_checkpointing,
        mixed_precision=mixed_precision,
        context_parallel=context_parallel,
        training=training,
    )
    speaks = PartialState().is_main_process  # of data-parallel processes one speaks and writes
    if speaks and not as_json:
        print_lines(f"{data}: {dataset.summary()}", f"training at {size.frames} frames of {size.height} x {size.width}")

    def draw_samples(pipe: Any, step: int) -> None:
        for index, prompt in enumerate(sample_prompt or []):
            _draw(pipe, prompt, size, seed + index, sample_steps, out / "samples" / f"step-{step:06d}-{index}.mp4")

    result = finetune(pipe, dataset, pattern, settings, out, draw_samples)
    if as_json and speaks:
        print_json(asdict(result))
    elif speaks:
        lines = [f"skipped {name}: {reason}" for name, reason in result.skipped]
        print_lines(*lines, result.sparse, f"{result.steps} steps on {result.clips} clips; load {result.weights}")


def _draw(pipe: Any, prompt: str, size: Any, seed: int, steps: int | None, path: Path) -> None:
    """One sample as a video file."""
    import torch
    from accelerate import PartialState

    from genattn.apps.sampling.output_files import write_video
    from genattn.apps.sampling.run import SamplingSettings, call_arguments, own_defaults, to_uint8

    wanted = SamplingSettings(frames=size.frames, height=size.height, width=size.width, steps=steps)
    call = call_arguments(pipe, wanted)
    noise = torch.Generator().manual_seed(seed)
    frames = pipe(**call, prompt=prompt, generator=noise, output_type="np").frames[0]
    if not PartialState().is_main_process:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"prompt": prompt, "seed": seed, **call}
    write_video(path, to_uint8(frames), float(own_defaults(pipe).get("fps", 16)), told)
