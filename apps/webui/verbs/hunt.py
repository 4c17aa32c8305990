"""The app's verbs `hunt` and `save_set`: search heads for an objective, watched while it runs.

Objectives are names from a list: a visitor must not be able to name a module to import or a file to read.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from genattn.apps.webui.verbs.cost import call_of, seconds_told, size_of
from genattn.apps.webui.verbs.head_map import draw_head_map
from genattn.apps.webui.verbs.job import Job, Update
from genattn.apps.webui.verbs.limits import number, whole
from genattn.apps.webui.verbs.sampling import ClipForm
from genattn.apps.webui.verbs.session import Model, Session
from genattn.errors import GenAttnError
from genattn.guidance.headhunter.hunter import HeadHunter
from genattn.guidance.headhunter.objectives import STATISTICS, load_objective
from genattn.guidance.headhunter.search import SearchSettings
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.heads.names import Head, all_heads, head_name, resolve_heads
from genattn.pipelines.tiny.world import parse_caption

CAPTION_MATCH = "caption match (tiny world)"
OBJECTIVES = (CAPTION_MATCH, *STATISTICS, "steadiness")


def hunt(
    session: Session,
    prompts: str,
    objectives: Sequence[str] = (CAPTION_MATCH,),
    pool: str | None = None,
    rounds: int = 1,
    top_k: int = 3,
    u: float = 1.0,
    scale: float = 3.0,
    target: str = "identity",
    batch: int = 4,
    sheet: bool = True,
    model: str | None = None,
    **form: Any,
) -> Iterator[Update]:
    """Search the heads whose perturbation guides best.

    prompts: one a line. objectives: of `OBJECTIVES`, all of weight 1. pool: heads to choose from, all by default. sheet: draw
    every head's picture too. form: steps, height, width, guidance_scale. Updates hold `map` (PIL image of the scores so far)
    and `latest` (uint8 picture just made); the last one `head_set` (JSON path), `heads` (names), `sheet` (PNG path or None),
    `rounds` (rows), `run` and `report`. Raises GenAttnError for anything that model or server cannot serve.
    """
    lines = [line.strip() for line in (prompts or "").splitlines() if line.strip()]
    session.limits.check_prompts(*(lines or [""]))
    unknown = sorted(set(objectives or ()) - set(OBJECTIVES))
    if unknown or not objectives:
        raise GenAttnError(f"objectives must be some of {', '.join(OBJECTIVES)}, got {unknown or 'none'}; choose one")
    strange = [line for line in lines if CAPTION_MATCH in objectives and parse_caption(line) is None]
    if strange:
        raise GenAttnError(
            f"the oracle judges captions of the tiny world, got {strange[0]!r}; write e.g. "
            "'a red circle moves right on a dark background', or choose another objective"
        )
    chosen, wanted = hunted_model(session, model), ClipForm.read(**form)
    search = search_of(objectives, len(lines), rounds, top_k)
    settings: dict[str, Any] = {
        "u": number("u", u),
        "scale": number("scale", scale),
        "target": target,
        "batch": whole("batch", batch, 1),
        "rounds": search.rounds,
        "top_k": search.top_k,
    }
    session.limits.at_most("candidates a batch", settings["batch"], 16)

    def work(job: Job) -> dict[str, Any]:
        return _hunt(job, session, chosen, wanted, lines, list(objectives), pool, search, settings, sheet)

    yield from Job(work, session.lock).updates()


def hunted_model(session: Session, name: str | None) -> Model:
    """The model of that name; without one a picture model where there is one."""
    return session.check_name(name, video=name in session.names(video=True) or not session.names(video=False))


def search_of(objectives: Sequence[str], prompts: int, rounds: Any, top_k: Any) -> SearchSettings:
    """The search that the form's fields ask for; raises GenAttnError for what they cannot be."""
    whole_rounds, whole_heads = whole("rounds", rounds, 1), whole("heads per round", top_k, 1)
    return SearchSettings(dict.fromkeys(objectives, 1.0), prompts, rounds=whole_rounds, top_k=whole_heads)


