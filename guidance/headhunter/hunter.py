"""HeadHunter: find the heads whose perturbation guides best, on any pipeline and for any objective (arXiv 2506.10978).

    hunter = HeadHunter(pipe, {"sharpness": load_objective("sharpness")}, prompts, log="hunt.jsonl", rounds=2, top_k=3)
    head_set = hunter.run()                      # a HeadSet; resumes where a killed run stopped

The search itself is `head_search`, its memory `search_log`; here trials become pictures. Candidates of one prompt share
its seed and are made as rows of one batch. With accelerate several processes share the work and find the same heads.
"""

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

import genattn
from genattn.errors import GenAttnError
from genattn.fingerprint import pipeline_fingerprint, place_of, precision
from genattn.guidance.headhunter.objectives import Objective, checked, objective_mark
from genattn.guidance.headhunter.search import HeadSearch, Scores, SearchResult, SearchSettings, Trial
from genattn.guidance.headhunter.search_log import Chunk, Progress, SearchLog
from genattn.guidance.headhunter.x0_probe import X0Probe
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.heads.names import Head, HeadsLike, HeadWeights, all_heads, check_weight, head_name, resolve_heads
from genattn.guidance.passes.delta import DeltaRule, Window
from genattn.guidance.softpag.perturbation import check_target
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.guidance.softpag.tap import primary_sites
from genattn.seam.handle import apply
from genattn.seam.plugin import Plugin
from genattn.seam.sites import denoisers


