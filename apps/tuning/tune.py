"""`genattn tune`: try the ladder of patterns on one's own model and prompts, and keep the settings that reach a goal.

profile -> everything sparse, first prompt -> out: what is beaten -> the rest also with a dense start -> further prompts
dense  a  b  c | dense  d  e  f | ...        a dense run stands beside every few settings

Speed is a ratio of seconds: by the clock on an accelerator, of the processor on a CPU. There whatever else runs on the machine
changes the clock from run to run by more than the settings differ.

out/settings.json    what `--settings`, "settings:PATH", the app and ComfyUI read; map.safetensors beside it where it needs one
out/front.png        speed against nearness of all that was tried
out/journal.jsonl    every finished run; the same command goes on from it, and another goal costs only what it adds
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import genattn
from genattn.apps.sampling.clip_quality import is_tiny_world, psnr, ssim
from genattn.apps.sampling.generate import oracle_scores
from genattn.apps.sampling.measured_rows import machine_of, provenance
from genattn.apps.sampling.output_files import check_folder
from genattn.apps.sampling.pipeline_calls import sample_frames
from genattn.apps.sampling.run import (
    DENSE,
    AttentionSettings,
    RunResult,
    SamplingSettings,
    call_arguments,
    open_pipeline,
    refuse_early,
    run_once,
    warm_up,
)
from genattn.apps.tuning.candidates import DENSITIES, FAMILIES, Ground, candidates, check_wanted, with_dense_start
from genattn.apps.tuning.draw import draw_front
from genattn.apps.tuning.goal import Goal, Row, choose, front, hopeless, nearest_miss, still_running, summed
from genattn.apps.tuning.journal import Journal
from genattn.errors import GenAttnError
from genattn.fingerprint import named_file, pipeline_fingerprint, place_of
from genattn.one_writer import only_writer
from genattn.patterns.pattern import Pattern
from genattn.patterns.profiled import ProfiledPattern
from genattn.planning.ladder import Model
from genattn.profiling.profile import LEAST_PROMPTS, profile, unfinished
from genattn.reading import whole
from genattn.seam.named import describe_model
from genattn.seam.schedule import Schedule
from genattn.seam.settings_file import save_settings
from genattn.seam.sites import denoisers
from genattn.seam.sparse_plugin import SparsePlugin

SETTINGS, PICTURE, JOURNAL, MAP = "settings.json", "front.png", "journal.jsonl", "map.safetensors"
MAP_BEFORE = "map-before.safetensors"
BEFORE = "settings-before.json"  # what an earlier goal chose, where a later one is missed
JUDGED = ("colour", "shape", "motion", "size")
BESIDE_DENSE = 3  # settings for each dense run
PROFILE_PROMPTS, PROFILE_SEED = 4, 1_000_003  # the map is not made from the noise that it is judged on
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tuned:
    """What was found. chosen: None where nothing reaches the goal; why says so. rows: all that was measured."""

    chosen: Row | None
    why: str
    rows: tuple[Row, ...]
    folder: Path

    @property
    def front(self) -> list[Row]:
        """The rows that no other beats in both speed and nearness, slowest first."""
        return front(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "chosen": None if self.chosen is None else self.chosen.to_dict(),
            "why": self.why,
            "settings": None if self.chosen is None else str(self.folder / SETTINGS),
            "picture": str(self.folder / PICTURE),
            "front": [row.name for row in self.front],
            "tried": [row.to_dict() for row in self.rows],
        }


def tune(
    settings: SamplingSettings,
    prompts: Sequence[str],
    goal: Goal,
    out: Path = Path("out/tuned"),
    *,
    seed: int = 0,
    families: Sequence[str] = FAMILIES,
    densities: Sequence[float] = DENSITIES,
    profile_map: Path | None = None,
    tell: Tell = lambda done, total, what: None,
) -> Tuned:
    """Measure on `settings.model`, and write what reaches `goal` into the folder `out`.

    Args:
        prompts: at least one, two for profiled maps; prompt i runs with seed + i, dense and sparse from the same noise.
        families: which of candidates.FAMILIES to try. densities: shares of the scores, in (0, 1).
        profile_map: a map of this model, in place of profiling it here.
        tell: called with (runs done, runs expected, what runs next); the expectation falls as settings drop out.

    Raises:
        GenAttnError, before a model is loaded: no prompts, shares or families that are none, an oracle asked of a model that
        has none, a folder that cannot be written or is in use, a journal of another request. After: what the model refuses.
    """
    texts = list(prompts)
    _refuse(settings, texts, goal, families, densities)
    refuse_early(settings)
    if profile_map is not None:
        ProfiledPattern(str(profile_map))
    check_folder(out, "--out")
    request = {"prompts": texts, "seed": seed, "map": None if profile_map is None else named_file(profile_map)}
    request |= settings.request()
    with only_writer(out, "--out"):
        journal = Journal(out / JOURNAL, request | {"genattn": genattn.__version__})
        pipe = open_pipeline(settings)
        call = call_arguments(pipe, settings)
        journal.made_with(pipeline_fingerprint(pipe), machine_of(pipe))
        if journal.begun is None and profile_map is None and (out / MAP).is_file():
            (out / MAP).replace(out / MAP_BEFORE)  # nothing tells of which weights it is
        journal.begin()
        judge = is_tiny_world(settings.model) and all(oracle_known(text) for text in texts)
        hunt = _Search(pipe, call, texts, seed, goal, journal, judge, tell)
        ground = hunt.ground(families, profile_map, out / MAP)
        return hunt.run(candidates(ground, families, densities), out)


def _refuse(
    settings: SamplingSettings, texts: Sequence[str], goal: Goal, families: Sequence[str], densities: Sequence[float]
) -> None:
    if not texts or not all(text.strip() for text in texts):
        raise GenAttnError(
            "tune needs at least one prompt to judge by; give --prompt or a --prompts file, best of your own use"
        )
    check_wanted(families, densities)
    if goal.min_oracle is None:
        return
    if not is_tiny_world(settings.model):
        raise GenAttnError(
            f"--min-oracle needs a model of the tiny world, whose oracle reads what is shown; got {settings.model}; "
            "use --min-psnr"
        )
    for text in texts:
        if not oracle_known(text):
            raise GenAttnError(f"--min-oracle needs captions of the tiny world, got {text!r}; e.g. 'a red circle moves right'")


def oracle_known(text: str) -> bool:
    """Whether the tiny world's oracle can read what the text asks for."""
    from genattn.pipelines.tiny.world import parse_caption

    return parse_caption(text) is not None


