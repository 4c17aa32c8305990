"""Which samples of a denoiser's forward are the conditional ones, for every way in which pipelines do guidance.

    one batch    [uncond, cond]          SD3, CogVideoX, LTX, Mochi, PixArt   (Z-Image: cond first)
    two calls    cond, then uncond       Wan, HunyuanVideo, Qwen-Image, FLUX with true CFG
    one call     cond                    no CFG, or a guidance-distilled model
    more calls   cond, uncond, others    SD3's skip-layer term, LTX-2's modality term

The extra pass runs for the conditional samples; its delta is added to every answer of the step. Any combination whose
coefficients sum to one, such as uncond + g (cond - uncond), then hands the delta on exactly once, whatever g is.

The pipeline names its passes (`cache_context`); where it does not, two equal halves with different texts are one batch,
and a second call with the same latents at the same step is another pass. What stays ambiguous is refused.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from genattn.errors import GenAttnError
from genattn.guidance.passes.prediction import UNBATCHED, batch_of, take_call
from genattn.layouts.families import family_of
from genattn.seam.plugin import Run

LAYOUTS = ("auto", "single", "uncond_cond", "cond_uncond", "sequential")
_COND_FIRST = ("ZImage", "Lumina")


@dataclass(frozen=True)
class PassRole:
    """Part of a forward in the step's guidance.

    Attributes:
        kind: "cond" holds conditional samples (maybe unconditional ones too), "uncond" only unconditional ones, "other" is
            a further pass of the pipeline's own.
        rows: int64, the conditional samples of a "cond" forward.
        batch: samples of the forward.
        copies: how often the conditional samples stand in `rows`, one set behind the other.
    """

    kind: Literal["cond", "uncond", "other"]
    rows: torch.Tensor
    batch: int
    copies: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether the conditional samples are all samples, in order."""
        return self.rows.tolist() == list(range(self.batch))

    @property
    def others(self) -> torch.Tensor:
        """int64, the samples that are not conditional."""
        mask = torch.ones(self.batch, dtype=torch.bool)
        mask[self.rows] = False
        return torch.nonzero(mask).flatten()

    def spread(self, delta: torch.Tensor) -> torch.Tensor:
        """The delta of the conditional samples for all samples of this forward."""
        copies, rest = divmod(self.batch, len(delta))
        if rest:
            raise GenAttnError(
                f"every pass of a step must hold the conditional samples a whole number of times, got {self.batch} samples "
                f"after {len(delta)}; pass layout='single' if they are independent"
            )
        return delta if copies == 1 else torch.cat([delta] * copies)


@dataclass
class _Seen:
    """The conditional forward of a step."""

    step: tuple[int, float | None]
    latents: torch.Tensor
    inputs: dict[str, torch.Tensor]


