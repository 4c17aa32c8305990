"""A cheap guess at what a head would do: the clean picture that one guided step foresees.

One trajectory per prompt, guided by the heads chosen so far, is shared by all candidates. At a few of its steps the
candidates' perturbed passes run on the same latents, several rows at a time and only from the first perturbed block on;
each gives a delta, and x0(prediction - delta of the chosen + delta of the candidate) is decoded and judged.

Nothing here depends on the pipeline: deltas are added as `SoftPAG` adds them, x0 is read where the scheduler steps, and
pictures are decoded by the pipeline's own ending, entered with x0 as the result of a single step.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.guidance.heads.names import HeadWeights
from genattn.guidance.passes.block_swap import PrefixReuse
from genattn.guidance.passes.pass_role import PassRole
from genattn.guidance.passes.prediction import batch_of, leaves, map_leaves, take_rows
from genattn.guidance.softpag.perturbation import HeadMix
from genattn.guidance.softpag.softpag import Denoise, GuidedStep, SoftPAG
from genattn.seam.handle import apply
from genattn.seam.plugin import Plugin, Run

Generate = Callable[..., torch.Tensor]


class ProbingPAG(SoftPAG):
    """SoftPAG with the heads chosen so far that, at some steps, also notes the deltas of candidates.

    Args:
        base: the heads that guide the trajectory; may be empty.
        candidates: head weights of each candidate, the base's included.
        steps: steps at which the candidates are tried.
        rows: candidates per forward.
        settings: of `SoftPAG`.
    """

    def __init__(
        self, base: HeadWeights, candidates: Sequence[HeadWeights], steps: Sequence[int], rows: int, **settings: Any
    ) -> None:
        super().__init__(None, per_sample=[*candidates, base] if base else list(candidates), **settings)
        self.base, self.steps, self.rows = base, frozenset(steps), rows
        self.count = len(candidates)
        self.deltas: list[torch.Tensor] = []
        self.base_delta: torch.Tensor | None = None
        self.template: Any = None
        self.passes = 0.0

    def _extra(self, step: GuidedStep, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Denoise) -> Any:
        role = step.role
        if role.kind != "cond":
            return self._shift(inner(*args, **kwargs), step)
        groups = self._groups(step) if step.run.step in self.steps else []
        prefixes = [self._prefix_at(step, depth) for depth, _ in groups]
        with contextlib.ExitStack() as stack:
            for prefix in prefixes:
                if prefix is not None:
                    stack.enter_context(prefix.recording())
            out = inner(*args, **kwargs)
        self.passes += role.batch
        self.template = map_leaves(lambda t: torch.zeros_like(t[:1]), out) if self.template is None else self.template
        clean = leaves(take_rows(out, role.rows, role.batch))
        if self.base:
            mixes = self._mixes(step, [self.count] * len(role.rows))
            self._guide(step, clean, leaves(self.perturbed_pass(step.run, role, mixes, args, kwargs, inner)), kwargs)
            self.passes += len(role.rows)
        found: dict[int, torch.Tensor] = {}
        for (_, members), prefix in zip(groups, prefixes, strict=True):
            answers = self._answers(step, members, prefix, args, kwargs, inner)
            found |= {c: step.weight * (clean[0][0] - answer) for c, answer in zip(members, answers, strict=True)}
            self.passes += len(members) * (1.0 if prefix is None else prefix.share)
        if groups:
            self.deltas = [found[c] for c in range(self.count)]
            self.base_delta = step.state.deltas[0][0] if step.state.deltas else torch.zeros_like(clean[0][0])
        return self._shift(out, step)

    def _answers(
        self,
        step: GuidedStep,
        members: list[int],
        prefix: PrefixReuse | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inner: Denoise,
    ) -> list[torch.Tensor]:
        """The perturbed prediction of each member, [C, ...], all in one forward."""
        rows = step.role.rows[:1].repeat(len(members))
        role = PassRole("cond", rows, step.role.batch)
        with prefix.repeating(rows, role.batch) if prefix is not None else contextlib.nullcontext():
            out = self.perturbed_pass(step.run, role, self._mixes(step, members), args, kwargs, inner)
        return list(leaves(out)[0])

    def _mixes(self, step: GuidedStep, members: Sequence[int]) -> dict[int, HeadMix]:
        chosen = torch.tensor(members)
        return {layer: HeadMix.from_rows(u[chosen]) for layer, u in step.tapped.rows.items()}

    def _groups(self, step: GuidedStep) -> list[tuple[int, list[int]]]:
        """(first perturbed layer, candidates) for each forward."""
        by_depth: dict[int, list[int]] = {}
        for candidate in range(self.count):
            hit = [layer for layer, u in step.tapped.rows.items() if bool(u[candidate].any())]
            first = min(hit, default=step.tapped.first)
            by_depth.setdefault(first, []).append(candidate)
        return [
            (depth, members[i : i + self.rows])
            for depth, members in sorted(by_depth.items())
            for i in range(0, len(members), self.rows)
        ]

    def _prefix_at(self, step: GuidedStep, depth: int) -> PrefixReuse | None:
        blocks = step.tapped.blocks
        if self.reuse_prefix is False or blocks.why_no_reuse(depth) is not None:
            return None
        return PrefixReuse(blocks, depth)


class X0Probe:
    """Pictures foreseen for candidate heads.

    Args:
        pipe: a stock pipeline.
        generate: (prompt, rows, **changes) -> samples [rows, ...] of the pipeline at the prompt's seed.
        num_steps: steps of a full run.
        moments: when candidates are tried, fractions of the run in [0, 1).
        rows: candidates per forward and per decoding.
        settings: of `SoftPAG`: scale, target, start, stop, ...
    """

    def __init__(
        self,
        pipe: Any,
        generate: Generate,
        num_steps: int,
        moments: Sequence[float] = (0.3, 0.6),
        rows: int = 8,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not moments or not all(0 <= moment < 1 for moment in moments):
            raise GenAttnError(f"moments must be fractions of the run in [0, 1), got {tuple(moments)}; e.g. (0.3, 0.6)")
        self.pipe, self.generate, self.rows = pipe, generate, rows
        self.steps = sorted({int(moment * num_steps) for moment in moments})
        self.settings = dict(settings or {})
        self.passes = 0.0

    def pictures(self, prompt: int, base: HeadWeights, candidates: Sequence[HeadWeights]) -> list[list[torch.Tensor]]:
        """Per candidate the samples foreseen at each probe step; an empty candidate stands for no guidance."""
        plain = not any(candidates)
        tried = candidates if not plain else [{(0, 0): 0.0}]
        plugin = ProbingPAG(base, tried, self.steps, self.rows, **self.settings)
        foreseen: list[list[torch.Tensor]] = []
        with apply(self.pipe, plugin), self._watching(plugin, foreseen), contextlib.suppress(_Enough):
            self.generate(prompt, 1)
        if hasattr(self.pipe, "maybe_free_model_hooks"):
            self.pipe.maybe_free_model_hooks()
        if len(foreseen) != len(self.steps):
            raise GenAttnError(
                f"the probe must see steps {self.steps}, got {len(foreseen)} of them; "
                "widen start and stop, or choose other moments"
            )
        self.passes += plugin.passes
        by_step = [self._decode(prompt, latents, plugin.template) for latents in foreseen]
        return [list(samples) for samples in zip(*by_step, strict=True)]

    @contextlib.contextmanager
    def _watching(self, plugin: ProbingPAG, foreseen: list[list[torch.Tensor]]) -> Iterator[None]:
        """The scheduler's steps, read on the way."""

        def step(output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if plugin.deltas:
                scheduler, base = self.pipe.scheduler, plugin.base_delta
                assert base is not None
                corrected = [output + _fit(delta - base, output) for delta in plugin.deltas]
                foreseen.append([denoised(scheduler, o, timestep, sample) for o in corrected])
                plugin.deltas = []
            if len(foreseen) == len(self.steps):
                raise _Enough
            return stock(output, timestep, sample, *args, **kwargs)

        stock = self.pipe.scheduler.step
        with _replaced_step(self.pipe.scheduler, step):
            yield

    def _decode(self, prompt: int, latents: list[torch.Tensor], template: Any) -> list[torch.Tensor]:
        """Samples of x0 latents [1, ...], by the pipeline's own ending."""
        samples: list[torch.Tensor] = []
        for i in range(0, len(latents), self.rows):
            part = torch.cat(latents[i : i + self.rows])

            def step(
                output: torch.Tensor, timestep: Any, sample: torch.Tensor, *_: Any, part: Any = part, **kwargs: Any
            ) -> Any:
                given = part.to(sample.dtype)
                return (given, given) if kwargs.get("return_dict") is False else SimpleNamespace(prev_sample=given)

            with apply(self.pipe, _Idle(template)), _replaced_step(self.pipe.scheduler, step):
                samples += list(self.generate(prompt, len(part), num_inference_steps=1))
        return samples


class _Enough(Exception):
    """The probe has seen its last step."""


class _Idle(Plugin):
    """Answers a denoiser's forward with zeros: its answer will not be used."""

    def __init__(self, template: Any) -> None:
        self.template = template

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Denoise) -> Any:
        """Zeros of the right shape."""
        _, batch = batch_of(args, kwargs)
        return map_leaves(lambda t: t.expand(batch, *t.shape[1:]), self.template)


