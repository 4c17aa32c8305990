"""The app's verb `video`: a clip with sparse attention beside the dense one of the same seed, with time, density and PSNR."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from genattn.apps.webui.verbs.cost import cost_line
from genattn.apps.webui.verbs.film_pictures import film_strip, layer_map
from genattn.apps.webui.verbs.job import Job, Update
from genattn.apps.webui.verbs.sampling import ClipForm, chosen_attention, describe_call, open_for, read_seed, sample
from genattn.apps.webui.verbs.session import Model, Session
from genattn.apps.webui.verbs.watched import watched_sparse
from genattn.whole_file import write_picture


def video(
    session: Session,
    prompt: str,
    attention: str = "radial",
    pattern_options: str | None = None,
    dense_steps: float = 0.25,
    dense_layers: int = 1,
    seed: int = 0,
    randomize_seed: bool = False,
    model: str | None = None,
    **form: Any,
) -> Iterator[Update]:
    """Sample a clip densely and sparsely.

    attention: a preset of the session, or a name of `attention_names`, but dense; pattern_options: its settings as a JSON
    object. dense_steps: first steps kept dense, a share (< 1) or a number. form: fields of `ClipForm`. The first update of the
    work says what it will cost. One that holds `dense` or `sparse` (MP4 paths) comes as soon as that clip is there; the last
    has them with `pair` (both in one film), `strip` and `layers` (PNG paths), `seed`, `rows` (one dict a run) and `report`.
    Raises GenAttnError for anything that model, pattern or server cannot serve.
    """
    session.limits.check_prompts(prompt, form.get("negative_prompt"))
    chosen, wanted = session.check_name(model, video=True), ClipForm.read(**form)
    settings = chosen_attention(session, attention, pattern_options, dense_steps, dense_layers)
    drawn = read_seed(seed, randomize_seed)

    def work(job: Job) -> dict[str, Any]:
        return _film(job, session, chosen, wanted, prompt, settings, drawn)

    yield from Job(work, session.lock).updates()


def _film(job: Job, session: Session, model: Model, form: ClipForm, prompt: str, settings: Any, seed: int) -> dict[str, Any]:
    from genattn.apps.sampling.output_files import write_video
    from genattn.apps.sampling.run import own_defaults

    pipe, call = open_for(job, session, model, form)
    fps = float(own_defaults(pipe).get("fps", 16))
    told_cost = cost_line(session, model, form, prompt, settings)
    job.tell("will cost", cost=told_cost)
    run = session.new_run("video")
    schedule = settings.schedule
    # the first pass through a model, a plan and a kernel pays for its set-up; seconds are to be compared
    short = {**call, "num_inference_steps": 1}
    sample(job, pipe, short, prompt, seed, "warming up, dense")
    sample(job, pipe, short, prompt, seed, "warming up, sparse", [settings.pattern], dense_steps=0, dense_layers=0)
    tags = {"prompt": prompt, "seed": seed}
    dense, _ = sample(job, pipe, call, prompt, seed, "dense")
    write_video(run / "dense.mp4", dense.frames, fps, {**tags, "attention": "dense"})
    session.remember_seconds(model.name, call, dense.seconds)
    job.tell("dense clip ready", dense=str(run / "dense.mp4"))
    watched = watched_sparse(pipe, settings.pattern, schedule)
    sparse, told = sample(job, pipe, call, prompt, seed, settings.name, [watched])
    write_video(run / "sparse.mp4", sparse.frames, fps, {**tags, "attention": settings.name})
    # two players drift apart, and the same seed would seem to move differently
    both = np.concatenate([dense.frames, sparse.frames], axis=2)
    write_video(run / "side-by-side.mp4", both, fps, {**tags, "attention": f"dense | {settings.name}"})
    write_picture(film_strip(dense.frames, sparse.frames, settings.name), run / "film-strip.png")
    write_picture(layer_map(watched.pictured()), run / "layers.png")
    rows = [_row("dense", dense, None, dense, model, prompt), _row(settings.name, sparse, told, dense, model, prompt)]
    report = {
        "verb": "video",
        **describe_call(model, pipe, call, prompt, seed),
        "fps": fps,
        "pattern": repr(watched.pattern),
        **({"preset": watched.origin} if watched.origin else {}),
        **schedule,
        "cost": told_cost,
        "runs": rows,
        "attention": told.to_dict(),
        "files": ["dense.mp4", "sparse.mp4", "side-by-side.mp4", "film-strip.png", "layers.png"],
    }
    names = {"dense": "dense.mp4", "sparse": "sparse.mp4", "pair": "side-by-side.mp4"}
    names |= {"strip": "film-strip.png", "layers": "layers.png"}
    files = {name: str(run / file) for name, file in names.items()}
    # all values once more: the page keeps the last update of an example
    return {**files, "seed": seed, "rows": rows, "cost": told_cost, "report": session.write_report(run, report)}


def _row(name: str, result: Any, told: Any, dense: Any, model: Model, prompt: str) -> dict[str, Any]:
    """What one run cost and how near it is to the dense one; the oracle's word for the tiny world."""
    from genattn.apps.sampling.clip_quality import is_tiny_world, psnr, ssim
    from genattn.apps.sampling.generate import oracle_scores

    share = 1.0 if told is None or not told.flops_dense else told.flops / told.flops_dense
    row: dict[str, Any] = {"attention": name, "seconds": round(result.seconds, 3), "density": round(share, 4)}
    if told is not None:
        row["speedup"] = round(dense.seconds / result.seconds, 3)
        row["psnr"] = round(psnr(result.frames, dense.frames), 2)
        row["ssim"] = round(ssim(result.frames, dense.frames), 4)
        row["verdict"] = told.verdict
    row["peak_memory_gb"] = round(result.peak_memory_gb, 3)
    if is_tiny_world(model.source):
        row["oracle"] = oracle_scores(result.frames, prompt)
    return row
