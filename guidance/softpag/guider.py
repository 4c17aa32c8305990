"""SoftPAG for Modular Diffusers: a guider with classifier-free guidance and perturbed heads.

    pred = uncond + g (cond - uncond) + w (cond - perturbed)          arXiv 2506.10978; without CFG: cond + w (cond - perturbed)
    pred = inner(cond, uncond, ...)   + w (cond - perturbed)          with `inner`, any other guider in the place of CFG

The modular loops run one forward per prediction and ask the guider around each. Every pass is known by its label, never by
counting, so it is right with CFG off too. The taps are those of the classic route (`SoftPAG`), put on the denoiser at the
first perturbed pass and taken off after the last step.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import guiders
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg
from torch import nn

from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.heads.names import check_weight
from genattn.guidance.passes.delta import DeltaRule, Projection, Window
from genattn.guidance.softpag.tap import HeadTap
from genattn.seam.handle import Handle, apply
from genattn.seam.plugin import Run
from genattn.seam.report import GenAttnWarning

COND, UNCOND, PERTURBED = "pred_cond", "pred_uncond", "pred_perturbed"


class SoftPAGGuidance(BaseGuidance):
    """Classifier-free guidance plus guidance away from perturbed heads, for `pipe.update_components(guider=...)`.

    Args:
        heads: e.g. "L11H15,L13H17" or "L7"; layers count over all blocks.
        u: how far the heads are drawn towards the target, in [0, 1].
        scale: weight w, any finite number; 0 leaves plain CFG.
        guidance_scale: g of classifier-free guidance, 7.5 when None; 1 runs without it.
        target: see `genattn.guidance.softpag.perturbation`; all but "skip".
        perturb_start: first moment of the perturbation term, fraction of the steps in [0, 1].
        perturb_stop: its last moment, included.
        adaptive: how fast w falls over the run, >= 0.
        rescale: how far cond + w (cond - perturbed) keeps the spread of cond, in [0, 1].
        guidance_rescale: the same for the whole combination, in [0, 1], as in diffusers.
        apg_eta: share of the difference parallel to cond that is kept; None for no projection.
        start: first moment of classifier-free guidance, as in diffusers.
        stop: its end, excluded, as in diffusers.
        enabled: False for plain conditional predictions.
        inner: another guider of diffusers that takes the place of CFG, with settings of its own; guidance_scale,
            guidance_rescale, start and stop are then its business.
    """

    _input_predictions = [COND, UNCOND, PERTURBED]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        *,  # diffusers takes what was given by position for a default and forgets it in `new`
        heads: str,
        u: float = 0.5,
        scale: float = 3.0,
        guidance_scale: float | None = None,
        target: str = "identity",
        perturb_start: float = 0.0,
        perturb_stop: float = 1.0,
        adaptive: float = 0.0,
        rescale: float = 0.0,
        guidance_rescale: float = 0.0,
        apg_eta: float | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        inner: "BaseGuidance | Mapping[str, Any] | None" = None,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.inner = _inner(inner)
        if self.inner is not None:
            given = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale or None}
            own = [name for name, value in {**given, "start": start or None}.items() if value is not None]
            if own or stop != 1.0:
                raise GenAttnError(
                    f"with inner=..., {', '.join([*own, *(['stop'] if stop != 1.0 else [])])} must be its own settings"
                )
            # a file holds names and numbers, no objects
            self.register_to_config(inner={"_class_name": type(self.inner).__name__, **_plain(self.inner)})
        if target == "skip":
            raise GenAttnError("a guider perturbs heads, got target='skip'; use diffusers' SkipLayerGuidance or SoftPAG.stg")
        self.tap = _Tap(heads, u, target)
        self.window = Window(perturb_start, perturb_stop)
        self.rule = DeltaRule(scale, adaptive, rescale, None if apg_eta is None else Projection(apg_eta))
        self.guidance_scale = check_weight(
            "guidance_scale", 7.5 if guidance_scale is None else guidance_scale, 0.0, float("inf")
        )
        self.guidance_rescale = check_weight("guidance_rescale", guidance_rescale)
        self._handles: dict[int, Handle] = {}
        self._unverified: set[int] = set()

    @classmethod
    def from_head_set(cls, head_set: HeadSet, **settings: Any) -> "SoftPAGGuidance":
        """A guider with the heads, scale, target and window of a head set."""
        known = {"scale": head_set.scale, "target": head_set.target}
        window = {"perturb_start": head_set.start, "perturb_stop": head_set.stop}
        return cls(heads=head_set.names(), **{**known, **window, **settings})

    # ---- which passes a step has

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        """A step begins, for the inner guider too."""
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self._tell_if_idle()
        if self.inner is not None:
            self.inner.set_state(step, num_inference_steps, timestep)

    def _tell_if_idle(self) -> None:
        reason = self.window.why_idle(self._run()) if self._enabled else ""
        if reason:
            told = f"genattn: {type(self).__name__} acts at no step of a run of {self._num_inference_steps}: {reason}"
            warnings.warn(told, GenAttnWarning, stacklevel=3)

    def disable(self) -> None:
        """Plain conditional predictions from now on."""
        super().disable()
        if self.inner is not None:
            self.inner.disable()

    def enable(self) -> None:
        """Guide again."""
        super().enable()
        if self.inner is not None:
            self.inner.enable()

    @property
    def labels(self) -> list[str]:
        """The predictions of the current step, in order; those of an inner guider are its first ones."""
        if self.inner is not None:
            wanted = list(self.inner._input_predictions[: self.inner.num_conditions])
        else:
            wanted = [COND, UNCOND] if self._is_cfg_enabled() else [COND]
        return [*wanted, PERTURBED] if self._weight() else wanted

    @property
    def num_conditions(self) -> int:
        """Forwards of the current step."""
        return len(self.labels)

    @property
    def is_conditional(self) -> bool:
        """Whether the pass that is prepared now is given the prompt."""
        if self.inner is not None:
            return self._label() == PERTURBED or self.inner.is_conditional
        return self._label() != UNCOND

    def _label(self) -> str:
        labels = self.labels
        return labels[min(max(self._count_prepared, 1), len(labels)) - 1]

    def _run(self) -> Run:
        known = self._step is not None and self._num_inference_steps is not None
        return Run(step=self._step, num_steps=self._num_inference_steps) if known else Run(step=0, num_steps=1)

    def _weight(self) -> float:
        run = self._run()
        # CFG-Zero* gives 0 in its first steps, on purpose: nothing is to be added to it
        if self._step is not None and self._step < getattr(self.inner, "zero_init_steps", 0):
            return 0.0
        return self.rule.weight(run) if self._enabled and self.window.contains(run) else 0.0

    def _is_cfg_enabled(self) -> bool:
        if not self._enabled or self.guidance_scale == 1.0:
            return False
        if self._num_inference_steps is None:
            return True
        first, end = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
        return first <= self._step < end

    # ---- what modular loops call

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """One batch of inputs per prediction; pairs hold (conditional, unconditional)."""
        if self.inner is not None:
            more = [self._prepare_batch(data, 0, PERTURBED)] if self._weight() else []
            return [*self.inner.prepare_inputs(data), *more]
        return [self._prepare_batch(data, int(label == UNCOND), label) for label in self.labels]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Mapping[str, Any]) -> list[Any]:
        """The same, from the fields of a block state."""
        if self.inner is not None:
            more = [self._prepare_batch_from_block_state(input_fields, data, 0, PERTURBED)] if self._weight() else []
            return [*self.inner.prepare_inputs_from_block_state(data, input_fields), *more]
        return [self._prepare_batch_from_block_state(input_fields, data, int(label == UNCOND), label) for label in self.labels]

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Perturb the heads of the pass that comes, if it is the perturbed one."""
        super().prepare_models(denoiser)
        self.tap.mark_all(None)
        if self._label() != PERTURBED:
            if self.inner is not None:
                self.inner.prepare_models(denoiser)
            return
        if id(denoiser) not in self._handles:
            self._handles[id(denoiser)] = apply(denoiser, self.tap)
            self._unverified.add(id(denoiser))
        tapped = self.tap.model(denoiser)
        tapped.hits.clear()
        # weights of one row hold for any batch
        self.tap.mark_all(tapped.mix(1, torch.arange(1)))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """End the perturbation; after the last step give the denoiser back as it was."""
        if self._label() == PERTURBED:
            self.tap.mark_all(None)
            missed = self.tap.model(denoiser).missed() if id(denoiser) in self._unverified else []
            self._unverified.discard(id(denoiser))  # caches may leave out blocks later
            if missed:
                self.release()
                raise GenAttnError(f"every selected layer's attention must come by, got no call from layers {missed}")
        elif self.inner is not None:
            self.inner.cleanup_models(denoiser)
        last = self._num_inference_steps is None or self._step == self._num_inference_steps - 1
        if last and self._count_prepared >= self.num_conditions:
            self.release()

    def release(self) -> None:
        """Take the taps off; done by itself after the last step, to be called when a run was broken off."""
        self.tap.mark_all(None)
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._unverified.clear()

    def forward(
        self,
        pred_cond: torch.Tensor,
        pred_uncond: torch.Tensor | None = None,
        pred_perturbed: torch.Tensor | None = None,
        **others: torch.Tensor,
    ) -> GuiderOutput:
        """The combination of a step's predictions; `others` are those of the inner guider's own passes."""
        if self.inner is not None:
            mine = {COND: pred_cond, **({} if pred_uncond is None else {UNCOND: pred_uncond}), **others}
            pred = self.inner.forward(**mine).pred
        else:
            pred = pred_cond if pred_uncond is None else pred_uncond + self.guidance_scale * (pred_cond - pred_uncond)
        if pred_perturbed is not None:
            pred = pred + self.rule.delta(pred_cond, pred_perturbed, self._weight())[0]
        if self.guidance_rescale > 0.0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