def _hunt(
    job: Job,
    session: Session,
    model: Model,
    form: ClipForm,
    prompts: list[str],
    objectives: list[str],
    pool: str | None,
    search: SearchSettings,
    settings: dict[str, Any],
    sheet: bool,
) -> dict[str, Any]:
    from genattn.apps.webui.verbs.sampling import open_for
    from genattn.guidance.headhunter.atlas import HeadAtlas
    from genattn.seam.sites import denoisers

    pipe, call = open_for(job, session, model, form)
    layers = session.layers(model)
    heads, pictures = _pictures(session, layers, pool, search, sheet)
    told_cost = hunt_cost(session, model, form, pool, search, sheet)
    job.tell("will cost", cost=told_cost)
    run = session.new_run("hunt")
    job.tell("hunting", 0, pictures, run=run.name)
    found = {name: load_objective(_OBJECTIVE_SOURCES.get(name, name)) for name in objectives}
    hunter = WatchedHunter(
        pipe, found, prompts, log=run / "hunt.jsonl", pool=heads, call=call, watcher=job, pictures=pictures, **settings
    )
    with job.watching(*denoisers(pipe).values()):
        head_set = hunter.run()
        contact = None
        if sheet:
            job.tell("drawing every head's picture", hunter.made, pictures)
            atlas = HeadAtlas(hunter, run / "atlas")
            atlas.draw()
            contact = str(atlas.contact_sheet())
    path = head_set.save(run / "heads.json")
    rows = [
        {"round": i + 1, "heads": ", ".join(r["added"]), "score": round(r["score"], 4), **r["means"]}
        for i, r in enumerate(head_set.notes["rounds"])
    ]
    report = {"verb": "hunt", "model": model.name, "prompts": prompts, "seeds": hunter.seeds, "call": call}
    files = ["heads.json", *([str(Path(contact).relative_to(run))] if contact else [])]
    report |= {
        **settings,
        "files": files,
        "rounds": rows,
        "heads": head_set.names(),
        "baseline": head_set.notes["baseline"],
        "stopped": head_set.notes["stopped"],
    }
    return {
        "map": draw_head_map(layers, head_set.heads, head_set.scores),
        "head_set": str(path),
        "heads": ",".join(head_name(head) for head in head_set.heads),
        "sheet": contact,
        "rounds": rows,
        "run": run.name,
        "report": session.write_report(run, report),
        "cost": told_cost,
    }


def hunt_cost(session: Session, model: Model, form: ClipForm, pool: str | None, search: SearchSettings, sheet: bool) -> str:
    """One line for people: how many pictures a hunt makes. Raises GenAttnError for what model or server cannot serve."""
    _, call = call_of(session, model, form)
    heads, pictures = _pictures(session, session.layers(model), pool, search, sheet)
    what = f"{len(heads)} heads: at most {pictures:,} guided pictures of {call['num_inference_steps']} steps"
    return " · ".join((size_of(call), what, seconds_told(session.seconds_of(model.name, call), "picture without guidance")))


def _pictures(
    session: Session, layers: dict[int, int], pool: str | None, search: SearchSettings, sheet: bool
) -> tuple[list[Head], int]:
    """(heads to choose from, pictures that the search and its contact sheet make at most)."""
    heads = list(resolve_heads(pool, layers)) if pool and pool.strip() else all_heads(layers)
    pictures = search.trials(len(heads))["full"] + (len(heads) + 1 if sheet else 0)
    session.limits.at_most("pictures a hunt", pictures, session.limits.hunt_pictures)
    return heads, pictures


_OBJECTIVE_SOURCES = {CAPTION_MATCH: "genattn.pipelines.tiny.oracle_objective:caption_match"}


class WatchedHunter(HeadHunter):
    """A hunter that shows a job the scores and pictures as they come.

    watcher: told after every batch. pictures: how many there will be at most.
    """

    def __init__(self, *args: Any, watcher: Job, pictures: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.watcher, self.pictures, self.made = watcher, pictures, 0
        self._sums: dict[Head, list[float]] = {}
        self._plain: dict[int, float] = {}

    def evaluate(self, chunk: Any) -> list[dict[str, float]]:
        """Scores of trials; those of single heads go on the map, against the plain picture of their prompt."""
        scores = super().evaluate(chunk)
        for trial, found in zip(chunk, scores):
            mean = sum(found.values()) / len(found)
            if not trial.heads:
                self._plain[trial.prompt] = mean
            elif len(trial.heads) == 1:
                self._sums.setdefault(trial.heads[0], []).append(mean - self._plain.get(trial.prompt, 0.0))
        self._show()
        return scores

    def guided(self, prompt: int, picked: Any) -> Any:
        """Samples of one prompt; the last of them is shown."""
        samples = super().guided(prompt, picked)
        self.made += len(picked)
        frame = samples[-1] if samples.ndim == 4 else samples[-1][samples.shape[1] // 2]
        self.watcher.tell("hunting", self.made, self.pictures, latest=(frame.movedim(0, -1) * 255).round().byte().numpy())
        return samples

    def _show(self) -> None:
        scores = {head: sum(found) / len(found) for head, found in self._sums.items()}
        self.watcher.tell("hunting", self.made, self.pictures, map=draw_head_map(self.layers, {}, scores))


def save_set(session: Session, run: str, name: str = "heads", keep: int | None = None) -> tuple[str, HeadSet]:
    """The head set of a hunt under a name of one's own, its `keep` best heads only when asked; (path, set).

    Raises GenAttnError for a run that found none, or a name that is no file name.
    """
    folder = session.run_folder(run)
    if not (folder / "heads.json").is_file():
        raise GenAttnError(f"run {run!r} has found no head set yet; let the hunt end first")
    plain = "".join(c for c in (name or "").strip() if c.isalnum() or c in "-_")
    if not plain or plain != (name or "").strip() or len(plain) > 60:
        raise GenAttnError(f"the name must be letters, digits, - and _ only, got {name!r}; choose another")
    found = HeadSet.load(folder / "heads.json")
    if keep is not None:
        found = found.top(whole("heads to keep", keep, 1))
    (folder / "sets").mkdir(exist_ok=True)
    return str(found.save(folder / "sets" / f"{plain}.json")), found
