"""What training reads of a clip, computed once: latents and text embeddings as one safetensors file per clip.

A file's name is a hash of the clip's bytes, its caption, the size and the weights that encoded it, so that a changed clip, size
or autoencoder is encoded anew and nothing stale is read. Files appear only when they are whole.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from genattn.errors import GenAttnError
from genattn.fingerprint import model_fingerprint, precision
from genattn.pipelines.finetune.data import ClipSource, Dataset, check_any, read_clip
from genattn.pipelines.finetune.places import with_places
from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, FrameDenoiser
from genattn.whole_file import whole_file

EMPTY = "empty"


@dataclass(frozen=True)
class ClipSize:
    """Pixel frames, height and width of a training clip."""

    frames: int
    height: int
    width: int


class LatentCache:
    """Encoded clips on disk.

    Args:
        base: the pipeline, which encodes; not needed any more once everything is cached.
        folder: where the files are.
        size: of every clip.
    """

    def __init__(self, base: FrameDenoiser, folder: Path, size: ClipSize) -> None:
        self.base, self.folder, self.size = base, folder, size
        parts = {name: getattr(base.pipe, name, None) for name in ("vae", "text_encoder", "text_encoder_2")}
        self._mark = f"{model_fingerprint({k: v for k, v in parts.items() if v is not None})}|{precision(base.pipe)}|{size}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def fill(self, dataset: Dataset, progress: Callable[[int], None] = lambda done: None) -> list[Path]:
        """Encode what is not there yet; one file per clip. Clips that cannot be read move to `dataset.skipped`.

        Raises GenAttnError when none is left.
        """
        files, kept = [], []
        for index, clip in enumerate(dataset.clips):
            try:
                files.append(self._file_of(clip))
                kept.append(clip)
            except GenAttnError as error:
                dataset.skip(clip.name, str(error))
            progress(index + 1)
        dataset.clips = kept
        check_any(dataset)
        return files

    def empty_prompt(self) -> Embeds:
        """Embeddings of the empty prompt, for guidance without a caption."""
        path = self.folder / f"{self._hash(b'', EMPTY)}.safetensors"
        if not path.is_file():
            _save(path, _named(self.encode_text("")))
        return load_clip(path)[1]

    def _file_of(self, clip: ClipSource) -> Path:
        try:
            content = clip.read_bytes()
        except OSError as error:
            raise GenAttnError(f"it cannot be read ({error})") from None
        path = self.folder / f"{self._hash(content, clip.caption)}.safetensors"
        if not path.is_file():
            frames = read_clip(clip, self.size.frames, self.size.height, self.size.width)
            _save(path, {"latents": self.encode_frames(torch.from_numpy(frames)), **_named(self.encode_text(clip.caption))})
        return path

    def _hash(self, content: bytes, caption: str) -> str:
        digest = hashlib.sha256(content)
        digest.update(f"|{caption}|{self._mark}".encode())
        return digest.hexdigest()[:32]

    @torch.no_grad()
    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Clean model latents float32 [C, F, h, w] of uint8 [T, H, W, 3]."""
        video = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return with_places(self.base.encode_frames(video))[0].float().cpu()

    @torch.no_grad()
    def encode_text(self, caption: str) -> Embeds:
        """Embeddings of a caption, batch 1, as the stock pipeline makes them."""
        return {name: value.cpu() for name, value in self.base.encode_prompt(caption, None, guided=False).cond.items()}


def load_clip(path: Path) -> tuple[torch.Tensor | None, Embeds]:
    """(latents float32 [C, F, h, w], None in the empty prompt's file; embeddings with a batch axis of 1).

    Raises GenAttnError for a file that is not whole.
    """
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            latents = file.get_tensor("latents") if "latents" in names else None
            return latents, {n.removeprefix("text."): file.get_tensor(n) for n in names if n.startswith("text.")}
    except (OSError, SafetensorError) as error:
        raise GenAttnError(f"the cached clip {path} cannot be read ({error}); delete it and start again") from None


def _named(embeds: Embeds) -> dict[str, torch.Tensor]:
    return {f"text.{name}": value for name, value in embeds.items()}


def _save(path: Path, tensors: dict[str, Any]) -> None:
    with whole_file(path) as part:
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, part)
