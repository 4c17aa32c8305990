"""Endless video as a ComfyUI SAMPLER: the latent queue of `genattn.pipelines.long_video.queue.fifo` on ComfyUI's own Wan.

The queue, its windows, the solver and the noise by frame are the ones of the diffusers route. What belongs to ComfyUI is the
forward: a model is called with one noise level per sample, and a wrapper around its network puts in one timestep per frame.
A denoised latent is x - sigma v, so the velocity of every frame is read back from the one level that ComfyUI was told; CFG,
post-CFG guidance and sparse attention are linear in that or act inside, and go on working.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.fifo import Fifo, WindowAnswer, WindowBatch, sample_clip, start_queue
from genattn.pipelines.long_video.queue.latent_queue import QueueShape
from genattn.pipelines.long_video.solvers.frame_solvers import SingleStepSolver
from genattn.pipelines.long_video.solvers.noise_grid import NoiseGrid

KEY = "genattn_fifo"


@dataclass(frozen=True)
class FifoSettings:
    """window: latent frames per forward. The rest as in `latent_queue.QueueShape` and `long_video`."""

    window: int = 21
    latents_per_level: int = 1
    lookahead: bool = True
    eta: float = 0.0
    window_batch: int = 1

    def __post_init__(self) -> None:
        self.shape(1)
        if not 0 <= self.eta <= 1:
            raise GenAttnError(f"eta must be 0 (deterministic) to 1 (all noise fresh), got {self.eta}")
        if self.window_batch < 1:
            raise GenAttnError(f"window_batch must be >= 1, got {self.window_batch}")

    def shape(self, levels: int) -> QueueShape:
        """The queue for a sampler of `levels` steps."""
        return QueueShape(levels, self.window, self.latents_per_level, self.lookahead)


class FifoSampling:
    """ComfyUI's sampler function: `KSAMPLER(FifoSampling(settings))`."""

    def __init__(self, settings: FifoSettings) -> None:
        self.settings = settings

    def __call__(
        self,
        model: Any,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Any = None,
        disable: Any = None,
    ) -> torch.Tensor:
        """As many latent frames as `x` [1, C, T, H, W] has, clean. sigmas: descending, the last one 0."""
        given = dict(extra_args or {})
        base = model.inner_model.inner_model
        self.check(base, x, sigmas, given)
        windows = FrameWindows(model, base, given, noise_grid(base, sigmas))
        solver = SingleStepSolver(windows.grid, self.settings.eta)
        shape = self.settings.shape(solver.num_levels)
        seed = int(given.get("seed") or 0)
        shown = Progress(base, x, solver.num_levels + shape.warm_up_ticks(shape.window) + x.shape[2] // shape.latents_per_level)
        windows.before = shown.wait
        clip = sample_clip(windows, solver, x[:, :, : shape.window], seed=seed)
        shown.step(clip, solver.num_levels)
        fifo = Fifo(
            windows, solver, start_queue(shape, solver, clip, seed=seed), seed=seed, window_batch=self.settings.window_batch
        )
        made: list[torch.Tensor] = []
        while sum(part.shape[2] for part in made) < x.shape[2]:
            left, _ = fifo.tick()
            made.append(left.to(x))
            shown.step(left if left.shape[2] else clip)
        return torch.cat(made, 2)[:, :, : x.shape[2]]

    def check(self, base: Any, x: torch.Tensor, sigmas: torch.Tensor, given: dict[str, Any]) -> None:
        """Raise GenAttnError, before any forward, for what a queue cannot serve."""
        inner, window = base.diffusion_model, self.settings.window
        if "WanModel" not in [cls.__name__ for cls in type(inner).__mro__]:
            raise GenAttnError(
                f"the FIFO sampler needs a model with one timestep per frame, which Wan is, got {type(inner).__name__}; "
                "use a Wan model, or the diffusers nodes' Long Video"
            )
        channels = inner.patch_embedding.weight.shape[1]
        if x.ndim != 5 or channels != x.shape[1]:
            raise GenAttnError(
                f"the FIFO sampler needs a text-to-video Wan, got {channels} input channels for latents {tuple(x.shape)}; "
                "image-to-video reads a clean first frame that no latent far from the start has"
            )
        if x.shape[0] != 1:
            raise GenAttnError(f"the FIFO sampler makes one video at a time, got a batch of {x.shape[0]}; set batch_size to 1")
        if x.shape[2] <= window:
            raise GenAttnError(
                f"FIFO is for videos longer than the window of {window} latent frames, got {x.shape[2]}; "
                "raise the length of the latent or use an ordinary sampler"
            )
        shape = self.settings.shape(len(sigmas) - 1)
        if shape.working < window:
            raise GenAttnError(
                f"the queue must hold the first clip: at least as many steps as the window has latent frames ({window}) over "
                f"latents_per_level ({shape.latents_per_level}), got {shape.num_levels} steps; raise them or narrow the window"
            )
        if float(sigmas[-1]) != 0 or not bool((sigmas[:-1] > sigmas[1:]).all()):
            raise GenAttnError(
                f"sigmas must fall to 0, got {[round(float(s), 4) for s in sigmas]}; use denoise 1 and all steps"
            )
        if given.get("denoise_mask") is not None or given.get("model_options", {}).get("context_handler") is not None:
            raise GenAttnError("the FIFO sampler takes no noise mask and no context windows; it has windows of its own")


def noise_grid(base: Any, sigmas: torch.Tensor) -> NoiseGrid:
    """The sampler's noise levels as the queue wants them, cleanest first."""
    rising = sigmas.double().cpu().flip(0)
    steps = base.model_sampling.timestep(sigmas).double().cpu().flip(0)
    return NoiseGrid(1 - rising, rising, torch.cat([torch.zeros(1, dtype=torch.float64), steps[1:]]), "flow_prediction")


class FrameWindows:
    """Answers windows of the queue with ComfyUI's guider. before: called ahead of every forward."""

    def __init__(self, model: Any, base: Any, given: dict[str, Any], grid: NoiseGrid) -> None:
        from comfy.model_patcher import create_model_options_clone
        from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

        self.model, self.grid = model, grid
        self.before: Callable[[], None] = lambda: None
        self._steps: torch.Tensor | None = None
        options = create_model_options_clone(given.get("model_options", {}))
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self._per_frame, options, is_model_options=True)
        self.given = {**given, "model_options": options}

    def __call__(self, batch: WindowBatch) -> WindowAnswer:
        """The velocity of every frame of a batch of windows."""
        self.before()
        x, rows = batch.latents, batch.levels.cpu() + 1
        self._steps = self.grid.timesteps[rows].to(x)
        sigma = self.grid.sigma[rows].amax(1).to(x)
        clean = self.model(x, sigma, **self.given)
        return WindowAnswer((x - clean) / sigma.reshape(-1, 1, 1, 1, 1))

    def _per_frame(self, executor: Any, x: torch.Tensor, timestep: torch.Tensor, *rest: Any, **named: Any) -> Any:
        """ComfyUI's DIFFUSION_MODEL wrapper: [B] timesteps become [B, F], for each pass of a batch alike."""
        assert self._steps is not None
        steps = self._steps.repeat(x.shape[0] // len(self._steps), 1)
        return executor(x, steps.to(timestep), *rest, **named)


class Progress:
    """ComfyUI's bar, with a preview of the frames that leave; stops when the user interrupts."""

    def __init__(self, base: Any, x: torch.Tensor, total: int) -> None:
        import latent_preview
        from comfy.utils import ProgressBar

        self.bar, self.total, self.done = ProgressBar(total), total, 0
        self.previewer = latent_preview.get_previewer(x.device, base.latent_format)

    def wait(self) -> None:
        """Raise ComfyUI's interrupt when the user asked for it."""
        from comfy.model_management import throw_exception_if_processing_interrupted

        throw_exception_if_processing_interrupted()

    def step(self, latents: torch.Tensor, count: int = 1) -> None:
        """Some steps are done; latents: what to show."""
        self.done = min(self.total, self.done + count)
        preview = self.previewer.decode_latent_to_preview_image("JPEG", latents[:, :, -1:]) if self.previewer else None
        self.bar.update_absolute(self.done, self.total, preview)
