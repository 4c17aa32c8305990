"""The Profile node: ComfyUI's own sampler runs the dense MODEL a few times under the recorder of `genattn profile`."""

from pathlib import Path
from typing import Any

import torch

from genattn.apps.comfyui.hosts.families import host_of
from genattn.apps.comfyui.patching.chain import Chain
from genattn.apps.comfyui.patching.seam import patch_model
from genattn.apps.comfyui.pictures import to_image
from genattn.apps.comfyui.schema import Answer
from genattn.errors import GenAttnError
from genattn.one_writer import only_writer
from genattn.profiling.draw import draw_profile
from genattn.profiling.profile import BANDS, CHECKS, SAMPLES, Profile
from genattn.profiling.recorder import Recorder
from genattn.selection.profile_map import write_map


def output_place(name: str) -> Path:
    """The file of a map in ComfyUI's output folder. Raises GenAttnError for a name that leads out of it."""
    import folder_paths

    folder = Path(folder_paths.get_output_directory()).resolve()
    place = (folder / f"{name.strip()}.safetensors").resolve()
    if not name.strip() or folder not in place.parents:
        raise GenAttnError(f"name must be that of a file in the output folder, got {name!r}; for example genattn_map")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def write_profile(
    model: Any,
    positive: Any,
    negative: Any,
    latents: torch.Tensor,
    seed: int,
    sampling_steps: int,
    cfg: float,
    runs: int,
    density: float,
    name: str,
) -> Answer:
    """Measure and write the map; gives its path, a picture and a table.

    Raises GenAttnError for a name outside the folder, and for one that another run writes at this moment.
    """
    from comfy.utils import ProgressBar

    place, bar = output_place(name), ProgressBar(runs + CHECKS)
    with only_writer(place, "name"):
        recorder = Recorder(BANDS, SAMPLES)
        bare = model.clone()
        bare.model_options.setdefault("transformer_options", {})["genattn"] = Chain()
        recorded = patch_model(bare, recorder)
        for number in range(runs + CHECKS):
            if number == runs:
                recorder.fit()
            _sample(recorded, positive, negative, latents, seed + number % runs, sampling_steps, cfg)
            if number < runs:
                recorder.check_seen()
            bar.update_absolute(number + 1, runs + CHECKS)
        # under the name of the class that holds the same weights in diffusers: the map serves there too
        recorder.model = host_of(model.model.diffusion_model).diffusers
        found = Profile(recorder.map(density, runs), write_map(recorder.map(density, runs), place))
    row = "layer {layer}: {density:.1%} of the scores, expected error {error:.3f}"
    lines = [row.format(**values) for values in found.rows()]
    told = "\n".join([f"map: {found.path}", f"{found.density:.1%} of the scores", *lines])
    picture = to_image(draw_profile(found.map))
    return Answer((str(found.path), picture, told), told, picture)


def _sample(model: Any, positive: Any, negative: Any, latents: torch.Tensor, seed: int, steps: int, cfg: float) -> None:
    import comfy.sample

    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    empty = comfy.sample.fix_empty_latent_channels(model, latents)
    if empty.shape != latents.shape:
        noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(seed))
    comfy.sample.sample(model, noise, steps, cfg, "euler", "simple", positive, negative, empty, disable_pbar=True, seed=seed)