class HeadHunter:
    """One hunt.

    Args:
        pipe: a stock pipeline whose call takes prompt, generator and num_inference_steps.
        objectives: {name: (samples, prompts) -> scores}, see `genattn.guidance.headhunter.objectives`.
        prompts: prompts that decide.
        held_out: prompts of the last check, none to go without.
        log: JSONL file that remembers every score.
        seeds: one per prompt, held-out ones after the others; their indices by default.
        weights: weight of each objective's z-score, 1 by default; negative to minimise.
        u: weight of the heads while searching, in [0, 1]; 1 shows each head's effect most clearly.
        scale: guidance scale w.
        target: what heads are drawn towards, see `genattn.guidance.softpag.perturbation`; all but "skip".
        start: first moment of guidance, fraction of the steps.
        stop: last moment.
        layout: which samples are conditional, see `genattn.guidance.passes.pass_role`.
        pool: heads to choose from, all by default.
        min_layer: leave out layers below; the later the first layer, the cheaper each guided step.
        batch: candidates per forward, >= 1.
        probe_moments: when the probe looks, fractions of the run; used with `probe_keep` only.
        call: further arguments of the pipeline's call; num_inference_steps is needed.
        accelerator: of accelerate, to share the work between processes.
        progress: called after each chunk of trials with (done, of, seconds).
        search: rounds, top_k, floors, halving, probe_keep, u_grid, patience, returned; see `SearchSettings`.
    """

    def __init__(
        self,
        pipe: Any,
        objectives: Mapping[str, Objective],
        prompts: Sequence[str],
        *,
        log: str | Path,
        held_out: Sequence[str] = (),
        seeds: Sequence[int] | None = None,
        weights: Mapping[str, float] | None = None,
        u: float = 1.0,
        scale: float = 3.0,
        target: str = "identity",
        start: float = 0.0,
        stop: float = 1.0,
        layout: str = "auto",
        pool: HeadsLike | None = None,
        min_layer: int = 0,
        batch: int = 1,
        probe_moments: Sequence[float] = (0.3, 0.6),
        call: Mapping[str, Any] | None = None,
        accelerator: Any = None,
        progress: Progress | None = None,
        **search: Any,
    ) -> None:
        self.pipe, self.prompts = pipe, [*prompts, *held_out]
        self.objectives = {name: checked(objective, name) for name, objective in objectives.items()}
        self.call = {"num_inference_steps": None, **(call or {})}
        self.u, self.batch = check_weight("u", u), batch
        self.settings: dict[str, Any] = {
            "scale": scale,
            "target": check_target(target),
            "start": start,
            "stop": stop,
            "layout": layout,
        }
        self.seeds = list(range(len(self.prompts))) if seeds is None else [int(seed) for seed in seeds]
        self._check()
        DeltaRule(scale)
        Window(start, stop)
        unknown = sorted(set(weights or {}) - set(objectives))
        if unknown:
            raise GenAttnError(f"a weight needs an objective of the same name, got {unknown}; known are {sorted(objectives)}")
        wanted = {name: float((weights or {}).get(name, 1.0)) for name in objectives}
        self.search = SearchSettings(wanted, len(prompts), len(held_out), **search)
        self.layers = layer_map(pipe)
        self.pool = self._pool(pool, min_layer)
        self.probe = self._make_probe(probe_moments)
        self.progress, self.accelerator = progress, accelerator
        self.forwards = 0.0
        self._log = Path(log)

    def _check(self) -> None:
        if not self.prompts or not all(isinstance(p, str) and p.strip() for p in self.prompts):
            raise GenAttnError(f"prompts must be texts that are not empty, got {self.prompts!r}; give at least one")
        if not isinstance(self.call["num_inference_steps"], int) or self.call["num_inference_steps"] < 1:
            raise GenAttnError(
                f"call must hold num_inference_steps >= 1, got {self.call['num_inference_steps']!r}; "
                "say how many steps a picture takes"
            )
        taken = sorted({"prompt", "generator", "output_type", "return_dict"} & set(self.call))
        if taken:
            raise GenAttnError(f"call must leave prompt, generator, output_type and return_dict to the hunt, got {taken}")
        if len(self.seeds) != len(self.prompts):
            raise GenAttnError(f"seeds must come one per prompt, got {len(self.seeds)} for {len(self.prompts)} prompts")
        if self.batch < 1:
            raise GenAttnError(f"batch must be >= 1, got {self.batch}; raise it")
        if self.settings["target"] == "skip":
            raise GenAttnError("a hunt perturbs heads, got target='skip', which leaves out whole blocks; use another target")

    def _pool(self, pool: HeadsLike | None, min_layer: int) -> list[Head]:
        found = all_heads(self.layers) if pool is None else list(resolve_heads(pool, self.layers))
        kept = [head for head in found if head[0] >= min_layer]
        if not kept:
            raise GenAttnError(f"the pool must hold heads, got none from layer {min_layer} on; lower min_layer")
        if len(kept) < self.search.top_k:
            raise GenAttnError(f"the pool must hold at least top_k={self.search.top_k} heads, got {len(kept)}; widen it")
        return kept

    def _make_probe(self, moments: Sequence[float]) -> X0Probe | None:
        if self.search.probe_keep is None:
            return None
        steps = self.call["num_inference_steps"]
        return X0Probe(self.pipe, self.generate, steps, moments, self.batch, self.settings)

    # ---- the hunt

    def run(self) -> HeadSet:
        """Hunt to the end, or on from where the log stops; returns the best heads."""
        self.result = HeadSearch(self.search, self.pool, self.make_log()).run()
        return self.head_set(self.result)

    def make_log(self) -> SearchLog:
        """The search's memory, read from its file."""
        sizes = {"full": self.batch, "probe": max(self.batch, len(self.pool))}
        world, rank, gather = 1, 0, None
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            world, rank = self.accelerator.num_processes, self.accelerator.process_index
            gather = lambda mine: gather_object([mine])  # noqa: E731
        return SearchLog(self._log, self.identity(), sizes, self.evaluate, rank, world, gather, self.progress)

    def identity(self) -> dict[str, Any]:
        """Everything that a score depends on, JSON-ready; a log of another identity is refused."""
        return {
            **self.settings,
            "u": self.u,
            "prompts": self.prompts,
            "seeds": self.seeds,
            "call": {name: _plain(value) for name, value in sorted(self.call.items())},
            "objectives": sorted(map(objective_mark, self.objectives)),
            "search": {**self.search.to_dict(), "rounds": None, "patience": None, "returned": None},
            "pool": [head_name(head) for head in self.pool],
            "model": pipeline_fingerprint(self.pipe),
            "precision": precision(self.pipe),
            "device": place_of(self.pipe).partition(":")[0],
            "genattn": genattn.__version__,
            "probe_steps": self.probe.steps if self.probe else None,
        }

    def head_set(self, result: SearchResult) -> HeadSet:
        """The result as a file-ready set."""
        if not result.heads:
            raise GenAttnError(f"the search must find heads, got none: {result.stopped}; lower the floors or widen the pool")
        u = self.u if result.u is None else result.u
        first = result.rounds[0].scores
        notes = {
            "rounds": [{"added": [head_name(h) for h in r.added], "score": r.total, "means": r.means} for r in result.rounds],
            "baseline": result.baseline,
            "stopped": result.stopped,
            "held_out": None if result.held_out is None else vars(result.held_out),
            "prompts": len(self.prompts) - self.search.held_out,
        }
        return HeadSet(
            dict.fromkeys(result.heads, u),
            self.layers,
            model=next(iter(denoisers(self.pipe).values())).__class__.__name__,
            model_id=str(getattr(getattr(self.pipe, "config", None), "_name_or_path", "") or ""),
            target=self.settings["target"],
            scale=self.settings["scale"],
            start=self.settings["start"],
            stop=self.settings["stop"],
            objective=" + ".join(f"{weight:g} {name}" for name, weight in self.search.objectives.items()),
            scores={head: score for head, score in first.items() if score is not None},
            versions={name: _version(name) for name in ("genattn", "diffusers", "torch")},
            notes=notes,
        )

    # ---- from trials to scores

    def evaluate(self, chunk: Chunk) -> list[Scores]:
        """Scores of trials of one prompt and kind."""
        prompt = chunk[0].prompt
        picked = [self._weights(trial) for trial in chunk]
        if chunk[0].kind == "probe":
            assert self.probe is not None
            base = dict.fromkeys(chunk[0].base, self.u)
            pictures = self.probe.pictures(prompt, base, picked)
            return [_mean(self.score(samples, prompt)) for samples in pictures]
        return self.score(list(self.guided(prompt, picked)), prompt)

    def _weights(self, trial: Trial) -> HeadWeights:
        return dict.fromkeys(trial.heads, self.u if trial.u is None else trial.u)

    def guided(self, prompt: int, picked: Sequence[HeadWeights]) -> torch.Tensor:
        """Samples [rows, ...] of one prompt, each with its own heads; no heads for none of the rows means no guidance."""
        plugin = SoftPAG(per_sample=list(picked), **self.settings) if any(picked) else None
        with nullcontext() if plugin is None else apply(self.pipe, plugin):
            samples = self.generate(prompt, len(picked))
        steps = self.call["num_inference_steps"]
        extra = 0.0 if plugin is None else plugin.counts["extra_passes"] * plugin.share_told
        self.forwards += len(picked) * (steps + extra)
        return samples

    def generate(self, prompt: int, rows: int, **changes: Any) -> torch.Tensor:
        """Samples [rows, 3, H, W] or [rows, T, 3, H, W] in [0, 1] of one prompt, all from its seed."""
        generators = [torch.Generator().manual_seed(self.seeds[prompt]) for _ in range(rows)]
        texts = [self.prompts[prompt]] * rows
        out = self.pipe(prompt=texts, generator=generators, output_type="pt", return_dict=False, **{**self.call, **changes})
        return as_samples(out[0])

    def score(self, samples: Sequence[torch.Tensor], prompt: int) -> list[Scores]:
        """Every objective's score of each sample."""
        texts = [self.prompts[prompt]] * len(samples)
        table = {name: objective(samples, texts) for name, objective in self.objectives.items()}
        return [{name: scores[i] for name, scores in table.items()} for i in range(len(samples))]