def timed(
    pipe: Any, call: dict[str, Any], text: str, seed: int, setting: AttentionSettings, title: str
) -> tuple[RunResult, float]:
    """One run, and the seconds to compare it by: of the processor on a CPU, else of the clock."""
    begun = time.process_time()
    result = run_once(pipe, call, text, seed, setting, title)
    used = time.process_time() - begun
    return result, used if place_of(pipe) == "cpu" else result.seconds


class _Search:
    """One tuning run: its pipeline, and the runs that are still to do."""

    def __init__(
        self,
        pipe: Any,
        call: dict[str, Any],
        texts: list[str],
        seed: int,
        goal: Goal,
        journal: Journal,
        judge: bool,
        tell: Tell,
    ) -> None:
        self.pipe, self.call, self.texts, self.seed, self.goal = pipe, call, texts, seed, goal
        self.journal, self.judge, self.tell = journal, judge, tell
        self.warm: set[str] = set()

    def ground(self, families: Sequence[str], profile_map: Path | None, own_map: Path) -> Ground:
        """The model and its grid; profiled here where a map is wanted and none is given."""
        found = self._model()
        with genattn.apply(self.pipe, genattn.RadialPattern()) as handle:
            grid = handle.explain(**self.call, prompt=self.texts[0], output_type="latent").grid
        if grid is None:
            raise GenAttnError(f"tune needs a model whose token grid is known, and that of {found.name} is not")
        if "profiled" in families and profile_map is None and len(set(self.texts)) >= LEAST_PROMPTS:
            profile_map = self._profiled(own_map)
        return Ground(found, grid, profile_map)

    def _model(self) -> Model:
        component, model = next(iter(denoisers(self.pipe).items()))
        return describe_model(component, model, tuple(getattr(self.pipe, "components", None) or ()))

    def _profiled(self, path: Path) -> Path:
        """A map from other noise than the settings are judged on; one that is there already is taken."""
        if path.is_file():
            unfinished(path).unlink(missing_ok=True)  # left where a kill came when the map had just been written
            return path
        import torch

        def run(text: str) -> Any:
            generator = torch.Generator().manual_seed(self.seed + PROFILE_SEED)
            return sample_frames(self.pipe, **self.call, prompt=text, generator=generator)

        self.pipe.set_progress_bar_config(disable=True)
        texts = list(dict.fromkeys(self.texts))[:PROFILE_PROMPTS]
        told = lambda done, total: self.tell(done, total, "profile")  # noqa: E731
        profile(self.pipe, run, texts, out=path, progress=told, settings=self.journal.request)
        return path

    def run(self, first: Sequence[AttentionSettings], out: Path) -> Tuned:
        """The race over the prompts, and the files."""
        known = {setting.name: setting for setting in first}
        self._judge_on(0, first, len(self.texts))
        left = [known[row.name] for row in still_running(self._rows(known, 1))]
        started = [with_dense_start(setting) for setting in left]
        known |= {setting.name: setting for setting in started}
        self._judge_on(0, started, len(self.texts), before=len(left))
        for number in range(1, len(self.texts)):
            rows = self._rows(known, number)
            left = [known[row.name] for row in still_running(rows) if not hopeless(row, self.goal)]
            self._judge_on(number, left, len(self.texts))
        rows = self._rows(known, len(self.texts))
        chosen = choose(rows, self.goal)
        everything = self._summed(s for s in self.journal.samples if s["setting"] in known)
        why = str(self.goal) if chosen is not None else nearest_miss(rows or everything, self.goal)
        draw_front(everything, chosen, self.goal, out / PICTURE)
        if chosen is not None:
            self._save(known[chosen.name], chosen, everything, out)
        elif (out / SETTINGS).exists():
            (out / SETTINGS).replace(out / BEFORE)
            why += f"; what an earlier goal chose is in {out / BEFORE}"
        return Tuned(chosen, why, tuple(everything), out)

    def _rows(self, known: dict[str, AttentionSettings], prompts: int) -> list[Row]:
        """Rows of the known settings over the first `prompts` prompts, of those that ran on all of them.

        What later prompts told is left out, so that a race that goes on after a stop decides as it would have.
        """
        own = (s for s in self.journal.samples if s["setting"] in known and s["prompt"] < prompts)
        return [row for row in self._summed(own) if row.prompts == prompts]

    def _summed(self, samples: Iterable[dict[str, Any]]) -> list[Row]:
        with whole(f"the journal {self.journal.path}"):
            return summed(samples)

    def _judge_on(self, number: int, settings: Sequence[AttentionSettings], prompts: int, before: int = 0) -> None:
        """Run what is missing of `settings` on prompt `number`, a dense run beside every few of them."""
        todo = [setting for setting in settings if not self.journal.done(setting.name, number)]
        most = (len(settings) + before) * (prompts - number)
        dense: tuple[RunResult, float] | None = None
        for at, setting in enumerate(todo):
            self.tell(
                len(self.journal.samples), len(self.journal.samples) + most - (len(settings) - len(todo)) - at, setting.name
            )
            if setting.name not in self.warm:  # before the dense run too: the first call in a process pays for its set-up
                warm_up(self.pipe, self.call, self.texts[number], setting)
                self.warm.add(setting.name)
            if at % BESIDE_DENSE == 0:
                dense = self._sampled(number, DENSE)
            assert dense is not None
            self.journal.add(self._sample(number, setting, dense))

    def _sampled(self, number: int, setting: AttentionSettings) -> tuple[RunResult, float]:
        title = f"{number + 1}/{len(self.texts)} {setting.name}"
        return timed(self.pipe, self.call, self.texts[number], self.seed + number, setting, title)

    def _sample(self, number: int, setting: AttentionSettings, beside: tuple[RunResult, float]) -> dict[str, Any]:
        (dense, dense_time), (result, own_time) = beside, self._sampled(number, setting)
        text = self.texts[number]
        scores = oracle_scores(result.frames, text) if self.judge else None
        return {
            "setting": setting.name,
            "prompt": number,
            "seconds": result.seconds,
            "dense_seconds": dense.seconds,
            "speedup": dense_time / own_time,
            "density": result.density,
            "peak_memory_gb": result.peak_memory_gb,
            "psnr": psnr(result.frames, dense.frames),
            "ssim": ssim(result.frames, dense.frames),
            "oracle": None if scores is None else sum(scores[name] for name in JUDGED) / len(JUDGED),
        }

    def _save(self, setting: AttentionSettings, chosen: Row, rows: Sequence[Row], out: Path) -> None:
        assert isinstance(setting.pattern, Pattern)
        notes = {
            "goal": {name: value for name, value in asdict(self.goal).items() if value is not None},
            "chosen": chosen.to_dict(),
            "front": [row.to_dict() for row in front(rows)],
            "request": self.journal.request,
            "size": {k: self.call[k] for k in ("height", "width", "num_frames", "num_inference_steps") if k in self.call},
            **provenance(place_of(self.pipe)),
        }
        save_settings(out / SETTINGS, [SparsePlugin(setting.pattern, Schedule(**setting.schedule))], notes)


def left_out(prompts: Sequence[str], families: Sequence[str] | None, profile_map: Path | None) -> list[str]:
    """What the user should know before the run: what will not be tried, and why."""
    if "profiled" not in (families or FAMILIES) or profile_map is not None or len(set(prompts)) >= LEAST_PROMPTS or not prompts:
        return []
    return [f"profiled maps are left out: they need {LEAST_PROMPTS} different prompts, or --map"]
