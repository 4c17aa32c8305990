"""The app's verb `image`: one picture with and without guidance by perturbed heads, from the same seed."""

from collections.abc import Iterator
from typing import Any

from genattn.apps.webui.verbs.cost import call_of, seconds_told, size_of
from genattn.apps.webui.verbs.job import Job, Update
from genattn.apps.webui.verbs.limits import number
from genattn.apps.webui.verbs.sampling import ClipForm, describe_call, open_for, read_seed, sample
from genattn.apps.webui.verbs.session import Model, Session
from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.heads.names import resolve_heads


def image(
    session: Session,
    prompt: str,
    heads: str,
    u: float = 0.5,
    scale: float = 3.0,
    target: str = "identity",
    seed: int = 0,
    randomize_seed: bool = False,
    model: str | None = None,
    **form: Any,
) -> Iterator[Update]:
    """Sample a picture plain and guided.

    heads: names such as "L2H1,L4H0:0.3". u: how far they are drawn to `target`, in [0, 1]. scale: guidance scale.
    form: fields of `ClipForm`. The first update of the work says what it will `cost`; the last one holds `pair` (two PNG
    paths: without, with), `seed` and `report`.
    Raises GenAttnError for anything that model, heads or server cannot serve.
    """
    session.limits.check_prompts(prompt, form.get("negative_prompt"))
    chosen, wanted = session.check_name(model, video=False), ClipForm.read(**form)
    strength, weight, number_drawn = number("u", u), number("scale", scale), read_seed(seed, randomize_seed)
    if not isinstance(heads, str) or not heads.strip():
        raise GenAttnError("choose at least one head: click on the map, or write names such as L2H1,L4H0")

    def work(job: Job) -> dict[str, Any]:
        return _draw(job, session, chosen, wanted, prompt, heads, strength, weight, target, number_drawn)

    yield from Job(work, session.lock).updates()


def _draw(
    job: Job,
    session: Session,
    model: Model,
    form: ClipForm,
    prompt: str,
    heads: str,
    u: float,
    scale: float,
    target: str,
    seed: int,
) -> dict[str, Any]:
    from genattn.apps.sampling.clip_quality import is_tiny_world, psnr
    from genattn.apps.sampling.generate import oracle_scores
    from genattn.apps.sampling.output_files import write_image
    from genattn.guidance.softpag.softpag import SoftPAG

    pipe, call = open_for(job, session, model, form)
    told_cost = image_cost(session, model, form)
    job.tell("will cost", cost=told_cost)
    weights = resolve_heads(heads, session.layers(model), u)
    plugin = SoftPAG(weights, u=u, scale=scale, target=target)
    run = session.new_run("image")
    plain, _ = sample(job, pipe, call, prompt, seed, "without guidance")
    session.remember_seconds(model.name, call, plain.seconds)
    guided, _ = sample(job, pipe, call, prompt, seed, "guided", [plugin])
    report = {"verb": "image", **describe_call(model, pipe, call, prompt, seed)}
    report |= {"heads": heads, "u": u, "scale": scale, "target": target, "guidance": plugin.describe()}
    runs, files = [], []
    for name, result in (("without", plain), ("guided", guided)):
        path = run / f"{name}.png"
        write_image(path, result.frames[0], {"prompt": prompt, "seed": seed, "heads": heads if name == "guided" else ""})
        row = {"picture": name, "seconds": round(result.seconds, 3), "peak_memory_gb": round(result.peak_memory_gb, 3)}
        if is_tiny_world(model.source):
            row["oracle"] = oracle_scores(result.frames, prompt)
        runs.append(row)
        files.append(str(path))
    runs[1]["psnr"] = round(psnr(guided.frames, plain.frames), 2)
    report = session.write_report(run, report | {"runs": runs, "files": [f.rsplit("/", 1)[-1] for f in files]})
    return {"pair": tuple(files), "seed": seed, "report": report, "cost": told_cost}


def image_cost(session: Session, model: Model, form: ClipForm) -> str:
    """One line for people: what both pictures cost. Raises GenAttnError for what model or server cannot serve."""
    _, call = call_of(session, model, form)
    steps = f"2 pictures of {call['num_inference_steps']} steps; the guided one runs the model once more in each"
    return " · ".join((size_of(call), steps, seconds_told(session.seconds_of(model.name, call), "picture without guidance")))


def read_head_set(session: Session, path: str, model: str | None = None) -> HeadSet:
    """An uploaded head set that fits the image model; raises GenAttnError for another file, size or model."""
    file = session.limits.check_upload(path, (".json",))
    found = HeadSet.load(file)
    found.check_model(session.layers(session.check_name(model, video=False)))
    return found
