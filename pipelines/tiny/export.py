"""Put a training run's averaged weights into a stock `WanPipeline` folder, in 16 bit.

The folder loads with plain `WanPipeline.from_pretrained`. Beside `model_index.json` lies `genattn_defaults.json`: the
size, steps and guidance the model was made for, which the command line takes where the user names none.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.denoiser import FLOW_SHIFT, DenoiserSize, TinyDenoiser
from genattn.pipelines.tiny.text import build_tokenizer
from genattn.pipelines.tiny.vae import widen_latents
from genattn.pipelines.training.places import POSITION_CHANNELS

DEFAULTS_FILE = "genattn_defaults.json"
JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class GenerationDefaults:
    """The settings a model was made for, as `genattn_defaults.json` holds them."""

    height: int = 64
    width: int = 64
    frames: int = 29
    steps: int = 25
    guidance_scale: float = 3.0
    fps: int = 16

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.frames, self.steps, self.fps) < 1 or self.guidance_scale < 0:
            raise GenAttnError(f"sizes, frames, steps and fps must be >= 1 and guidance >= 0, got {self}; correct it")


def assemble(run_dir: Path, size: DenoiserSize | None = None) -> tuple[WanPipeline, int]:
    """The pipeline of a run, in float32, and the number of training steps behind it.

    Args:
        run_dir: folder with vae/, latents.json and transformer.safetensors.
        size: the transformer's size, where it is not the default one.

    Raises:
        GenAttnError: if a phase is missing or the weights are of another size.
    """
    for part in ("vae/config.json", "latents.json", "transformer.safetensors"):
        if not (run_dir / part).exists():
            raise GenAttnError(f"a run must hold {part} before it is exported, got {run_dir} without; train first")
    statistics = json.loads((run_dir / "latents.json").read_text())
    vae = widen_latents(AutoencoderKLWan.from_pretrained(run_dir / "vae", **statistics), POSITION_CHANNELS)
    tokenizer: Any = build_tokenizer()
    config: Any = vae.config
    model = TinyDenoiser(config.z_dim, len(tokenizer), size)
    with safe_open(run_dir / "transformer.safetensors", "pt") as file:
        steps = int(json.loads(file.metadata()["state"])["step"])
        averages = {name.removeprefix("ema."): file.get_tensor(name) for name in file.keys() if name.startswith("ema.")}  # noqa: SIM118
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if shapes != {name: value.shape for name, value in averages.items()}:
        raise GenAttnError(f"the weights must be of size {size or DenoiserSize()}, got others in {run_dir}; say which")
    model.load_state_dict(averages)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder.eval(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        transformer=model.transformer.eval(),
    )
    return pipeline, steps


def export(run_dir: Path, folder: Path, defaults: GenerationDefaults, size: DenoiserSize | None = None) -> int:
    """Write a run's pipeline to `folder`, whole or not at all; returns the number of training steps behind it.

    A README.md already there is kept, and the run's journal goes along, so that training can go on from the folder. The
    transformer and autoencoder are stored in float16; the text encoder, small, in float32, as transformers would load a
    16-bit one in 16 bit.
    """
    pipeline, steps = assemble(run_dir, size)
    for part in (pipeline.transformer, pipeline.vae):
        for parameter in part.parameters():
            parameter.data = parameter.data.half()
    write_pipeline(pipeline, folder, defaults, run_dir)
    return steps


def write_pipeline(pipeline: Any, folder: Path, defaults: GenerationDefaults, run_dir: Path) -> None:
    """A pipeline folder, whole or not at all, with its defaults, a README.md that was there, and the run's journal."""
    half_written = folder.with_name(folder.name + ".part")
    shutil.rmtree(half_written, ignore_errors=True)
    pipeline.save_pretrained(half_written)
    forget_origins(half_written)
    (half_written / DEFAULTS_FILE).write_text(json.dumps(asdict(defaults), indent=2) + "\n")
    for kept in (folder / "README.md", run_dir / JOURNAL):
        if kept.exists():
            shutil.copy2(kept, half_written / kept.name)
    shutil.rmtree(folder, ignore_errors=True)
    half_written.rename(folder)


def forget_origins(folder: Path) -> None:
    """Take the training machine's paths out of the components' configs."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
