"""Nodes on ComfyUI's own MODEL, for the families in `hosts.families`."""

import json
from dataclasses import asdict
from typing import Any

from genattn.apps.comfyui.fields import HEAD_SET, HEADS, LATER, METHOD, SEED, SIGMAS, SPARSE, TARGET, check_sparse
from genattn.apps.comfyui.schema import Answer, Field, NodeSpec, Out
from genattn.errors import GenAttnError

_CATEGORY = "GenAttn/model"
_MODEL = Field("model", "MODEL", "A video or image model that ComfyUI loaded: Wan, HunyuanVideo, LTX, FLUX, Qwen-Image, ...")
_MODEL_OUT = Out("MODEL", "MODEL", "A patched clone; the model that came in stays as it was.")
_LATENT = Field("latent", "LATENT", "Latents of the size that will be sampled.")


def sparse_attention(model: Any, **widgets: Any) -> tuple[Any, ...]:
    """MODEL with a pattern on its self and joint attention."""
    from genattn.apps.comfyui.patching.known import known_model, percents_as_sigmas
    from genattn.apps.comfyui.patching.seam import patch_model
    from genattn.apps.comfyui.settings import sparse_of

    percents = [widgets.pop(name, None) for name in ("start_percent", "end_percent")]
    window = percents_as_sigmas(model, *percents)
    widgets["sigma_start"], widgets["sigma_end"] = min(widgets["sigma_start"], window[0]), max(widgets["sigma_end"], window[1])
    return (patch_model(model, sparse_of(known_model(model), **widgets)),)


def profile_model(model: Any, positive: Any, negative: Any, latent: dict[str, Any], **widgets: Any) -> Answer:
    """A map of what the layers and heads of a MODEL look at."""
    from genattn.apps.comfyui.profiling import write_profile

    return write_profile(model, positive, negative, latent["samples"], **widgets)


def guidance(
    model: Any,
    method: str,
    heads: str,
    u: float,
    scale: float,
    target: str,
    start: float,
    stop: float,
    sigma_start: float,
    sigma_end: float,
    rescale: float,
    head_set: Any = None,
) -> tuple[Any, ...]:
    """MODEL with SoftPAG, PAG or SEG."""
    from genattn.apps.comfyui.patching.guidance import guide_model, head_set_for
    from genattn.apps.comfyui.settings import guidance_of, sigma_bounds

    known = None if head_set is None else head_set_for(model, head_set)
    bounds = sigma_bounds(sigma_start, sigma_end)
    softpag = guidance_of(
        method, heads, u, scale, known, target=target, start=start, stop=stop, rescale=rescale, **bounds
    )  # fmt: skip
    return (guide_model(model, softpag),)


def nag(
    model: Any, negative: Any, nag_scale: float, nag_tau: float, nag_alpha: float, start_percent: float, end_percent: float
) -> tuple[Any, ...]:
    """MODEL with a negative prompt inside its attention."""
    from genattn.apps.comfyui.patching.nag import nag_model

    given = {"scale": nag_scale or None, "tau": nag_tau or None, "alpha": nag_alpha or None}
    return (nag_model(model, negative, **given, start_percent=start_percent, end_percent=end_percent),)


def fifo_sampler(**settings: Any) -> tuple[Any, ...]:
    """SAMPLER that runs a latent queue."""
    from comfy.samplers import KSAMPLER

    from genattn.apps.comfyui.patching.fifo import FifoSampling, FifoSettings

    return (KSAMPLER(FifoSampling(FifoSettings(**settings))),)


def load_head_set(path: str) -> tuple[Any, ...]:
    """Head set and its names."""
    from genattn.guidance.heads.head_set import HeadSet

    found = HeadSet.load(path)
    return found, found.names()


def check_head_set(cls: type, path: str) -> bool | str:
    """At submit time: is it a head set."""
    try:
        load_head_set(path)
    except GenAttnError as error:
        return str(error)
    return True


def mask_preview(model: Any, latent: dict[str, Any], text_tokens: int) -> Answer:
    """Picture and density of the pattern on a MODEL."""
    from genattn.apps.comfyui.pictures import mask_picture

    image, density, told = mask_picture(model, latent["samples"], text_tokens)
    return Answer((image, density, told), told, image)


def block_probe(model: Any, positive: Any, latent: dict[str, Any], sigma: float, seed: int) -> Answer:
    """Error of every block's attention under the pattern on a MODEL."""
    from genattn.apps.comfyui.pictures import probe_blocks, probe_picture

    rows = probe_blocks(model, positive, latent["samples"], sigma, seed)
    worst = max((row["error"] for row in rows), default=0.0)
    image = probe_picture(rows, f"sparse against dense at sigma {sigma:g}: worst {worst:.3f}")
    return Answer((image, json.dumps(rows, indent=1), worst), None, image)


