"""Learned scorers from local folders: CLIPScore, PickScore, aesthetic predictors, HPSv2, ImageReward.

Nothing is downloaded: each needs the folder of its weights and says which file or package is missing. They are loaded
at the first call and run where `device` says, a batch at a time.

    clip_score:/models/clip-vit-large-patch14         100 max(cos, 0), arXiv 2104.08718
    pick_score:/models/PickScore_v1                   scaled logits, arXiv 2305.01569; HeadHunter's objective
    aesthetic:/models/clip-vit-large-patch14+/models/aesthetic_linear.safetensors
    hps:/models/HPS_v2.1_compressed.pt                needs the package hpsv2
    image_reward:/models/ImageReward.pt               needs the package image-reward
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.guidance.headhunter.objectives import Objective, as_frames


class ClipScorer:
    """Image-text agreement of a CLIP-like model in a local folder.

    Args:
        folder: a transformers checkpoint (config.json, weights, processor files).
        logits: give the model's own scaled logits (PickScore) instead of 100 max(cos, 0).
        device: where to run; a clip is scored as the mean over its frames.
    """

    def __init__(self, folder: str | Path, logits: bool = False, device: str = "cpu") -> None:
        self.folder, self.logits, self.device = _existing(folder, "config.json"), logits, device
        self._loaded: tuple[Any, Any] | None = None

    def models(self) -> tuple[Any, Any]:
        """(model, processor), loaded once."""
        if self._loaded is None:
            from transformers import AutoModel, AutoProcessor

            model = AutoModel.from_pretrained(self.folder, local_files_only=True).eval().to(self.device)
            self._loaded = model, AutoProcessor.from_pretrained(self.folder, local_files_only=True)
        return self._loaded

    @torch.no_grad()
    def embed_images(self, frames: torch.Tensor) -> torch.Tensor:
        """Unit vectors [T, E] of frames [T, 3, H, W]."""
        model, processor = self.models()
        pixels = processor(images=list(frames.clamp(0, 1).cpu()), return_tensors="pt", do_rescale=False)["pixel_values"]
        return _unit(model.get_image_features(pixel_values=pixels.to(self.device)))

    @torch.no_grad()
    def embed_text(self, prompt: str) -> torch.Tensor:
        """Unit vector [1, E]."""
        model, processor = self.models()
        text = processor(text=[prompt], return_tensors="pt", padding=True, truncation=True).to(self.device)
        return _unit(model.get_text_features(**text))

    def __call__(self, samples: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[float]:
        factor = self.models()[0].logit_scale.exp().item() if self.logits else 100.0
        scores = []
        for sample, prompt in zip(samples, prompts, strict=True):
            cosine = (self.embed_images(as_frames(sample)) @ self.embed_text(prompt).T).mean().item()
            scores.append(factor * (cosine if self.logits else max(cosine, 0.0)))
        return scores


class AestheticScorer:
    """A linear head on CLIP image vectors (the LAION aesthetic predictor).

    Args:
        clip_folder: the CLIP checkpoint.
        head_file: safetensors with one [1, E] weight and one [1] bias.
    """

    def __init__(self, clip_folder: str | Path, head_file: str | Path, device: str = "cpu") -> None:
        from safetensors.torch import load_file

        self.clip = ClipScorer(clip_folder, device=device)
        tensors = load_file(_existing(head_file))
        weights = [t for t in tensors.values() if t.ndim == 2 and len(t) == 1]
        if len(weights) != 1:
            shapes = {name: tuple(t.shape) for name, t in tensors.items()}
            raise GenAttnError(f"an aesthetic head must hold one [1, E] weight, got {shapes} in {head_file}; convert it")
        self.weight = weights[0].float()
        self.bias = next((t.float() for t in tensors.values() if t.numel() == 1), torch.zeros(1))

    def __call__(self, samples: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[float]:
        vectors = [self.clip.embed_images(as_frames(sample)).cpu().float() for sample in samples]
        return [(vector @ self.weight.T + self.bias).mean().item() for vector in vectors]


class PackageScorer:
    """A scorer that its own package runs: HPSv2 or ImageReward.

    Args:
        package: import name of the package.
        weights: its checkpoint file.
        load: (module, path) -> (pictures as PIL, prompt) -> scores of the pictures; called once, when first needed.
    """

    def __init__(self, package: str, weights: str | Path, load: Callable[[Any, str], Callable[[list[Any], str], Any]]) -> None:
        self.weights, self.load = str(_existing(weights)), load
        try:
            self.module = import_module(package)
        except ImportError as error:
            raise GenAttnError(f"this objective needs the package {package}, got {error}; install it") from error
        self._score: Callable[[list[Any], str], Any] | None = None

    def __call__(self, samples: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[float]:
        self._score = self._score or self.load(self.module, self.weights)
        scores = []
        for sample, prompt in zip(samples, prompts, strict=True):
            found = self._score([_pil(frame) for frame in as_frames(sample)], prompt)
            numbers = [float(value) for value in (found if isinstance(found, list | tuple) else [found])]
            scores.append(sum(numbers) / len(numbers))
        return scores


def load_scorer(kind: str, where: str, device: str = "cpu") -> Objective:
    """A learned scorer by kind and path, as `genattn.guidance.headhunter.objectives.load_objective` names them.

    Raises:
        GenAttnError: if its weights or its package are missing.
    """
    if kind in ("clip_score", "pick_score"):
        return ClipScorer(where, logits=kind == "pick_score", device=device)
    if kind == "aesthetic":
        folder, plus, head = where.partition("+")
        if not plus:
            raise GenAttnError(f"aesthetic must be given as CLIP_FOLDER+HEAD.safetensors, got {where!r}; name both")
        return AestheticScorer(folder, head, device)
    if kind == "hps":
        return PackageScorer("hpsv2", where, lambda m, path: lambda pictures, prompt: list(m.score(pictures, prompt, cp=path)))
    return PackageScorer("ImageReward", where, _image_reward)


def _image_reward(module: Any, path: str) -> Callable[[list[Any], str], Any]:
    model = module.load(path)
    return lambda pictures, prompt: model.score(prompt, pictures)


def _pil(frame: torch.Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((frame.clamp(0, 1).movedim(0, -1) * 255).round().to(torch.uint8).cpu().numpy())


def _unit(vectors: Any) -> torch.Tensor:
    # newer transformers wrap the pooled features
    tensor = vectors if isinstance(vectors, torch.Tensor) else vectors.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1)


def _existing(path: str | Path, inside: str = "") -> Path:
    found = Path(path).expanduser()
    if not (found / inside if inside else found).exists():
        raise GenAttnError(
            f"the scorer's weights must lie at {found / inside}, got nothing there; download them and give the local path"
        )
    return found
