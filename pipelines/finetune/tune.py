"""LoRA fine-tuning of a stock video pipeline at a length it was not trained for, with sparse attention in both directions.

    clips + captions -> latents, once -> LoRA on q, k, v, o through the pattern's backward -> pytorch_lora_weights.safetensors

Radial Attention, arXiv 2506.19852: rank 128, first two blocks dense while training. Everything random comes from
the seed and the step, so a run that was killed at any moment and started again ends with the same weights.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import genattn
from genattn.errors import GenAttnError
from genattn.fingerprint import model_fingerprint, named_file, place_of, precision
from genattn.one_writer import only_writer
from genattn.patterns.pattern import Pattern
from genattn.patterns.profiled import ProfiledPattern
from genattn.pipelines.finetune.cache import ClipSize, LatentCache, load_clip
from genattn.pipelines.finetune.data import Dataset
from genattn.pipelines.finetune.lora import LoraTrainer, add_lora, save_lora, why_no_lora
from genattn.pipelines.finetune.loss import TrainingDraw, denoising_loss, draw, training_grid
from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, FrameDenoiser, frame_denoiser, why_no_frames
from genattn.pipelines.long_video.solvers.noise_grid import NoiseGrid
from genattn.pipelines.training.trainer import TrainSettings, train
from genattn.reading import read_json
from genattn.seam.context_parallel import enable_ulysses
from genattn.whole_file import write_whole

OnSave = Callable[[Any, int], None]
CHECKPOINT = "training.safetensors"


@dataclass(frozen=True)
class FinetuneSettings:
    """What to train.

    Attributes:
        size: frames, height and width of the clips in pixels.
        lora_rank: >= 1.
        lora_alpha: > 0; the rank when None.
        dense_layers: first blocks kept dense while training, >= 0.
        batch: clips per step and process, >= 1.
        caption_dropout: share of steps without the caption, in [0, 1].
        gradient_checkpointing: recompute blocks in the backward pass; less memory, a third more time.
        mixed_precision: "no", "bf16" or "fp16".
        context_parallel: GPUs that share one clip's tokens, >= 1.
        training: steps, rate, seed, saving.
    """

    size: ClipSize
    lora_rank: int = 128
    lora_alpha: float | None = None
    dense_layers: int = 2
    batch: int = 1
    caption_dropout: float = 0.1
    gradient_checkpointing: bool = True
    mixed_precision: str = "no"
    context_parallel: int = 1
    training: TrainSettings = field(default_factory=lambda: TrainSettings(1000, learning_rate=1e-4, ema=0.98))

    def __post_init__(self) -> None:
        if min(self.batch, self.context_parallel, *asdict(self.size).values()) < 1 or self.dense_layers < 0:
            raise GenAttnError(f"sizes, batch and context_parallel must be >= 1, dense_layers >= 0, got {self}")
        if not 0 <= self.caption_dropout <= 1:
            raise GenAttnError(f"caption_dropout must be in [0, 1], got {self.caption_dropout}")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise GenAttnError(f"mixed_precision must be no, bf16 or fp16, got {self.mixed_precision!r}")

    def identity(self, pattern: Pattern | None) -> dict[str, Any]:
        """What must stay the same for a run to go on: all but the clock."""
        facts = asdict(self)
        for name in ("minutes", "save_minutes"):
            facts["training"].pop(name)
        return facts | {"pattern": repr(pattern)}


@dataclass(frozen=True)
class FinetuneResult:
    """steps: done in all. weights: the LoRA's file. clips: trained on. skipped: (name, reason). sparse: calls, share."""

    steps: int
    weights: Path
    clips: int
    skipped: tuple[tuple[str, str], ...]
    sparse: str


def finetune(
    pipe: Any,
    dataset: Dataset,
    pattern: Pattern | None,
    settings: FinetuneSettings,
    out: Path,
    on_save: OnSave | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> FinetuneResult:
    """Train a LoRA into out/lora, going on where out/training.safetensors stopped. The pipeline is left with the LoRA on it.

    Args:
        pipe: a stock text-to-video pipeline with one transformer and a stock LoRA loader.
        dataset: from `find_clips`; clips that cannot be read are moved to its `skipped`.
        pattern: None trains dense.
        out: folder of this run: cache/, lora/, settings.json, skipped.txt.
        on_save: called with (pipe, step) after each checkpoint, the averaged LoRA in place: to draw samples. Of data-parallel
            processes the first calls it.
        progress: called with the number of clips encoded.

    Raises:
        GenAttnError: before training starts, for a pipeline, dataset, size or earlier run that does not fit, and for a folder
            that another run writes.
    """
    base = _base(pipe, settings)
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=base.device.type == "cpu")
    with only_writer(out, "folder") if accelerator.is_main_process else contextlib.nullcontext():
        return _trained(pipe, base, accelerator, dataset, pattern, settings, out, on_save, progress)


