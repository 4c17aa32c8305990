"""Graphs of the live tests: a family's tiny random model, prompt and latent, and the pack's nodes on it."""

import json
import os
import subprocess
from typing import Any

import pytest
from comfy_server import HERE, Comfy, Graph, Ref

DIRECTORY, PYTHON = os.environ.get("COMFYUI_DIR"), os.environ.get("COMFYUI_PYTHON")
LIVE = [
    pytest.mark.comfyui,
    pytest.mark.skipif(
        not (DIRECTORY and PYTHON),
        reason="COMFYUI_DIR and COMFYUI_PYTHON name no ComfyUI; only the contract test of the node definitions ran",
    ),
]


def rows_of(script: str, *families: str) -> dict[str, dict[str, Any]]:
    """What a script beside this file says about each family, a JSON line each, in ComfyUI's own Python and without a server."""
    done = subprocess.run(
        [str(PYTHON), str(HERE / script), str(DIRECTORY), *families], capture_output=True, text=True, timeout=1800
    )
    assert "{" in done.stdout, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["family"]: row for row in rows}


SPARSE = {
    "pattern": "neighborhood", "decay": 0.2, "window": "3,4,4", "stride": "1", "dense_steps": 0.0, "dense_blocks": "0",
    "impl": "auto", "pattern_options": '{"tail": null}', "sigma_start": 1.0, "sigma_end": 0.0,
    "min_tokens": 0,
}  # fmt: skip
DENSE = {**SPARSE, "pattern": "dense"}
FULL = {**SPARSE, "window": "-1", "dense_blocks": ""}
GUIDE = {
    "method": "softpag", "heads": "L1H0,L2:0.3", "u": 0.5, "scale": 3.0, "target": "identity", "start": 0.0, "stop": 1.0,
    "sigma_start": 1.0, "sigma_end": 0.0, "rescale": 0.0,
}  # fmt: skip
PIPE = {name: value for name, value in SPARSE.items() if not name.startswith("sigma")}
HEADS = {"method": "none", "heads": "L1H0", "u": 0.5, "scale": 2.0, "target": "identity"}
PICTURES = ("tiny_flux", "tiny_sd3", "tiny_sd35m")
BLOCKS = {"tiny_wan": 3, "tiny_hunyuan": 4, "tiny_flux": 4, "tiny_sd3": 4, "tiny_sd35m": 4}


class Scene(Graph):
    """A family's model, prompt and empty latent."""

    def __init__(self, family: str, padding: int = 0, seed: int = 1, **size: int) -> None:
        super().__init__()
        self.family = family
        if family == "tiny_flux":
            self.model = self.node("RigLoad", name=f"{family}.safetensors")
        else:
            self.model = self.node("UNETLoader", unet_name=f"{family}.safetensors", weight_dtype="default")
        told = {"tokens": 16, "width": 4096, "pooled": 2048 if "sd3" in family else 768, "padding": padding, "pooled_seed": 9}
        self.positive = self.node("RigConditioning", seed=seed, **told)
        self.negative = self.node("RigConditioning", seed=2, **told)
        picture = family in PICTURES
        kind, empty = ("EmptySD3LatentImage", {}) if picture else ("EmptyHunyuanLatentVideo", {"length": 17})
        side = 256 if picture else 128
        self.latent = self.node(kind, **{"width": side, "height": side, "batch_size": 1, **empty, **size})

    def sparse(self, widgets: dict[str, Any], model: Ref | None = None) -> Ref:
        """The model with a pattern."""
        window = {"window": "4,4"} if self.family in PICTURES and widgets["window"] == "3,4,4" else {}
        return self.node("GenAttn_SparseAttention", model=model or self.model, **{**widgets, **window})

    def guided(self, model: Ref, **changes: Any) -> Ref:
        """A model with guidance."""
        return self.node("GenAttn_Guidance", model=model, **{**GUIDE, **changes})

    def sample(self, model: Ref, name: str, steps: int = 2, told: bool = False, cfg: float | None = None) -> Ref:
        """Sample and keep the picture; told: with a report whose JSON is shown."""
        if cfg is None:
            cfg = 1.0 if self.family in ("tiny_flux", "tiny_hunyuan") else 2.0
        latent = self.node(
            "KSampler", model=model, seed=5, steps=steps, cfg=cfg, sampler_name="euler", scheduler="simple", denoise=1.0,
            positive=self.positive, negative=self.negative, latent_image=self.latent,
        )  # fmt: skip
        if told:
            found = self.node("GenAttn_Report", model=model, latent=latent)
            self.texts[name] = self.node("RigText", text=found[2])
            latent = found
        self.node("RigSave", images=self.node("RigDecode", latent=latent), name=name)
        return latent

    @property
    def texts(self) -> dict[str, Ref]:
        """Nodes whose text is asked for."""
        return self.__dict__.setdefault("_texts", {})

    def run(self, comfy: Comfy) -> dict[str, Any]:
        """The texts, as JSON where they are."""
        outputs = comfy.run(self.nodes)
        return {name: json.loads(outputs[ref.name]["text"][0]) for name, ref in self.texts.items()}
