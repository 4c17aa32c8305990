"""Commands that sample, or tell what sampling would do: generate, compare, explain."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genattn.apps.cli import options
from genattn.apps.cli.printing import print_clips, print_json, print_lines, print_table
from genattn.apps.cli.stopping import same_command_goes_on, say_when_stopped
from genattn.errors import GenAttnError
from genattn.one_writer import only_writer

if TYPE_CHECKING:
    from genattn.apps.sampling.guidance_options import GuidanceSettings
    from genattn.apps.sampling.run import AttentionSettings, SamplingSettings


@options.sampling_options(model=options.FirstModel)
@options.attention_options(own=True)
@options.guidance_options()
def generate_command(
    settings: "SamplingSettings",
    attention: "AttentionSettings",
    guidance: "GuidanceSettings",
    prompt: Annotated[list[str] | None, typer.Option(help="What to show. Repeat the option for several clips.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one per line.")] = None,
    seed: options.Seed = 0,
    count: Annotated[int, typer.Option(help="Clips per prompt, with the seeds SEED, SEED + 1 and so on.", min=1)] = 1,
    compare_dense: Annotated[bool, typer.Option(help="Also run dense attention from the same seed, and compare.")] = False,
    fps: options.Fps = None,
    out: options.Out = Path("out/video.mp4"),
    as_json: options.Json = False,
) -> None:
    """Make a video (or picture) from a prompt, with sparse attention.

    Several prompts or seeds are written as NAME-1, NAME-2 and so on. On long runs a preview of the first frame grows beside
    --out while the steps go on.

    Example: genattn generate --prompt "a red circle moves right on a dark background" --compare-dense --out out.mp4
    """
    from genattn.apps.sampling.first_run import first_run
    from genattn.apps.sampling.generate import GenerateRequest, generate_all, numbered
    from genattn.apps.sampling.prompt_file import read_prompts

    settings, attention = first_run(settings, attention)
    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not texts:
        raise GenAttnError("generate needs something to show; give --prompt or a --prompts file")
    wanted = [(text, seed + i) for text in texts for i in range(count)]
    guided = replace(attention, guidance=guidance)
    requests = [
        GenerateRequest(text, path, guided, settings, each, compare_dense, fps)
        for (text, each), path in zip(wanted, numbered(out, len(wanted)))
    ]
    reports = generate_all(requests)
    if as_json:
        print_json(reports[0] if len(reports) == 1 else reports)
    else:
        for report in reports:
            print_clips(report)


@options.sampling_options()
def compare_command(
    settings: "SamplingSettings",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt. Repeat the option for several.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one per line.")] = None,
    held_out: Annotated[int, typer.Option(help="Add this many captions that the tiny models were not trained on.", min=0)] = 0,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME, NAME@DENSE_STEPS (radial@0.5) or neighborhood:WINDOW/STRIDE "
            "(neighborhood:8x8x8/4x4x4). Repeat the option for several."
        ),
    ] = None,
    dense_layers: options.OwnDenseLayers = None,
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="CSV file to append the rows to.")] = None,
    as_json: options.Json = False,
) -> None:
    """Run the same prompts with several kinds of attention, and compare quality, time and memory, with 95 % intervals.

    With --out, the same command goes on after a stop from the prompts that were done.

    Example: genattn compare --held-out 20 --attention radial --attention radial@0 --out out/compare.csv
    """
    from genattn import __version__
    from genattn.apps.cli.progress import progress_bar
    from genattn.apps.sampling.compare import compare, parse_attention
    from genattn.apps.sampling.measured_rows import append_rows, check_rows, ends_with
    from genattn.apps.sampling.prompt_file import read_prompts
    from genattn.apps.tuning.journal import Journal

    wanted = [parse_attention(text, dense_layers) for text in attention or ["radial"]]
    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else []), *held_out_captions(held_out)]
    if out is None:
        with progress_bar("clips") as on_sample:
            rows = compare(texts, wanted, settings, seed, on_sample)
    else:
        journal = Path(f"{out}.journal.jsonl")
        same_command_goes_on(journal)
        check_rows(out)
        request = {"prompts": texts, "seed": seed, "dense_layers": dense_layers, **settings.request(), "genattn": __version__}
        with only_writer(out, "--out"), progress_bar("clips") as on_sample:
            rows = compare(texts, wanted, settings, seed, on_sample, Journal(journal, request))
            if not ends_with(out, rows):
                append_rows(out, rows)
            say_when_stopped(f"stopped when all was done; the rows are in {out}")
            journal.unlink(missing_ok=True)
    if as_json:
        print_json(rows)
    else:
        print_table(rows, f"{len(texts)} prompts, {rows[0]['device']}", _COMPARED)


_COMPARED = ("attention", "n", "seconds", "speedup", "density", "peak_memory_gb", "psnr", "ssim", "colour", "shape", "motion")


def held_out_captions(count: int) -> list[str]:
    """Captions that no tiny model was trained on."""
    if count == 0:
        return []
    from genattn.pipelines.tiny.world import caption, sample_scene

    return [caption(sample_scene(10_000 + i, held_out=i % 2 == 1)) for i in range(count)]


@options.sampling_options()
@options.attention_options()
def explain_command(
    settings: "SamplingSettings",
    attention: "AttentionSettings",
    prompt: options.Prompt = "a red circle moves right on a dark background",
    as_json: options.Json = False,
) -> None:
    """Tell before a run what it would do: which layers run sparse, how much they compute, what stays dense and why.

    Example: genattn explain --attention radial --dense-steps 0.25
    """
    import genattn
    from genattn.apps.sampling.run import call_arguments, open_pipeline, refuse_early

    if attention.pattern is None:
        raise GenAttnError("explain needs a pattern, and dense attention has none; name another --attention")
    refuse_early(settings)
    pipe = open_pipeline(settings)
    call = call_arguments(pipe, settings)
    with genattn.apply(pipe, attention.pattern, **attention.schedule) as handle:
        found = handle.explain(**call, prompt=prompt, output_type="latent")
    if as_json:
        print_json(found.to_dict())
    else:
        print_lines(found.table())
