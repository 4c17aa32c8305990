"""Commands that sample, or tell what sampling would do: generate, compare, explain."""

from pathlib import Path
from typing import Annotated

import typer

from genattn.apps import options
from genattn.apps.attention_names import pattern_from_file, pattern_from_name
from genattn.apps.printing import print_clips, print_json, print_lines, print_table
from genattn.errors import GenAttnError


def generate_command(
    prompt: options.Prompt,
    model: options.Model = None,
    negative_prompt: options.NegativePrompt = None,
    frames: options.FrameCount = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    seed: options.Seed = 0,
    attention: options.Attention = "radial",
    pattern_options: options.PatternOptions = None,
    pattern_file: Annotated[Path | None, typer.Option(help="Settings from `genattn plan --auto --out`.")] = None,
    dense_steps: options.DenseSteps = 0.25,
    dense_layers: options.DenseLayers = 1,
    compare_dense: Annotated[bool, typer.Option(help="Run dense attention too, same seed, and compare.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    cpu_offload: options.CpuOffload = None,
    fps: options.Fps = None,
    out: options.Out = Path("out/video.mp4"),
    as_json: options.Json = False,
) -> None:
    """Make a video (or picture) from a prompt, with sparse attention.

    Example: genattn generate --prompt "a red circle moves right on a dark background" --compare-dense --out out.mp4
    """
    from genattn.apps.generate import GenerateRequest, generate
    from genattn.apps.sampling_run import AttentionSettings, SamplingSettings

    name = attention if pattern_file is None else pattern_file.stem
    pattern = pattern_from_name(attention, pattern_options) if pattern_file is None else pattern_from_file(pattern_file)
    chosen = AttentionSettings(name, pattern, dense_steps, dense_layers)
    settings = SamplingSettings(
        model, negative_prompt, frames, height, width, steps, guidance_scale, dtype, device, cpu_offload
    )
    request = GenerateRequest(prompt, out, chosen, settings, seed, compare_dense, fps)
    report = generate(request)
    if as_json:
        print_json(report)
    else:
        print_clips(report)


def compare_command(
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; give it several times for several.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one a line.")] = None,
    held_out: Annotated[int, typer.Option(help="Add so many held-out captions of the tiny world.")] = 0,
    attention: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME@DENSE_STEPS (radial@0.5); give it several times.")
    ] = None,
    model: options.Model = None,
    frames: options.FrameCount = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    seed: options.Seed = 0,
    dense_layers: options.DenseLayers = 1,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="CSV file to append the rows to.")] = None,
    as_json: options.Json = False,
) -> None:
    """Sample the same prompts under several attentions; quality, time and memory with intervals.

    Example: genattn compare --held-out 20 --attention radial --attention radial@0 --out out/compare.csv
    """
    from genattn.apps.bench_rows import append_rows
    from genattn.apps.compare import compare, parse_attention, read_prompts
    from genattn.apps.output_files import check_out
    from genattn.apps.sampling_run import SamplingSettings

    if out is not None:
        check_out(out, (".csv",))
    wanted = [parse_attention(text, dense_layers) for text in attention or ["radial"]]
    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else []), *_held_out_captions(held_out)]
    settings = SamplingSettings(model, None, frames, height, width, steps, guidance_scale, dtype, device)
    rows = compare(texts, wanted, settings, seed)
    if out is not None:
        append_rows(out, rows)
    if as_json:
        print_json(rows)
    else:
        names = [
            "attention",
            "n",
            "seconds",
            "speedup",
            "density",
            "peak_memory_gb",
            "psnr",
            "ssim",
            "colour",
            "shape",
            "motion",
        ]
        print_table(rows, f"{len(texts)} prompts, {rows[0]['device']}", names)


def _held_out_captions(count: int) -> list[str]:
    if count == 0:
        return []
    from genattn.pipelines.tiny_world import caption, sample_scene

    return [caption(sample_scene(10_000 + i, held_out=i % 2 == 1)) for i in range(count)]


def explain_command(
    prompt: options.Prompt = "a red circle moves right on a dark background",
    model: options.Model = None,
    frames: options.FrameCount = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    attention: options.Attention = "radial",
    pattern_options: options.PatternOptions = None,
    dense_steps: options.DenseSteps = 0.25,
    dense_layers: options.DenseLayers = 1,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Say before a run: which sites, what layout and density, predicted work, what stays dense and why.

    Example: genattn explain --attention radial --dense-steps 0.25
    """
    import genattn
    from genattn.apps.sampling_run import AttentionSettings, SamplingSettings, call_arguments, open_pipeline

    chosen = AttentionSettings(attention, pattern_from_name(attention, pattern_options), dense_steps, dense_layers)
    if chosen.pattern is None:
        raise GenAttnError("explain needs a pattern, and dense attention has none; name another --attention")
    settings = SamplingSettings(model, None, frames, height, width, steps, guidance_scale, dtype, device)
    pipe = open_pipeline(settings)
    call = call_arguments(pipe, settings)
    with genattn.apply(pipe, chosen.pattern, dense_steps=chosen.steps_to_keep, dense_layers=dense_layers) as handle:
        found = handle.explain(**call, prompt=prompt, output_type="latent")
    if as_json:
        print_json(found.to_dict())
    else:
        print_lines(found.table())
