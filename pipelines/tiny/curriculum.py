"""What each training step of a tiny video denoiser shows: settled stills, single frames, short windows, whole clips.

step < still_steps      settled stills
every tenth after       stills, lest a single frame be forgotten
step < frame_steps      pieces of clips: single frames, windows of `window_frames`; every `whole_every`-th a whole clip
the rest                whole clips

Of the steps after the first ones every `wander_every`-th shows scenes whose objects stand anywhere, the others settled ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.latents import load_latents
from genattn.pipelines.tiny.text import build_tokenizer, tokenize
from genattn.pipelines.training.places import LATENT_FRAMES, with_positions


@dataclass(frozen=True)
class Curriculum:
    """Which steps show what, and how much of it.

    Attributes:
        still_steps: steps >= 0 that show settled stills before anything else.
        frame_steps: step until which pieces of clips are shown, >= 0; after it, whole clips.
        still_batch: stills in a step, >= 1.
        frame_batch: latent frames in a step of pieces, >= window_frames.
        clip_batch: whole clips in a step, >= 1.
        window_frames: latent frames of every other piece, >= 1; the rest are single frames.
        whole_every: before frame_steps, every which step shows whole clips, >= 1.
        clip_frames: latent frames of a whole clip, >= window_frames.
        wander_every: after still_steps, every which step shows wandering scenes, >= 1; the others show settled ones.
    """

    still_steps: int
    frame_steps: int
    still_batch: int = 32
    frame_batch: int = 40
    clip_batch: int = 8
    window_frames: int = 1
    whole_every: int = 3
    clip_frames: int = LATENT_FRAMES
    wander_every: int = 2

    def __post_init__(self) -> None:
        counts = (self.still_batch, self.clip_batch, self.window_frames, self.whole_every, self.wander_every)
        if min(counts) < 1 or min(self.still_steps, self.frame_steps) < 0:
            raise GenAttnError(
                f"batches, window, whole_every and wander_every must be >= 1 and steps >= 0, got {self}; raise them"
            )
        if self.window_frames > min(self.frame_batch, self.clip_frames):
            raise GenAttnError(f"window_frames must be <= frame_batch and clip_frames, got {self}; shorten the window")

    def kind(self, step: int) -> tuple[str, int]:
        """What a step shows: "stills" or "clips", settled or not, and how many latent frames of each clip (0: all)."""
        settled = "settled-" if step < self.still_steps or step % self.wander_every else ""
        if step < self.still_steps or step % 10 == 0:
            return f"{settled}stills", 0
        if step < self.frame_steps and step % self.whole_every:
            # turn about among the steps that are left, of settled and of wandering scenes alike
            return f"{settled}clips", self.window_frames if step // self.wander_every % 2 else 1
        return f"{settled}clips", 0


def latent_statistics(run_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents, each [C, 1, 1, 1].

    Raises:
        GenAttnError: if phase latents has not measured them.
    """
    path = run_dir / "latents.json"
    if not path.exists():
        raise GenAttnError(f"phase latents must come first, got no {path}; run train --phases latents")
    values = json.loads(path.read_text())
    mean, std = (torch.tensor(values[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, std


class LatentBatches:
    """Random batches of cached latents, normalised, with their tokens; a folder is read when first asked for."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.tokenizer = build_tokenizer()
        self.mean, self.std = latent_statistics(run_dir)
        self.empty = tokenize(self.tokenizer, [""])[0]
        self._loaded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def draw(self, kind: str, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents float32 [batch, C, F, H, W] and token ids [batch, L] from folder `kind`, clips or stills."""
        if kind not in self._loaded:
            latents, captions = load_latents(self.run_dir / kind)
            self._loaded[kind] = latents, tokenize(self.tokenizer, captions)
        latents, ids = self._loaded[kind]
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        return (latents[chosen].float() - self.mean) / self.std, ids[chosen]


def draw_step(
    batches: LatentBatches, curriculum: Curriculum, step: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """What step `step` shows.

    Args:
        batches: the cached latents.
        curriculum: which step shows what.
        step: its number, >= 0.
        generator: CPU generator.

    Returns:
        Latents with their channels of place [B, C, F, H, W], float32, and token ids int64 [B, L].
    """
    kind, frames = curriculum.kind(step)
    if kind.endswith("stills"):
        latents, ids = batches.draw(kind, curriculum.still_batch, generator)
        return with_positions(latents, clip_frames=curriculum.clip_frames), ids
    if not frames:
        latents, ids = batches.draw(kind, curriculum.clip_batch, generator)
        return with_positions(latents, clip_frames=curriculum.clip_frames), ids
    batch = curriculum.frame_batch // frames
    clips, ids = batches.draw(kind, batch, generator)
    first = torch.randint(clips.shape[2] - frames + 1, (batch, 1), generator=generator)
    chosen = first + torch.arange(frames)
    pieces = clips[torch.arange(batch)[:, None], :, chosen].transpose(1, 2)
    return with_positions(pieces, chosen, curriculum.clip_frames), ids
