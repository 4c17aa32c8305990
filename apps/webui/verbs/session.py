"""What all visitors of the app share: the models, the one right to use them, and the folder of the runs.

folder/runs/20261125-201530-video-9f2c4e11/       one folder a run: files, report.json, film and checkpoint
"""

import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genattn.apps.webui.verbs.limits import Limits
from genattn.errors import GenAttnError, first_line
from genattn.reading import read_defaults

_RUN = re.compile(r"\d{8}-\d{6}-[a-z]+-[0-9a-f]{16}")
_SHOWN = 8  # files of the cache that a page may be showing just now


@dataclass(frozen=True)
class Model:
    """A pipeline the app offers. source: folder or hub id, None for the shipped one. defaults: the size it was made for."""

    name: str
    source: str | None
    video: bool
    defaults: dict[str, Any]


class Session:
    """Models, folder, limits and the lock under which a job runs.

    sources: folders or hub ids; none for the tiny models that are shipped. settings: files of `genattn tune`, offered as
    presets. Raises GenAttnError for one that cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        sources: Sequence[str] = (),
        limits: Limits | None = None,
        dtype: str = "auto",
        device: str | None = None,
        cpu_offload: str | None = None,
        settings: Sequence[Path] = (),
    ) -> None:
        self.presets = _read_presets(settings)
        self.folder, self.limits = Path(folder).resolve(), limits or Limits()
        self.dtype, self.device, self.cpu_offload = dtype, device, cpu_offload
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        self.models = {model.name: model for model in _describe(sources)}
        self.lock = threading.Lock()
        self._opening = threading.Lock()
        self._pipes: dict[str, Any] = {}
        self._layers: dict[str, dict[int, int]] = {}
        self._seconds: dict[tuple[Any, ...], float] = {}

    # ---- models

    def names(self, video: bool | None = None) -> list[str]:
        """Names of the models, of those that make videos (True) or pictures (False) when asked."""
        return [name for name, model in self.models.items() if video is None or model.video == video]

    def check_name(self, name: str | None, video: bool) -> Model:
        """The model of that name and kind, the first of the kind for None; raises GenAttnError when there is none."""
        there = self.names(video)
        if not there:
            kind = "text-to-video" if video else "text-to-image"
            raise GenAttnError(f"this server has no {kind} model; start it with: genattn app --model PATH_OR_ID")
        if name is not None and name not in there:
            raise GenAttnError(f"model must be one of {', '.join(there)}, got {name!r}; choose one of those")
        return self.models[name or there[0]]

    def open(self, model: Model) -> Any:
        """The model's pipeline, loaded at first use; raises GenAttnError as `load_pipeline` does."""
        with self._opening:
            if model.name not in self._pipes:
                from genattn.apps.sampling.run import SamplingSettings, open_pipeline
                from genattn.guidance.headhunter.hunter import layer_map

                settings = SamplingSettings(model.source, dtype=self.dtype, device=self.device, cpu_offload=self.cpu_offload)
                pipe = open_pipeline(settings)
                self._layers[model.name] = layer_map(pipe)
                self._pipes[model.name] = pipe
            return self._pipes[model.name]

    def layers(self, model: Model) -> dict[int, int]:
        """Heads per layer of a model's denoiser."""
        self.open(model)
        return self._layers[model.name]

    def is_open(self, model: Model) -> bool:
        """Whether the model is loaded, so that asking about it costs nothing."""
        return model.name in self._pipes

    # ---- runs

    def seconds_of(self, model: str, call: Mapping[str, Any]) -> float | None:
        """What the last dense run of this size took here, None before the first."""
        return self._seconds.get(_size(model, call))

    def remember_seconds(self, model: str, call: Mapping[str, Any], seconds: float) -> None:
        """Keep what a dense run took."""
        self._seconds[_size(model, call)] = seconds

    def files_of(self, report: Mapping[str, Any]) -> list[str]:
        """Every file of a run that is there, its report last."""
        folder = self.run_folder(str(report["run"]))
        names = [*report.get("files", ()), "report.json"]
        return [str(folder / name) for name in dict.fromkeys(names) if (folder / name).is_file()]

    def new_run(self, verb: str) -> Path:
        """A new folder for one run, its name not to be guessed; the oldest runs make room for it."""
        self.prune()
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{verb}-{secrets.token_hex(8)}"
        folder = self.folder / "runs" / name
        folder.mkdir()
        return folder

    def run_folder(self, run: str) -> Path:
        """The folder of a run that is there; raises GenAttnError for anything else, paths included."""
        folder = self.folder / "runs" / str(run).strip()
        if not _RUN.fullmatch(str(run).strip()) or not folder.is_dir():
            raise GenAttnError(f"there is no run {str(run)[:60]!r} on this server; copy its name from the report")
        return folder

    def prune(self) -> None:
        """Drop the oldest runs, and what the page has cached, until all of it fits into `limits.disk_bytes`.

        Gradio keeps a copy of every result and upload it has shown; the newest few stay, because a page may be showing them.
        """
        self._prune_cache(self.limits.disk_bytes // 2)
        runs = sorted(path for path in (self.folder / "runs").iterdir() if _RUN.fullmatch(path.name))
        sizes = [sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) for run in runs]
        total = sum(sizes)
        for run, size in zip(runs, sizes):
            if total <= self.limits.disk_bytes // 2:
                return
            shutil.rmtree(run, ignore_errors=True)
            total -= size

    def _prune_cache(self, most: int) -> None:
        files = [file for file in (self.folder / "cache").rglob("*") if file.is_file()]
        files.sort(key=lambda file: file.stat().st_mtime)
        total = sum(file.stat().st_size for file in files)
        for file in files[:-_SHOWN]:
            if total <= most:
                return
            total -= file.stat().st_size
            file.unlink(missing_ok=True)

    def write_report(self, run: Path, report: dict[str, Any]) -> dict[str, Any]:
        """`report` with the run's name and date, as JSON beside its files; returns it."""
        from genattn.apps.sampling.output_files import write_json

        full = {"run": run.name, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **report}
        plain: dict[str, Any] = json.loads(json.dumps(full, default=str))
        write_json(run / "report.json", plain)
        return plain

    def report(self, run: str) -> dict[str, Any]:
        """The report of a run; raises GenAttnError if there is none."""
        file = self.run_folder(run) / "report.json"
        if not file.is_file():
            raise GenAttnError(f"run {run!r} has no report: it was stopped before its end")
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def _size(model: str, call: Mapping[str, Any]) -> tuple[Any, ...]:
    return (model, *(call.get(name) for name in ("num_frames", "height", "width", "num_inference_steps")))


