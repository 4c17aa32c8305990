"""Go on training an exported tiny-wan: the parts of its folder become the start of a run.

The optimiser's moments are not in the folder and begin anew; the journal is, so that the model card goes on counting.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from transformers import UMT5EncoderModel

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.denoiser import TinyDenoiser
from genattn.pipelines.tiny.export import JOURNAL
from genattn.pipelines.tiny.vae import narrow_latents
from genattn.pipelines.training.places import POSITION_CHANNELS


def adopt(run_dir: Path, folder: Path) -> None:
    """Fill a run with an exported pipeline's autoencoder, latent statistics and journal; what the run has stays.

    Args:
        run_dir: the run to begin; made if missing.
        folder: an exported tiny-wan.

    Raises:
        GenAttnError: if the folder holds no pipeline.
    """
    if not (folder / "model_index.json").exists():
        raise GenAttnError(f"training can go on from a pipeline folder, got {folder} without model_index.json; export one")
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / "vae" / "config.json").exists():
        vae = narrow_latents(AutoencoderKLWan.from_pretrained(folder / "vae"), POSITION_CHANNELS)
        config: Any = vae.config
        statistics = {name: list(config[name]) for name in ("latents_mean", "latents_std")}
        (run_dir / "latents.json").write_text(json.dumps(statistics))
        vae.save_pretrained(run_dir / "vae")
    if (folder / JOURNAL).exists() and not (run_dir / JOURNAL).exists():
        shutil.copy2(folder / JOURNAL, run_dir / JOURNAL)


def start_from(model: TinyDenoiser, folder: Path) -> None:
    """Load an exported pipeline's transformer and text encoder, in place, in the model's own precision.

    A model of finer patches takes what the folder's model does on latents that are even within each coarse patch.
    """
    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    weights = transformer.state_dict()
    if tuple(model.transformer.config.patch_size) == (1, 1, 1):
        weights |= refine_patches(weights)
    model.transformer.load_state_dict(weights)
    model.text_encoder.load_state_dict(text_encoder.state_dict())


def refine_patches(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The embedding and the output layer of a transformer, for patches of a single latent each.

    A fine token's embedding is that of the coarse patch with this latent everywhere; its output is the mean over the
    coarse patch. On latents even within each patch both models do the same, but for their rotary positions.

    Args:
        weights: of a transformer with patches of 1 x p x p.

    Returns:
        The changed weights alone, by their names.
    """
    embedding = weights["patch_embedding.weight"]
    cells = math.prod(embedding.shape[2:])
    return {
        "patch_embedding.weight": embedding.sum((2, 3, 4), keepdim=True),
        # the output's rows are [patch cell, channel]
        "proj_out.weight": weights["proj_out.weight"].unflatten(0, (cells, -1)).mean(0),
        "proj_out.bias": weights["proj_out.bias"].unflatten(0, (cells, -1)).mean(0),
    }