class _Looker(Plugin):
    """Reads a denoiser's sites."""

    def attach(self, model: Any, sites: Any) -> None:
        self.layers = {depth: site.heads for depth, site in primary_sites(sites).items() if not site.unreachable}


def layer_map(pipe: Any) -> dict[int, int]:
    """Heads per layer of a pipeline's or model's (first) denoiser.

    Raises:
        GenAttnError: if it has no attention that can be perturbed.
    """
    looker = _Looker()
    apply(next(iter(denoisers(pipe).values())), looker).remove()
    if not looker.layers:
        raise GenAttnError(f"a hunt needs self- or joint attention, got none that can be reached in {type(pipe).__name__}")
    return looker.layers


def as_samples(pictures: Any) -> torch.Tensor:
    """A pipeline's output as float32 [rows, 3, H, W] or [rows, T, 3, H, W] in [0, 1] on the CPU.

    Raises:
        GenAttnError: for another form.
    """
    if isinstance(pictures, list) and pictures and isinstance(pictures[0], torch.Tensor):
        pictures = torch.stack(pictures)
    if isinstance(pictures, np.ndarray):
        pictures = torch.from_numpy(pictures).movedim(-1, -3)
    if not isinstance(pictures, torch.Tensor) or pictures.ndim not in (4, 5) or pictures.shape[-3] != 3:
        shape = tuple(getattr(pictures, "shape", ())) or type(pictures).__name__
        raise GenAttnError(f"the pipeline must give RGB pictures or clips, got {shape}; output_type='pt' must work")
    return pictures.detach().float().clamp(0, 1).cpu()


def _mean(scores: Sequence[Scores]) -> Scores:
    return {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | None):
        return value
    if hasattr(value, "tobytes"):  # of a picture repr tells its place in memory
        return hashlib.sha256(value.tobytes()).hexdigest()[:16]
    return repr(value)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