def report(model: Any, latent: dict[str, Any]) -> Answer:
    """What ran sparse and why not the rest, after the sampler."""
    from genattn.apps.comfyui.hosts.families import host_of
    from genattn.apps.comfyui.patching.nag import nag_of
    from genattn.apps.comfyui.patching.seam import chain_of

    chain, negative = chain_of(model), nag_of(model)
    if not chain.plugins and negative is None:
        raise GenAttnError("this MODEL carries no GenAttn node; connect the patched MODEL that the sampler got")
    inner = model.model.diffusion_model
    sites = host_of(inner).sites(inner) if chain.plugins else []
    found = chain.tally.report(chain.plugins, sites)
    plain = {**found.to_dict(), "removed": chain.tally.removed if chain.plugins else ""}
    lines = [chain.tally.removed, found.table()] if chain.plugins else []
    if negative is not None:
        plain["plugins"] = [*plain["plugins"], negative.describe()]
        lines.append(negative.told())
    told = "\n".join(line for line in lines if line)
    return Answer((latent, told, json.dumps(plain, default=_plain)), told)


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else str(value)


MODEL_NODES = (
    NodeSpec(
        "GenAttn_SparseAttention", "Sparse Attention (GenAttn)", _CATEGORY,
        "Makes attention sparse (Radial, neighborhood, adaptive or profiled) on ComfyUI's video and image models. You choose "
        "blocks, steps and noise levels that stay dense. Works together with other attention overrides.",
        ("radial attention", "neighborhood attention", "gna", "natten", "sparse attention", "speed up", "nabla", "sparge"),
        (_MODEL, *SPARSE, *SIGMAS, *LATER), (_MODEL_OUT,), sparse_attention, check=check_sparse, reads=("path",),
    ),
    NodeSpec(
        "GenAttn_Guidance", "DiT Guidance (GenAttn)", _CATEGORY,
        "Guidance for ComfyUI's video and image models: SoftPAG on chosen heads, PAG or SEG on layers. Costs one more pass per "
        "guided step.",
        ("softpag", "pag", "perturbed attention guidance", "seg", "smoothed energy guidance", "headhunter", "quality"),
        (
            _MODEL, METHOD, *HEADS, TARGET,
            Field("start", "FLOAT", "Guide from this share of the steps on.", 0.0, 0.0, 1.0, 0.01),
            Field("stop", "FLOAT", "Guide up to this share of the steps.", 1.0, 0.0, 1.0, 0.01),
            *SIGMAS,
            Field("rescale", "FLOAT", "Give the result the spread of the unguided one; 0 is off.", 0.0, 0.0, 1.0, 0.05),
            HEAD_SET,
        ),
        (_MODEL_OUT,), guidance,
    ),
    NodeSpec(
        "GenAttn_NAG", "NAG: Negative Prompt (GenAttn)", _CATEGORY,
        "A negative prompt for distilled models at CFG 1. It acts inside the attention over the text, without a second pass.",
        ("nag", "normalized attention guidance", "negative prompt", "distilled", "turbo", "schnell", "cfg 1"),
        (
            _MODEL, Field("negative", "CONDITIONING", "What to keep out of the picture: one encoded prompt."),
            Field("nag_scale", "FLOAT", "How far to move away from it; 0: as the family has it.", 0.0, 0.0, 30.0, 0.1),
            Field("nag_tau", "FLOAT", "How much the attention output may grow; 0: as the family has it.", 0.0, 0.0, 10.0, 0.1),
            Field("nag_alpha", "FLOAT", "Share of the guided output; 0: as the family has it.", 0.0, 0.0, 1.0, 0.01),
            Field("start_percent", "FLOAT", "Act from this share of the sampling on.", 0.0, 0.0, 1.0, 0.01),
            Field("end_percent", "FLOAT", "Act up to this share of the sampling.", 1.0, 0.0, 1.0, 0.01),
        ),
        (_MODEL_OUT,), nag,
    ),
    NodeSpec(
        "GenAttn_FifoSampler", "FIFO Sampler (GenAttn)", _CATEGORY,
        "Video of any length from ComfyUI's own text-to-video Wan: as many frames as the latent has, a window at a time.",
        ("fifo", "long video", "endless video", "infinite", "context window", "freenoise"),
        (
            Field("window", "INT", "Latent frames per window; Wan's 81 frames are 21.", 21, 2, 1024, 1),
            Field("latents_per_level", "INT", "Latents that share a noise level; 1 is FIFO-Diffusion.", 1, 1, 1024, 1),
            Field("lookahead", "BOOLEAN", "Every latent sees half a window of cleaner ones; twice the work.", True),
            Field("eta", "FLOAT", "Share of fresh noise per step.", 0.0, 0.0, 1.0, 0.01),
            Field("window_batch", "INT", "Windows per model call: more is faster and takes more memory.", 1, 1, 64, 1),
        ),
        (Out("SAMPLER", "SAMPLER", "For SamplerCustom, with a schedule that falls to 0."),), fifo_sampler,
    ),
    NodeSpec(
        "GenAttn_HeadSetLoad", "Load Head Set (GenAttn)", _CATEGORY,
        "A file that says which heads to perturb in which model; genattn hunt writes such files.",
        ("head set", "headhunter", "attention heads", "softpag"),
        (Field("path", "STRING", "JSON file of a head set.", ""),),
        (Out("HEADS", "GENATTN_HEADS", "For the guidance nodes."), Out("names", "STRING", "The heads as text.")),
        load_head_set, check=check_head_set, reads=("path",),
    ),
    NodeSpec(
        "GenAttn_MaskPreview", "Mask Preview (GenAttn)", _CATEGORY,
        "What the sparse attention on this MODEL lets see at this size: picture and density, nothing is run.",
        ("mask", "density", "attention map", "pattern"),
        (_MODEL, _LATENT, Field("text_tokens", "INT", "Text tokens in the same sequence; Wan has none.", 256, 0, 8192, 1)),
        (
            Out("IMAGE", "IMAGE", "Tokens, tiles and what one token sees."),
            Out("density", "FLOAT", "Share of the tile pairs that is computed."),
            Out("text", "STRING", "The same in words."),
        ),
        mask_preview, is_output=True,
    ),
    NodeSpec(
        "GenAttn_BlockProbe", "Block Probe (GenAttn)", _CATEGORY,
        "Shows which blocks tolerate sparse attention: one model call computes each block dense and sparse, and gives the "
        "relative error of each.",
        ("error", "probe", "quality", "which blocks", "profile"),
        (
            _MODEL, Field("positive", "CONDITIONING", "The encoded prompt."), _LATENT,
            Field("sigma", "FLOAT", "Noise level at which the model is called.", 0.5, 0.001, 1.0, 0.01), SEED,
        ),
        (
            Out("IMAGE", "IMAGE", "Error per block."),
            Out("json", "STRING", "For each block its error and density, or why it stayed dense."),
            Out("worst", "FLOAT", "Largest relative error."),
        ),
        block_probe, is_output=True,
    ),
    NodeSpec(
        "GenAttn_Profile", "Profile (GenAttn)", _CATEGORY,
        "Runs the MODEL dense a few times, measures what each layer and head looks at, and writes a map for Sparse Attention "
        "with pattern profile. Do it once per model and size.",
        ("profile", "map", "measure", "attention map", "per head"),
        (
            _MODEL, Field("positive", "CONDITIONING", "The encoded prompt."),
            Field("negative", "CONDITIONING", "The encoded negative prompt."), _LATENT, SEED,
            Field("sampling_steps", "INT", "Steps of each run; fewer than usual are enough.", 8, 2, 200, 1),
            Field("cfg", "FLOAT", "Classifier-free guidance of the runs.", 1.0, 1.0, 30.0, 0.1),
            Field("runs", "INT", "Runs, each with other noise. Two more runs check the map.", 2, 2, 16, 1),
            Field("density", "FLOAT", "Share of the scores that the map visits.", 0.3, 0.02, 1.0, 0.01),
            Field("name", "STRING", "File in ComfyUI's output folder.", "genattn_map"),
        ),
        (
            Out("path", "STRING", "The map; connect it to path of Sparse Attention."),
            Out("IMAGE", "IMAGE", "What each layer and head looks at."),
            Out("text", "STRING", "Share and expected error per layer."),
        ),
        profile_model, is_output=True,
    ),
    NodeSpec(
        "GenAttn_Report", "Attention Report (GenAttn)", _CATEGORY,
        "Reports after the sampler what ran sparse, at what density and in what time, why other calls stayed dense, and "
        "whether another node replaced the attention override.",
        ("report", "density", "timing", "why dense", "statistics"),
        (_MODEL, Field("latent", "LATENT", "The sampler's result, which makes this node run after it.")),
        (
            Out("LATENT", "LATENT", "The same latents."),
            Out("text", "STRING", "The report as a table."),
            Out("json", "STRING", "The report for programs."),
        ),
        report, is_output=True,
    ),
)  # fmt: skip
