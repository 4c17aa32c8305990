"""The command profile: what each layer and head of one's own model looks at, measured once, as a map for later runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genattn.apps.cli import options
from genattn.apps.cli.printing import print_json, print_lines, print_table
from genattn.apps.cli.progress import progress_bar
from genattn.apps.cli.stopping import same_command_goes_on
from genattn.apps.sampling.prompt_file import read_prompts

if TYPE_CHECKING:
    from genattn.apps.sampling.run import SamplingSettings


@options.sampling_options(model=options.FirstModel)
def profile_command(
    prompts: Annotated[Path, typer.Option(help="A text file with at least two prompts, one per line.")],
    settings: "SamplingSettings",
    target_density: Annotated[float, typer.Option(help="Share of the scores that the map visits, in (0, 1].")] = 0.3,
    samples: Annotated[int, typer.Option(help="Queries per block of tokens that are computed exactly.")] = 8,
    seed: options.Seed = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="The map to write. After a stop the same command goes on.")] = Path(
        "out/map.safetensors"
    ),
    picture: Annotated[Path | None, typer.Option(help="Draw the map: .png, .svg or .pdf.")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure what each head of a model looks at, on a few prompts, and write it as a map for `genattn generate
    --attention MAP`.

    Example: genattn profile --prompts captions.txt --target-density 0.3 --out out/map.safetensors --picture out/map.png
    """
    import torch

    from genattn.apps.sampling.first_run import first_model
    from genattn.apps.sampling.load_pipeline import shipped_model
    from genattn.apps.sampling.output_files import check_out
    from genattn.apps.sampling.run import call_arguments, open_pipeline
    from genattn.profiling.draw import draw_profile
    from genattn.profiling.profile import profile, unfinished

    same_command_goes_on(unfinished(out))
    check_out(out, (".safetensors",))
    if picture is not None:
        check_out(picture, (".png", ".svg", ".pdf"), "--picture")
    texts, settings = read_prompts(prompts), first_model(settings)
    pipe = open_pipeline(settings)
    pipe.set_progress_bar_config(disable=True)
    call = call_arguments(pipe, settings)

    def run(prompt: str) -> Any:
        return pipe(**call, prompt=prompt, generator=torch.Generator().manual_seed(seed), output_type="latent")

    def draw(found: Any) -> None:
        if picture is not None:
            draw_profile(found.map, picture)

    given = {**settings.request(), "seed": seed}
    with progress_bar("runs") as tell:
        found = profile(pipe, run, texts, target_density, out, samples=samples, progress=tell, settings=given, written=draw)
    rows = found.rows()
    if as_json:
        print_json({"map": str(found.path), "density": found.density, "prompts": len(texts), "layers": rows})
        return
    title = f"{found.map.header.model}: {found.density:.1%} of the scores, means stand in for the rest"
    print_table([{name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()} for row in rows], title)
    print_lines(f"map: {found.path}", *([f"picture: {picture}"] if picture is not None else []))
    print_lines(f"use it: genattn generate --model {settings.model or shipped_model()} --attention {found.path} --prompt ...")