def _trained(
    pipe: Any,
    base: FrameDenoiser,
    accelerator: Accelerator,
    dataset: Dataset,
    pattern: Pattern | None,
    settings: FinetuneSettings,
    out: Path,
    on_save: OnSave | None,
    progress: Callable[[int], None],
) -> FinetuneResult:
    """`finetune` in a folder that is held."""
    enable_ulysses(pipe.transformer, settings.context_parallel, _tokens(base, settings.size))
    identity = {
        **settings.identity(pattern),
        "model": model_fingerprint({"transformer": pipe.transformer, "vae": pipe.vae}),
        "precision": precision(pipe),
        "device": place_of(pipe).partition(":")[0],
        "genattn": genattn.__version__,
        "maps": [named_file(path) for path in _maps(pattern)],
        "data": dataset.fingerprint(),
    }
    _same_run(out, identity)  # before anything is encoded
    cache = LatentCache(base, out / "cache", settings.size)
    files = cache.fill(dataset, progress)
    # their names tell the content of every clip and the weights that encoded it
    identity["encoded"] = hashlib.sha256(" ".join(file.stem for file in files).encode()).hexdigest()[:16]
    _same_run(out, identity)
    if accelerator.is_main_process:
        _note(out, identity)
    if accelerator.is_main_process:
        write_whole(out / "skipped.txt", "".join(f"{name}\t{reason}\n" for name, reason in dataset.skipped))
    batches = Batches(files, cache.empty_prompt(), settings, accelerator)
    grid = training_grid(base, batches.latent_shape)
    set_seed(settings.training.seed)
    add_lora(pipe.transformer, settings.lora_rank, settings.lora_alpha or settings.lora_rank)
    if settings.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()

    def loss(latents: torch.Tensor, embeds: Embeds, random: Any) -> torch.Tensor:
        # the ranks of one clip each hold the gradient of their tokens, and accelerate averages over ranks
        return denoising_loss(base, grid, latents, embeds, random) * settings.context_parallel

    def loss_of(model: Any, step: int, generator: torch.Generator) -> torch.Tensor:
        latents, embeds = batches.draw(generator)
        return model(latents, embeds, batches.noise(grid, generator))

    def saved(model: Any, step: int) -> None:
        if accelerator.is_main_process:
            save_lora(pipe, out / "lora", {"steps": step, **settings.identity(pattern)})
        # a clip whose tokens are shared takes every process to sample, too
        if on_save is not None and (accelerator.is_main_process or settings.context_parallel > 1):
            on_save(pipe, step)

    with _pattern_on(pipe, pattern, settings.dense_layers) as told:
        trainer = LoraTrainer(pipe.transformer, loss)
        steps = train(trainer, loss_of, settings.training, accelerator, out / CHECKPOINT, saved)
        sparse = told()
    return FinetuneResult(steps, out / "lora" / "pytorch_lora_weights.safetensors", len(files), tuple(dataset.skipped), sparse)


class Batches:
    """Random batches of cached clips; each process of a data-parallel run gets clips of its own.

    Args:
        files: cached clips, all of one size.
        empty: embeddings of the empty prompt.
    """

    def __init__(self, files: Sequence[Path], empty: Embeds, settings: FinetuneSettings, accelerator: Accelerator) -> None:
        self.files, self.empty, self.settings, self.device = list(files), empty, settings, accelerator.device
        shared = settings.context_parallel > 1  # then all processes work on the same clip
        self.world: int = 1 if shared else accelerator.num_processes
        self.rank: int = 0 if shared else accelerator.process_index
        first = load_clip(self.files[0])[0]
        if first is None:
            raise GenAttnError(f"the cached clip {self.files[0]} holds no latents; delete the cache and start again")
        self.latent_shape = tuple(first.shape)

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, Embeds]:
        """Latents [B, C, F, h, w] and embeddings with batch B, on the device. Some captions are left out."""
        count = self.settings.batch * self.world
        chosen = torch.randint(len(self.files), (count,), generator=generator).tolist()
        dropped = (torch.rand(count, generator=generator) < self.settings.caption_dropout).tolist()
        mine = slice(self.rank * self.settings.batch, (self.rank + 1) * self.settings.batch)
        latents, texts = [], []
        for index, drop in zip(chosen[mine], dropped[mine]):
            clip, embeds = load_clip(self.files[index])
            if clip is None or tuple(clip.shape) != self.latent_shape:
                raise GenAttnError(f"cached clips must be of one size, {self.latent_shape}, but {self.files[index]} is not")
            latents.append(clip)
            texts.append(self.empty if drop else embeds)
        stacked = {name: torch.cat([text[name] for text in texts]).to(self.device) for name in texts[0]}
        return torch.stack(latents).to(self.device), stacked

    def noise(self, grid: NoiseGrid, generator: torch.Generator) -> TrainingDraw:
        """Noise and levels of this process' clips: its part of what one process would draw for all of them."""
        count = self.settings.batch
        everyone = draw(grid, (count * self.world, *self.latent_shape), generator)
        mine = slice(self.rank * count, (self.rank + 1) * count)
        return TrainingDraw(everyone.noise[mine], everyone.levels[mine])


