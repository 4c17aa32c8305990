"""Pictures of a patched MODEL for ComfyUI: its mask and density, and the error of every block under it; IMAGE tensors."""

import io
import math
from typing import Any

import numpy as np
import torch

from genattn.apps.comfyui.hosts.families import host_of
from genattn.apps.comfyui.hosts.host import Entry
from genattn.apps.comfyui.patching.chain import Chain
from genattn.apps.comfyui.patching.seam import chain_of, patch_model
from genattn.errors import GenAttnError
from genattn.functional.planned import tile_size
from genattn.geometry.token_layout import TokenLayout
from genattn.layouts.site import AttentionSite
from genattn.patterns.dense import DensePattern
from genattn.planning.show import draw_pattern, new_figure
from genattn.seam.plugin import AttentionCall, CallRecord, Inner, Plugin
from genattn.seam.schedule import Schedule
from genattn.seam.sparse_plugin import SparsePlugin


def to_image(figure: Any) -> torch.Tensor:
    """A matplotlib figure as ComfyUI's IMAGE, float32 [1, H, W, 3] in [0, 1]."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    pixels = np.asarray(Image.open(file).convert("RGB"))
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]


def sparse_of(model: Any) -> SparsePlugin:
    """The pattern on a MODEL; raises GenAttnError when there is none."""
    found = [plugin for plugin in chain_of(model).plugins if isinstance(plugin, SparsePlugin)]
    if not found:
        raise GenAttnError("this MODEL carries no sparse attention; put a GenAttn Sparse Attention node before this one")
    return found[-1]


def layout_for(model: Any, latents: torch.Tensor, text_tokens: int) -> TokenLayout:
    """The token order of this MODEL for such latents and so many text tokens."""
    inner = model.model.diffusion_model
    host = host_of(inner)
    text = 0 if not host.text else text_tokens
    tokens = math.prod(host.grid(inner, latents.shape)) + text
    return host.layout(inner, Entry(tuple(latents.shape), text, {}), tokens)


def mask_picture(model: Any, latents: torch.Tensor, text_tokens: int) -> tuple[torch.Tensor, float, str]:
    """(IMAGE, density, description) of the pattern that this MODEL will use for such latents."""
    pattern = sparse_of(model).pattern
    layout = layout_for(model, latents, text_tokens)
    block = tile_size(layout.seqlen, "cuda" if torch.cuda.is_available() else "cpu")
    plan = pattern.plan(layout, block, block)
    figure = draw_pattern(pattern, layout, block=block, plan=plan)
    return to_image(figure), float(plan.density), f"{pattern!r} on {layout.describe()}: density {plan.density:.4f}"


class BlockErrors(Plugin):
    """Answers every call densely, and once more under a pattern, and keeps the relative error of that per block."""

    answers = True

    def __init__(self, sparse: SparsePlugin) -> None:
        self.sparse = SparsePlugin(sparse.pattern, Schedule(dense_steps=0, dense_layers=0), sparse.impl)
        self.rows: list[dict[str, Any]] = []

    def attach(self, model: Any, sites: Any) -> None:
        self.sparse.attach(model, sites)

    def detach(self, model: Any) -> None:
        self.sparse.detach(model)

    def wants(self, site: AttentionSite) -> bool:
        return self.sparse.wants(site)

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        dense = inner(call)
        record = CallRecord()
        out = self.sparse.attention(call.with_tensors(record=record), lambda _: dense)
        error = float((out - dense).float().norm() / dense.float().norm().clamp_min(1e-30))
        self.rows.append(
            {
                "block": call.site.name,
                "depth": call.site.depth,
                "error": error,
                "density": record.density,
                "reason": record.reason,
            }
        )
        return dense


def probe_blocks(model: Any, positive: Any, latents: torch.Tensor, sigma: float, seed: int) -> list[dict[str, Any]]:
    """Relative error of every block's attention under this MODEL's pattern, |sparse - dense| / |dense|, at one noise level.

    One forward; each block gets the inputs that the dense model gives it. Raises GenAttnError without a pattern.
    """
    import comfy.samplers

    if not 0 < sigma <= 1:
        raise GenAttnError(f"sigma must lie in (0, 1], the noise levels of flow models, got {sigma}; 0.5 is the middle")
    sparse = sparse_of(model)
    if isinstance(sparse.pattern, DensePattern):
        raise GenAttnError("the pattern on this MODEL is dense, so there is no error to measure; choose another pattern")
    bare = model.clone()
    bare.model_options["transformer_options"]["genattn"] = Chain()
    probe = BlockErrors(sparse)
    probed = patch_model(bare, probe)

    def once(inner: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], **rest: Any) -> torch.Tensor:
        inner(x, sigmas[:1].expand(len(x)), **extra_args)
        return x

    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    levels = torch.tensor([sigma, 0.0])
    comfy.samplers.sample(
        probed, noise, positive, positive, 1.0, probed.load_device, comfy.samplers.KSAMPLER(once), levels,
        probed.model_options, latent_image=latents, disable_pbar=True, seed=seed,
    )  # fmt: skip
    return probe.rows


def probe_picture(rows: list[dict[str, Any]], title: str) -> torch.Tensor:
    """The errors as bars, block by block, as an IMAGE."""
    figure = new_figure(2)
    axes = figure.add_subplot()
    axes.bar(range(len(rows)), [row["error"] for row in rows], color="#1f4e79")
    axes.set_xticks(range(len(rows)))
    axes.set_xticklabels([row["block"] for row in rows], rotation=90, fontsize=6)
    axes.set_ylabel("relative error of the attention", fontsize=7)
    axes.set_title(title, fontsize=8)
    return to_image(figure)
