"""SoftPAG, PAG and SEG on ComfyUI's own models: the heads and the arithmetic of `genattn.guidance`, ComfyUI's way of calling.

    denoised + (x - sigma * ...)      with v = (x - denoised) / sigma for the model's prediction:
    v_guided = v_cfg + w (v_cond - v_perturbed)          arXiv 2506.10978, eq. 5

A post-CFG function runs the conditional samples once more, with the heads perturbed by the same plugin that perturbs them in
diffusers, and adds the difference. Such functions stack, so several terms add up, and ComfyUI's CFG is left as it is.
"""

from dataclasses import replace
from typing import Any

import torch

from genattn.apps.comfyui.hosts.families import host_of
from genattn.apps.comfyui.patching.seam import PASS, chain_of, patch_model, run_of
from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.softpag.softpag import SoftPAG


def guide_model(model: Any, softpag: SoftPAG) -> Any:
    """A clone of ComfyUI's MODEL guided by `softpag`, on top of whatever is on it.

    Raises GenAttnError when the model does not have the heads.
    """
    patched = patch_model(model, softpag)
    patched.set_model_sampler_post_cfg_function(GuidedStep(softpag))
    return patched


def head_set_for(model: Any, heads: HeadSet) -> HeadSet:
    """A head set found on the diffusers model of the same weights, as this MODEL wants it.

    Raises GenAttnError when it was found on another family or another number of layers or heads.
    """
    inner = model.model.diffusion_model
    host = host_of(inner)
    layers = {site.depth: site.heads for site in host.sites(inner)}
    heads.check_model(layers, host.diffusers)
    return replace(heads, model="")


class GuidedStep:
    """ComfyUI's post-CFG function of one guidance term."""

    def __init__(self, softpag: SoftPAG) -> None:
        self.softpag = softpag

    def __deepcopy__(self, memo: dict[int, Any]) -> "GuidedStep":
        return self

    def __call__(self, args: dict[str, Any]) -> torch.Tensor:
        """The guided denoised latents of a step."""
        options = args["model_options"]
        inner = args["model"].diffusion_model
        run = run_of(inner, {**options.get("transformer_options", {}), "sigmas": args["sigma"], "cond_or_uncond": [0]})
        rule, denoised = self.softpag.rule, args["denoised"]
        weight = rule.weight(run) if self.softpag.window.contains(run) else 0.0
        if not weight:
            return denoised  # type: ignore[no-any-return]
        sigma = args["sigma"].reshape(-1, *[1] * (denoised.ndim - 1))
        clean, perturbed = ((args["input"] - x) / sigma for x in (args["cond_denoised"], self._perturbed(args, run)))
        delta, _ = rule.delta(clean, perturbed, weight)
        return denoised - sigma * delta  # type: ignore[no-any-return]

    def _perturbed(self, args: dict[str, Any], run: Any) -> torch.Tensor:
        """The conditional answer with heads perturbed, in a pass of its own."""
        from comfy.model_patcher import create_model_options_clone
        from comfy.samplers import calc_cond_batch

        tapped = self.softpag.model(run.model)
        batch = len(args["input"])
        options = create_model_options_clone(args["model_options"])
        options.setdefault("transformer_options", {})[PASS] = "softpag"
        with self.softpag.marking(replace(run, extra="softpag"), tapped.mix(batch, torch.arange(batch))):
            (answer,) = calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        self.softpag.counts["extra_passes"] += 1
        missed = tapped.missed()
        if missed:
            removed = chain_of(args["model"].current_patcher).tally.removed
            raise GenAttnError(
                f"every selected layer's attention must come by, got no call from layers {missed}; "
                f"{removed or 'another node computes them otherwise: choose other layers'}"
            )
        self.softpag.counts["guided_steps"] += 1
        return answer  # type: ignore[no-any-return]