def _read_presets(files: Sequence[Path]) -> dict[str, Any]:
    """AttentionSettings by the name shown: the file's folder where it has the usual name, else its own."""
    from genattn.apps.sampling.saved_settings import attention_from_file

    found: dict[str, Any] = {}
    for file in files:
        stem = file.resolve().parent.name if file.stem == "settings" else file.stem
        name = f"tuned: {stem}"
        found[name if name not in found else f"{name} ({len(found)})"] = attention_from_file(file)
    return found


def _describe(sources: Sequence[str]) -> list[Model]:
    """The models behind `sources`, told from their model_index.json without loading any weight."""
    from genattn.apps.sampling.load_pipeline import check_folder, shipped_model

    wanted: list[tuple[str, str | None]] = []
    for name in () if sources else ("tiny-wan", "tiny-sd3"):
        try:
            wanted.append((name, str(shipped_model(name))))
        except GenAttnError:
            continue
    for source in sources:
        name = Path(source).resolve().name if Path(source).is_dir() else source
        taken = {known for known, _ in wanted}
        wanted.append((name if name not in taken else f"{name} ({len(taken)})", source))
    found = []
    for name, where in wanted:
        if where is not None and Path(where).is_dir():
            check_folder(Path(where))
        known = {} if where is None else read_defaults(where)
        # a shipped model says so itself; asking diffusers' class imports half of it
        video = known["frames"] > 1 if "frames" in known else _makes_video(where)
        found.append(Model(name, where, video, known))
    return found


def _makes_video(source: str | None) -> bool:
    import inspect

    import diffusers

    from genattn.apps.sampling.load_pipeline import names_modular, reach
    from genattn.apps.sampling.pipeline_calls import source_makes_video

    where = {} if Path(str(source)).is_dir() else reach(str(source))
    try:
        if names_modular(str(source), **where):
            return source_makes_video(str(source))
        index = diffusers.DiffusionPipeline.load_config(source, **where)
    except (OSError, ValueError) as error:
        raise GenAttnError(f"{source!r} cannot be opened: {first_line(error)}") from None
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if kind is None:
        raise GenAttnError(f"{source!r} is a {index.get('_class_name')}, which this diffusers does not have; upgrade it")
    return "num_frames" in inspect.signature(kind.__call__).parameters