class PassReader:
    """Reads the role of each forward of one denoiser; one reader per model and run.

    Args:
        layout: "auto", or what every forward is: "single", "uncond_cond", "cond_uncond", or "sequential" for a conditional
            call followed by others at the same step.
    """

    def __init__(self, layout: str = "auto") -> None:
        if layout not in LAYOUTS:
            raise GenAttnError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}; choose one of those")
        self.layout = layout
        self._seen: _Seen | None = None
        self._halves: dict[tuple[int, str | None, bool | None], bool] = {}

    def role(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], pipe: Any = None) -> PassRole:
        """The role of a forward.

        Args:
            run: the forward's state.
            args: its positional arguments.
            kwargs: its keyword arguments.
            pipe: the pipeline, where there is one.

        Raises:
            GenAttnError: where roles cannot be told apart, or the unconditional pass comes first.
        """
        latents, batch = batch_of(args, kwargs)
        everything = torch.arange(batch)
        kind = self._kind(run, latents, kwargs)
        if kind != "cond":
            return PassRole(kind, everything[:0], batch)
        rows = everything
        if self._is_concatenated(run, latents, batch, kwargs, pipe):
            if batch % 2:
                raise GenAttnError(f"a batch of {self.layout} must be even, got {batch} samples; use layout='single'")
            first = self.layout == "cond_uncond" or (self.layout == "auto" and _cond_comes_first(pipe, run))
            rows = everything[: batch // 2] if first else everything[batch // 2 :]
        stacked = _stack(latents)
        self._seen = _Seen((run.step, run.timestep), stacked.index_select(0, rows.to(stacked.device)), _tensors(kwargs))
        return PassRole("cond", rows, batch)

    def _kind(self, run: Run, latents: Any, kwargs: dict[str, Any]) -> Literal["cond", "uncond", "other"]:
        same_step = self._seen is not None and self._seen.step == (run.step, run.timestep)
        name = run.pass_name or ""
        if self.layout == "sequential":
            return "uncond" if same_step else "cond"
        if self.layout != "auto":
            return "cond"
        if name in ("uncond", "pred_uncond") or (same_step and self._is_repeat(latents, kwargs)):
            if not same_step:
                raise GenAttnError(
                    "the conditional pass of a step must come before the unconditional one, got 'uncond' first; "
                    "use mode='replace_uncond', or another pipeline"
                )
            return "other" if kwargs.get("skip_layers") is not None else "uncond"
        if name and name not in ("cond", "pred_cond", "cond_uncond") and same_step:
            return "other"
        return "cond"

    def _is_repeat(self, latents: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the latents are those of the step's conditional call but something else differs."""
        assert self._seen is not None
        here = _stack(latents)
        if here.shape[1:] != self._seen.latents.shape[1:] or len(here) % len(self._seen.latents):
            return False
        if not torch.equal(here[: len(self._seen.latents)], self._seen.latents):
            return False
        mine, before = _tensors(kwargs), self._seen.inputs
        return kwargs.get("skip_layers") is not None or any(
            name not in before or value.shape != before[name].shape or not torch.equal(value, before[name])
            for name, value in mine.items()
        )

    def _is_concatenated(self, run: Run, latents: Any, batch: int, kwargs: dict[str, Any], pipe: Any) -> bool:
        if self.layout != "auto":
            return self.layout in ("uncond_cond", "cond_uncond")
        if run.samples and batch in (run.samples, 2 * run.samples) and pipe is not None:
            return batch == 2 * run.samples  # the pipeline's own latents say whether guidance doubled them
        if _calls_twice(run):
            return False
        guided = _guided(pipe) if run.in_call else None  # what it keeps of an earlier call says nothing of this loop
        known = (batch, run.pass_name, guided)
        if known not in self._halves:
            # comparing reads from the device, so it is done once per run
            in_three = bool(run.samples) and batch == 3 * (run.samples or 0)
            self._halves[known] = _compare_halves(run.pass_name, _stack(latents), batch, kwargs, guided, pipe is None, in_three)
        return self._halves[known]


def role_among_others(reader: PassReader, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PassRole:
    """The role of a forward inside another plugin's, whose extra passes and copies hold conditional samples only."""
    batch = batch_of(args, kwargs)[1]
    own = batch - len(run.copied)
    if run.copied:  # the reader must see every pass of the pipeline, as the pipeline made it
        args, kwargs = take_call(args, kwargs, torch.arange(own), batch)
        role = reader.role(replace(run, copied=()), args, kwargs, run.pipe)
        return PassRole(role.kind, torch.cat([role.rows, torch.arange(own, batch)]), batch, copies=2)
    if run.extra is not None:
        return PassRole("cond", torch.arange(batch), batch)
    return reader.role(run, args, kwargs, run.pipe)


def _compare_halves(
    name: str | None, latents: torch.Tensor, batch: int, kwargs: dict[str, Any], guided: bool | None, bare: bool, in_three: bool
) -> bool:
    if batch < 2 or guided is False or name in ("cond", "pred_cond"):
        return False
    # samples of one seed: six equal latents are two samples three times, where the pipeline has two
    if in_three or batch % 2 or not _repeats(latents, 2):
        if batch % 3 == 0 and _repeats(latents, 3) and _differs(kwargs, batch, 3):
            raise GenAttnError(
                f"three-way guidance in one batch cannot be told apart, got {batch} samples; "
                "name layout='single' if they are independent"
            )
        if name == "cond_uncond" and guided:
            raise GenAttnError(
                f"a batch of cond and uncond must repeat its latents, got {batch} different samples; name layout="
            )
        return False
    if not _differs(kwargs, batch, 2):
        return bool(guided)
    if bare and name != "cond_uncond":
        raise GenAttnError(
            f"equal latents with different texts may be CFG or one seed with two prompts, got {batch} such samples; "
            "name layout='uncond_cond' or layout='single', or apply to the pipeline"
        )
    return True


def _calls_twice(run: Run) -> bool:
    """Whether pipelines of this family give each guidance pass a call of its own."""
    family = family_of(run.model) if run.model is not None else None
    return run.pipe is not None and family is not None and family.cfg == "two_pass"


def _guided(pipe: Any) -> bool | None:
    """Whether the pipeline does CFG; None where it does not tell."""
    if pipe is None or not isinstance(getattr(type(pipe), "do_classifier_free_guidance", None), property):
        return None
    try:
        return bool(pipe.do_classifier_free_guidance)
    except (AttributeError, TypeError):
        return None


def _cond_comes_first(pipe: Any, run: Run) -> bool:
    named = type(pipe).__name__ if pipe is not None else type(run.model).__name__
    # Lumina 2 calls twice, and its first call is named by what it holds
    return named.startswith(_COND_FIRST)


def _stack(latents: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return latents if isinstance(latents, torch.Tensor) else torch.stack(latents)


def _tensors(kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Everything but the latents and the time that a forward is told as tensors; lists of tensors by position."""
    skipped = UNBATCHED | {"hidden_states", "sample", "x", "timestep", "t"}
    found: dict[str, torch.Tensor] = {}
    for name, value in kwargs.items():
        parts = value if isinstance(value, list | tuple) else [value]
        if name not in skipped:
            found |= {f"{name}.{i}": part for i, part in enumerate(parts) if isinstance(part, torch.Tensor)}
    return found


def _repeats(latents: torch.Tensor, times: int) -> bool:
    """Whether a batch is its first part over and over; only the leading channel, for others may carry the condition."""
    if len(latents) < times:
        return False
    lead = latents.narrow(-1 if latents.ndim == 3 else 1, 0, 1)
    first, *rest = lead.chunk(times)
    return all(torch.equal(first, part) for part in rest)


def _differs(kwargs: dict[str, Any], batch: int, times: int) -> bool:
    """Whether the parts of a batch with repeating latents are told different things."""
    batched = [value for value in _tensors(kwargs).values() if value.ndim and len(value) == batch]
    lists = [value for value in kwargs.values() if isinstance(value, list) and len(value) == batch]
    if any(not _same(value[: batch // times], value[batch // times : 2 * (batch // times)]) for value in batched):
        return True
    return any(any(_unlike(a, b) for a, b in zip(value, value[batch // times :], strict=False)) for value in lists)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first, second)


def _unlike(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape != second.shape or not torch.equal(first, second)
    return bool(first != second)
