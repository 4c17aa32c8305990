"""Go on training an exported tiny-wan: the parts of its folder become the start of a run.

The optimiser's moments are not in the folder and begin anew; the journal is, so that the model card goes on counting.
"""

import json
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
    """Load an exported pipeline's transformer and text encoder, in place, in the model's own precision."""
    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    model.transformer.load_state_dict(transformer.state_dict())
    model.text_encoder.load_state_dict(text_encoder.state_dict())
