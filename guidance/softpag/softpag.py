"""SoftPAG: guidance away from a model whose chosen heads are perturbed (arXiv 2506.10978).

    prediction + w (clean - perturbed),     perturbed heads: lerp(attention output, target, u)

A plugin: `genattn.apply(pipe, SoftPAG("L11H15,L13H17", u=0.5, scale=3.0))`. Each guided step runs the conditional samples
once more with the heads perturbed and adds the same delta to every answer of the step (see `pass_role`), so it needs to
know nothing of the pipeline's own guidance. The extra pass starts at the first perturbed block (see `block_swap`) and
keeps its own cache context. Several SoftPAGs on one model add their deltas, each against the clean prediction.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.heads.names import HeadsLike, plain_heads
from genattn.guidance.passes.block_swap import Bypass, PrefixReuse, Recorder
from genattn.guidance.passes.delta import DeltaRule, Projection, Window, projection_from
from genattn.guidance.passes.made import made_part
from genattn.guidance.passes.pass_role import PassReader, PassRole
from genattn.guidance.passes.prediction import leaves, take_call, take_rows, with_leaves
from genattn.guidance.softpag.perturbation import HeadMix
from genattn.guidance.softpag.tap import HeadTap, TappedModel
from genattn.layouts.site import AttentionSite
from genattn.seam.denoiser import current_run
from genattn.seam.plugin import Run

MODES = ("extra", "batched", "replace_uncond")
Denoise = Callable[..., Any]


class _Nesting(threading.local):
    """Several terms on one forward: the clean answer, shared, and whether an extra pass is going on."""

    def __init__(self) -> None:
        self.depth = 0
        self.clean: Any = None
        self.extra = False


_HERE = _Nesting()


@dataclass
class _State:
    """One denoiser within one run."""

    reader: PassReader
    deltas: list[torch.Tensor] = field(default_factory=list)
    momentum: list[torch.Tensor | None] = field(default_factory=list)
    verified: bool = False
    awaits_uncond: bool = False


class SoftPAG(HeadTap):
    """Head-level perturbation guidance on any denoiser.

    Args:
        heads: e.g. "L11H15,L13H17", "L7" for a whole layer, or a `HeadSet`; layers count over all blocks.
        u: how far the heads are drawn towards the target, in [0, 1].
        scale: weight w of the difference, any finite number.
        target: what the heads are drawn towards, see `genattn.guidance.softpag.perturbation`.
        start: first moment, fraction of the steps in [0, 1].
        stop: last moment, fraction of the steps, included.
        sigma_start: act below this noise level, None for no bound.
        sigma_stop: act above this noise level.
        adaptive: how fast the weight falls over the run, >= 0.
        rescale: how far the guided prediction keeps the clean one's spread, in [0, 1].
        projection: APG of the difference, None for the plain one.
        mode: "extra" runs another pass; "batched" the same as further samples of the one batch; "replace_uncond" perturbs the
            pipeline's unconditional pass instead, at no cost (scale is then the pipeline's own).
        layout: which samples are conditional, "auto" or one of `genattn.guidance.passes.pass_role.LAYOUTS`.
        reuse_prefix: skip the blocks before the first perturbed one in the extra pass: "auto", or True to insist, or False.
        per_sample: instead of `heads`, one selection per conditional sample.
    """

    option_names: ClassVar[frozenset[str]] = frozenset(("softpag_scale",))
    runs_passes: ClassVar[bool] = True

    def __init__(
        self,
        heads: HeadsLike | HeadSet | None = None,
        u: float = 0.5,
        scale: float = 3.0,
        *,
        target: str = "identity",
        start: float = 0.0,
        stop: float = 1.0,
        sigma_start: float | None = None,
        sigma_stop: float | None = None,
        adaptive: float = 0.0,
        rescale: float = 0.0,
        projection: Projection | None = None,
        mode: str = "extra",
        layout: str = "auto",
        reuse_prefix: bool | str = "auto",
        per_sample: Sequence[HeadsLike] | None = None,
    ) -> None:
        super().__init__(heads, u, target, per_sample)
        self.window = Window(start, stop, sigma_start, sigma_stop)
        self.rule = DeltaRule(scale, adaptive, rescale, projection)
        if mode not in MODES:
            raise GenAttnError(f"mode must be one of {', '.join(MODES)}, got {mode!r}; choose one of those")
        if mode != "extra" and target == "skip":
            raise GenAttnError(f"target 'skip' needs a pass of its own, got mode={mode!r}; use mode='extra'")
        if not isinstance(reuse_prefix, bool | str) or reuse_prefix not in (True, False, "auto"):
            raise GenAttnError(f"reuse_prefix must be True, False or 'auto', got {reuse_prefix!r}; choose one of those")
        PassReader(layout)
        self.mode, self.layout, self.reuse_prefix = mode, layout, reuse_prefix
        self.counts: Counter[str] = Counter()
        self._states: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()

    # ---- other methods as presets

    @classmethod
    def pag(cls, layers: str, scale: float = 3.0, **settings: Any) -> "SoftPAG":
        """Perturbed-attention guidance of whole layers, "L7,L8" (arXiv 2403.17377).

        Every token keeps its own value, text tokens too, as in HeadHunter's code. diffusers' PAG pipeline of SD3 lets the
        text look as before: that is `target="image_to_image"`.
        """
        return cls(layers, **{"u": 1.0, "scale": scale, **settings})

    @classmethod
    def seg(cls, layers: str, scale: float = 3.0, **settings: Any) -> "SoftPAG":
        """Smoothed-energy guidance of whole layers with infinite blur (arXiv 2408.00760): every row asks the mean query."""
        return cls(layers, **{"u": 1.0, "scale": scale, "target": "mean_query", **settings})

    @classmethod
    def stg(cls, layers: str, scale: float = 1.0, **settings: Any) -> "SoftPAG":
        """Spatio-temporal skip guidance (arXiv 2411.18664), also known as skip-layer guidance: whole blocks left out."""
        return cls(layers, **{"u": 1.0, "scale": scale, "target": "skip", **settings})

    @classmethod
    def from_head_set(cls, head_set: HeadSet | str | Path, **settings: Any) -> "SoftPAG":
        """A head set with the scale, target and window that were found with it; `settings` override them."""
        found = head_set if isinstance(head_set, HeadSet) else HeadSet.load(head_set)
        known = {"scale": found.scale, "target": found.target, "start": found.start, "stop": found.stop}
        return cls(found, **{**known, **settings})

    # ---- the plugin

    def settings(self) -> dict[str, Any]:
        """See Plugin.settings; a head set goes in whole."""
        chosen = self.heads.to_dict() if isinstance(self.heads, HeadSet) else self.heads and plain_heads(self.heads)
        rule = self.rule
        return {
            "heads": chosen,
            "u": self.u,
            "scale": rule.scale,
            "target": self.target,
            **self.window.settings(),
            "adaptive": rule.adaptive,
            "rescale": rule.rescale,
            "projection": asdict(rule.projection) if rule.projection is not None else None,
            "mode": self.mode,
            "layout": self.layout,
            "reuse_prefix": self.reuse_prefix,
            "per_sample": [plain_heads(part) for part in self.per_sample] if self.per_sample is not None else None,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "SoftPAG":
        """See Plugin.from_settings."""
        given = dict(settings)
        if isinstance(given.get("heads"), Mapping) and "format" in given["heads"]:
            given["heads"] = HeadSet.from_dict(given["heads"], "the settings of SoftPAG")
        if given.get("projection") is not None:
            given["projection"] = projection_from(given["projection"])
        return cls(**given)

    def attach(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        """Find the heads; raises GenAttnError if this model cannot be guided as asked."""
        super().attach(model, sites)
        tapped = self.model(model)
        reason = tapped.blocks.why_no_reuse(tapped.first)
        if self.reuse_prefix is True and reason is not None:
            raise GenAttnError(f"reuse_prefix=True must be possible, but {reason}; use reuse_prefix='auto'")
        self._states[model] = _State(PassReader(self.layout))

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise GenAttnError for a scale that is no finite number."""
        if "softpag_scale" in options:
            replace(self.rule, scale=options["softpag_scale"])

    def why_idle(self, run: Run) -> str:
        """See Plugin.why_idle."""
        return self.window.why_idle(run)

    def begin_run(self, run: Run) -> None:
        """Forget the last run's steps."""
        for model in list(self._states):
            self._states[model] = _State(PassReader(self.layout))
        for tapped in self._models.values():
            tapped.hits.clear()

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Denoise) -> Any:
        """The pipeline's forward, with the step's delta added."""
        if _HERE.extra or run.extra is not None:
            return inner(*args, **kwargs)
        rule = replace(self.rule, scale=run.options_of(self).get("softpag_scale", self.rule.scale))
        weight = rule.weight(run) if self.window.contains(run) else 0.0
        if not self.window.contains(run) or (not weight and self.mode != "replace_uncond"):
            return inner(*args, **kwargs)
        if _HERE.depth and (self.mode != "extra" or run.copied):
            found = "batched" if run.copied else self.mode
            raise GenAttnError(f"several terms at once need mode='extra', got {found!r} inside another; change the mode")
        tapped, state = self.model(run.model), self._states[run.model]  # type: ignore[index]
        role = state.reader.role(run, args, kwargs, run.pipe)
        guide = {"extra": self._extra, "batched": self._batched, "replace_uncond": self._replace}[self.mode]
        _HERE.depth += 1
        try:
            return guide(GuidedStep(run, role, tapped, state, rule, weight), args, kwargs, inner)
        finally:
            _HERE.depth -= 1
            if not _HERE.depth:
                _HERE.clean = None

    # ---- the three modes

    def _extra(self, step: "GuidedStep", args: tuple[Any, ...], kwargs: dict[str, Any], inner: Denoise) -> Any:
        role, tapped = step.role, step.tapped
        if role.kind != "cond":
            return self._shift(inner(*args, **kwargs), step)
        prefix = self._prefix(tapped)
        skipped = self._recorders(tapped)
        with prefix.recording() if prefix else nullcontext(), tapped.blocks.swapped(skipped):
            out = inner(*args, **kwargs)
        _HERE.clean = out if _HERE.clean is None else _HERE.clean
        clean = leaves(take_rows(_HERE.clean, role.rows, role.batch))
        bypasses = {place: self._bypass(tapped, place, recorder) for place, recorder in skipped.items()}
        with prefix.repeating(role.rows, role.batch) if prefix else nullcontext(), tapped.blocks.swapped(bypasses):
            mixes = {} if self.target == "skip" else tapped.mix(len(role.rows), torch.arange(len(role.rows)))
            perturbed = self.perturbed_pass(step.run, role, mixes, args, kwargs, inner)
        for bypass in bypasses.values():
            tapped.hits[bypass.layer] += bypass.hits
        self._verify(step)
        self._guide(step, clean, leaves(perturbed), kwargs)
        return self._shift(out, step)

    def perturbed_pass(
        self, run: Run, role: PassRole, mixes: dict[int, HeadMix], args: tuple[Any, ...], kwargs: dict[str, Any], inner: Denoise
    ) -> Any:
        """The answer for the conditional samples with heads perturbed, in a pass of its own."""
        if not role.is_whole:
            args, kwargs = take_call(args, kwargs, role.rows, role.batch)
        _HERE.extra = True
        try:
            with run.extra_pass("softpag") as extra, self.marking(extra, mixes):
                out = inner(*args, **kwargs)
        finally:
            _HERE.extra = False
        self.counts["extra_passes"] += 1
        return out

    def _batched(self, step: "GuidedStep", args: tuple[Any, ...], kwargs: dict[str, Any], inner: Denoise) -> Any:
        role, tapped = step.role, step.tapped
        if role.kind != "cond":
            return self._shift(inner(*args, **kwargs), step)
        rows = torch.cat([torch.arange(role.batch), role.rows])
        more_args, more_kwargs = take_call(args, kwargs, rows, role.batch)
        mixes = tapped.mix(len(rows), torch.arange(role.batch, len(rows)))
        # block caches compare with what they kept, whose batch is smaller outside of the window
        cached = getattr(step.run.model, "is_cache_enabled", False)
        run = replace(step.run, copied=tuple(role.rows.tolist()))
        with step.run.extra_pass("batched") if cached else nullcontext(), current_run(run), self.marking(run, mixes):
            together = inner(*more_args, **more_kwargs)
        self.counts["batched_passes"] += 1
        self._verify(step)
        out = take_rows(together, torch.arange(role.batch), len(rows))
        clean = leaves(take_rows(out, role.rows, role.batch))
        self._guide(step, clean, leaves(take_rows(together, torch.arange(role.batch, len(rows)), len(rows))), kwargs)
        return self._shift(out, step)

    def _replace(self, step: "GuidedStep", args: tuple[Any, ...], kwargs: dict[str, Any], inner: Denoise) -> Any:
        role, state = step.role, step.state
        if role.kind == "other":
            return inner(*args, **kwargs)
        rows = role.others
        if role.kind == "cond" and not len(rows):
            if state.awaits_uncond:
                raise GenAttnError(
                    "mode='replace_uncond' needs an unconditional pass, got only conditional ones; "
                    "turn CFG on or use mode='extra'"
                )
            state.awaits_uncond = True
            return inner(*args, **kwargs)
        state.awaits_uncond = False
        with self.marking(step.run, step.tapped.mix(role.batch, rows)):
            out = inner(*args, **kwargs)
        self.counts["replaced_passes"] += 1
        self._verify(step)
        return out

    # ---- parts

    def _prefix(self, tapped: TappedModel) -> PrefixReuse | None:
        if self.reuse_prefix is False or tapped.blocks.why_no_reuse(tapped.first) is not None:
            return None
        return PrefixReuse(tapped.blocks, tapped.first)

    def _recorders(self, tapped: TappedModel) -> dict[tuple[str, int], Recorder]:
        """Around the blocks to be left out, whose clean answers tell the order of their results."""
        if self.target != "skip":
            return {}
        places = [tapped.blocks.places[layer] for layer in tapped.rows]
        return {place: Recorder(tapped.blocks.block(place)) for place in places}

    def _bypass(self, tapped: TappedModel, place: tuple[str, int], recorder: Recorder) -> Bypass:
        layer = next(depth for depth, found in tapped.blocks.places.items() if found == place)
        form = tapped.blocks.form_of(place, recorder.answer)
        return Bypass(tapped.blocks.block(place), form, float(tapped.rows[layer][0, 0]), layer)

    def _guide(
        self, step: "GuidedStep", clean: list[torch.Tensor], perturbed: list[torch.Tensor], kwargs: dict[str, Any]
    ) -> None:
        state = step.state
        before = state.momentum or [None] * len(clean)
        places = [made_part(step.run, c, kwargs, n) if step.rule.measures else None for n, c in enumerate(clean)]
        several = zip(clean, perturbed, before, places, strict=True)
        pairs = [step.rule.delta(c, p, step.weight, m, place) for c, p, m, place in several]
        state.deltas, state.momentum = [delta for delta, _ in pairs], [kept for _, kept in pairs]
        self.counts["guided_steps"] += 1

    def _shift(self, out: Any, step: "GuidedStep") -> Any:
        """An answer with the step's delta added to every prediction."""
        answers = leaves(out)
        if not step.state.deltas:
            return out
        shifted = [a + step.role.spread(d).to(a.dtype) for a, d in zip(answers, step.state.deltas, strict=True)]
        return with_leaves(out, shifted)

    def _verify(self, step: "GuidedStep") -> None:
        """Raise unless every selected layer was hit in the first perturbed pass of a run; caches may skip later ones."""
        missed = step.tapped.missed()
        if not step.state.verified and missed:
            raise GenAttnError(
                f"every selected layer's attention must come by, got no call from layers {missed} of "
                f"{step.run.model.__class__.__name__}; it may be skipped by a cache or computed otherwise: choose other layers"
            )
        step.state.verified = True

    # ---- what it costs and what it did

    def plan(self, num_steps: int) -> dict[str, Any]:
        """What a run of `num_steps` will cost, before it runs; needs to be applied first."""
        tapped = next(iter(self._models.values()), None)
        if tapped is None:
            raise GenAttnError("a plan needs the model, got none; apply the plugin first")
        steps, share = self.window.steps(num_steps), self._share(tapped)
        passes = 0.0 if self.mode == "replace_uncond" else len(steps) * (share if self.mode == "extra" else 1.0)
        return {"guided_steps": steps, "share_of_blocks": share, "extra_passes": round(passes, 4)}

    def describe(self) -> dict[str, Any]:
        """Settings and what happened so far, JSON-ready."""
        return {
            "plugin": "SoftPAG",
            "u": self.u,
            "target": self.target,
            "scale": self.rule.scale,
            "window": self.window.describe(),
            "mode": self.mode,
            "counts": dict(self.counts),
            "models": self.summaries(),
        }

    def _summary(self, tapped: TappedModel) -> dict[str, Any]:
        reason = tapped.blocks.why_no_reuse(tapped.first) if self.reuse_prefix else "switched off"
        return {**super()._summary(tapped), "blocks_per_extra_pass": self._share(tapped), "why_whole": reason}

    @property
    def share_told(self) -> float:
        """Share of the blocks that each extra pass runs, of the denoiser attached last; also after removal."""
        last: dict[str, Any] = next(reversed(list(self.summaries().values())), {})
        return float(last.get("blocks_per_extra_pass", 1.0))

    def _share(self, tapped: TappedModel) -> float:
        prefix = self._prefix(tapped)
        return 1.0 if prefix is None else round(prefix.share, 4)


@dataclass
class GuidedStep:
    """One forward that is being guided."""

    run: Run
    role: PassRole
    tapped: TappedModel
    state: _State
    rule: DeltaRule
    weight: float