class _Tap(HeadTap):
    """The guider's: an error or Ctrl-C in the perturbed pass leaves no mark behind."""

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Any) -> Any:
        """Stock's."""
        try:
            return inner(*args, **kwargs)
        except BaseException:
            self.mark_all(None)
            raise


def _inner(given: "BaseGuidance | Mapping[str, Any] | None") -> BaseGuidance | None:
    """The guider inside; a file gives it as {"_class_name": ..., settings}.

    Raises:
        GenAttnError: for what is no guider of diffusers, or one whose combination a further difference cannot be added to.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        settings = {name: value for name, value in given.items() if not name.startswith("_")}
        kind = getattr(guiders, str(given.get("_class_name")), None)
        if not isinstance(kind, type) or not issubclass(kind, BaseGuidance):
            raise GenAttnError(
                f"inner must name a guider of diffusers, got {given.get('_class_name')!r}; e.g. ClassifierFreeGuidance"
            )
        given = kind(**settings)
    if not isinstance(given, BaseGuidance):
        raise GenAttnError(f"inner must be a guider of diffusers, got {type(given).__name__}; e.g. AdaptiveProjectedGuidance()")
    if isinstance(given, SoftPAGGuidance):
        raise GenAttnError(
            "inner must be another guider, got a SoftPAGGuidance; name all heads in one, or take one as SoftPAG plugin"
        )
    if type(given).__name__ == "LTX2Guidance":
        raise GenAttnError(
            "inner must combine predictions of one space, got LTX2Guidance: it works on clean video and audio, each with a "
            "sigma of its own, so a difference of predictions cannot be added; use the SoftPAG plugin on the classic pipeline"
        )
    return given


def _plain(guider: BaseGuidance) -> dict[str, Any]:
    return {name: value for name, value in guider.config.items() if not name.startswith("_")}