@contextlib.contextmanager
def _replaced_step(scheduler: Any, step: Callable[..., Any]) -> Iterator[None]:
    before = scheduler.__dict__.get("step")
    scheduler.step = step
    try:
        yield
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before


def _fit(delta: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """A delta in the form of the combined output, which may have dropped learned variances."""
    if delta.shape == output.shape[1:]:
        return delta.to(output.dtype)[None]
    return delta[: output.shape[1]].to(output.dtype)[None]


def denoised(scheduler: Any, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> torch.Tensor:
    """The clean latents that a prediction foresees.

    Args:
        scheduler: a diffusers scheduler with its timesteps set.
        output: prediction [B, ...] in the scheduler's own kind: flow, epsilon, v_prediction or sample.
        timestep: the step's timestep.
        sample: noisy latents.

    Raises:
        GenAttnError: for a scheduler or kind of prediction that is not known.
    """
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    name = type(scheduler).__name__
    if name.startswith("FlowMatch") or kind == "flow_prediction":
        return sample - _sigma(scheduler, timestep).to(sample) * output
    if kind == "sample":
        return output
    if kind not in ("epsilon", "v_prediction"):
        raise GenAttnError(f"the probe needs flow, epsilon, v or sample predictions, got {kind!r} of {name}; use no probe")
    if name.startswith(("Euler", "Heun", "LMS", "KDPM")):
        sigma = _sigma(scheduler, timestep).to(sample)
        if kind == "epsilon":
            return sample - sigma * output
        return sample / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()
    if not hasattr(scheduler, "alphas_cumprod"):
        raise GenAttnError(f"the probe must know the scheduler's noise level, got {name}; use no probe")
    kept = scheduler.alphas_cumprod[int(timestep)].to(sample)
    if kind == "epsilon":
        return (sample - (1 - kept).sqrt() * output) / kept.sqrt()
    return kept.sqrt() * sample - (1 - kept).sqrt() * output


def _sigma(scheduler: Any, timestep: Any) -> torch.Tensor:
    places = torch.nonzero(scheduler.timesteps.cpu() == torch.as_tensor(timestep).cpu())
    found: torch.Tensor = scheduler.sigmas[int(places[0])]
    return found