def trainable(pipe: Any) -> FrameDenoiser:
    """The pipeline as training sees it. Raises GenAttnError with the reason when it cannot be fine-tuned."""
    reason = why_no_lora(pipe) or why_no_frames(pipe)
    if reason is not None:
        raise GenAttnError(f"cannot fine-tune: {reason}")
    return frame_denoiser(pipe)


def longer(base: FrameDenoiser, frames: int, factor: float) -> int:
    """The length the autoencoder can end on that is nearest to `factor` times `frames`, whole latents.

    Raises GenAttnError unless the factor is positive.
    """
    if not 0 < factor < math.inf:
        raise GenAttnError(f"frames_factor must be > 0 and finite, got {factor}")
    decoder = base.decoder()
    return decoder.frames_for(max(1, round((decoder.latents_for(frames) - 1) * factor) + 1))


def _base(pipe: Any, settings: FinetuneSettings) -> FrameDenoiser:
    base = trainable(pipe)
    places = base.latent_size(settings.size.height, settings.size.width)
    decoder = base.decoder()
    latents = decoder.latents_for(settings.size.frames)
    reason = base.limits(latents)
    if reason is not None:
        raise GenAttnError(f"cannot fine-tune at {settings.size.frames} frames of {places[0]} x {places[1]} latents: {reason}")
    return base


def _tokens(base: FrameDenoiser, size: ClipSize) -> int:
    """Video tokens of one clip."""
    height, width = base.latent_size(size.height, size.width)
    patch = base.pipe.transformer.config.get("patch_size", 1)
    _, rows, columns = patch if isinstance(patch, (list, tuple)) else (1, patch, patch)
    return base.decoder().latents_for(size.frames) * (height // rows) * (width // columns)


def _maps(pattern: Pattern | None) -> list[str]:
    """The files of the maps in a pattern."""
    if isinstance(pattern, ProfiledPattern):
        return [pattern.path]
    return [path for part in getattr(pattern, "patterns", ()) for path in _maps(part)]


def _same_run(out: Path, identity: dict[str, Any]) -> None:
    """Refuse to go on where a run was begun with other settings, as far as `identity` names them."""
    path, wanted = out / "settings.json", json.loads(json.dumps(identity))
    if (out / CHECKPOINT).is_file():
        if not path.is_file():
            raise GenAttnError(
                f"{out} holds a run whose settings.json is gone: what it was begun with is not known; give another --out"
            )
        before = read_json(path, "the settings of a run")
        if not isinstance(before, dict):
            raise GenAttnError(f"{path} must hold an object, got {type(before).__name__}; it was changed by hand")
        other = [name for name in sorted(wanted) if before.get(name) != wanted[name]]
        if other:
            told = ", ".join(f"{name} was {before.get(name)!r}" for name in other)
            raise GenAttnError(f"{out} holds a run with other settings ({told}); give the same ones or another --out")


def _note(out: Path, identity: dict[str, Any]) -> None:
    write_whole(out / "settings.json", json.dumps(identity, indent=2) + "\n")


@contextlib.contextmanager
def _pattern_on(pipe: Any, pattern: Pattern | None, dense_layers: int) -> Iterator[Callable[[], str]]:
    """The pattern on the pipeline for the time of training; gives what tells how sparse it was."""
    if pattern is None:
        yield lambda: "dense"
        return
    with genattn.apply(pipe, pattern, dense_steps=0, dense_layers=dense_layers) as handle:
        yield lambda: handle.report().verdict
