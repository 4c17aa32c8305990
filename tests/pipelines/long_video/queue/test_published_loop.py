"""The queue against FIFO-Diffusion's loop as published, written out in float64: one latent at a time, in place.

timesteps  the front of clean latents is told the smallest one; then one level per latent
windows    from the noisiest end; with lookahead half a clip apart, and only the noisier half of the answer is kept
step       DDIM of every latent between its own level and the one below, with eta (eq. 16 of DDIM)
guidance   Ouroboros eq. 6: the push enters the direction of the noise, not the clean latent
"""

import math

import diffusers
import pytest
import torch
from fifo_runs import run

from genattn.pipelines.long_video.queue.fifo import WindowAnswer, WindowBatch, start_queue
from genattn.pipelines.long_video.queue.frame_noise import frame_noise
from genattn.pipelines.long_video.queue.latent_queue import QueueShape
from genattn.pipelines.long_video.solvers.frame_solvers import FrameSolver, solver_from_scheduler

SEED, TICKS = 7, 9


def answer(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """A stand-in model: mixes the frames of a window, knows each one's timestep and place. x [1, C, F, H, W], times [F]."""
    place = torch.linspace(0, 1, x.shape[2], dtype=x.dtype).reshape(-1, 1, 1)
    times = times.to(x.dtype).reshape(-1, 1, 1) / 1000
    return torch.tanh(0.6 * x + 0.3 * x.mean(2, keepdim=True) + 0.4 * times + 0.1 * place)


def push(x: torch.Tensor) -> torch.Tensor:
    """A stand-in gradient."""
    return 0.2 * torch.cos(3 * x)


class Published:
    """The loop. latents [1, C, front + levels, H, W]; numbers: frame number of the first of them."""

    def __init__(self, scheduler: diffusers.DDIMScheduler, frames: int, lookahead: bool, eta: float, guided: bool) -> None:
        self.times = scheduler.timesteps.flip(0)
        self.kept = scheduler.alphas_cumprod.double()[self.times].tolist()
        self.before = [float(scheduler.final_alpha_cumprod), *self.kept[:-1]]
        self.frames, self.stride = frames, frames // 2 if lookahead else frames
        self.front = frames - self.stride
        self.eta, self.guided = eta, guided

    def level(self, slot: int) -> int:
        return max(slot - self.front, 0)

    def latent(self, x: torch.Tensor, eps: torch.Tensor, pushed: torch.Tensor, level: int, noise: torch.Tensor) -> torch.Tensor:
        a, target = self.kept[level], self.before[level]
        fresh = self.eta * math.sqrt((1 - target) / (1 - a) * (1 - a / target))
        clean = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        direction = eps - math.sqrt(1 - a) * pushed if self.guided else eps
        return math.sqrt(target) * clean + math.sqrt(1 - target - fresh**2) * direction + fresh * noise

    def tick(self, latents: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(the queue moved by one, the latent that left)."""
        slots = latents.shape[2]
        for stop in range(slots, self.frames - 1, -self.stride):
            begin = stop - self.frames
            window = latents[:, :, begin:stop].clone()
            eps = answer(window, self.times[[self.level(slot) for slot in range(begin, stop)]])
            for slot in range(stop - self.stride, stop):
                j, level = slot - begin, self.level(slot)
                noise = frame_noise(SEED, [first + slot], latents[:, :, :1].float(), purpose="step", variants=[level])[:, :, 0]
                latents[:, :, slot] = self.latent(window[:, :, j], eps[:, :, j], push(window)[:, :, j], level, noise)
        left = latents[:, :, self.front : self.front + 1].clone()
        new = frame_noise(SEED, [first + slots], latents[:, :, :1].float(), purpose="tail").double()
        return torch.cat([latents[:, :, 1:], new], 2), left


def scheduler_of(steps: int) -> diffusers.DDIMScheduler:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **betas)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("frames", "partitions", "lookahead"), [(8, 2, True), (8, 2, False), (4, 3, True), (4, 3, False), (8, 1, True)]
)
def test_ticks_equal_the_published_loop(frames: int, partitions: int, lookahead: bool, eta: float, guided: bool) -> None:
    scheduler = scheduler_of(frames * partitions)
    solver: FrameSolver = solver_from_scheduler(scheduler, frames * partitions, eta=eta)
    shape = QueueShape.from_partitions(partitions, frames, lookahead=lookahead)
    published = Published(scheduler, frames, lookahead, eta, guided)

    def denoise(batch: WindowBatch) -> WindowAnswer:
        times = solver.grid.model_timesteps(batch.levels)
        eps = torch.cat([answer(x[None], t) for x, t in zip(batch.latents, times, strict=True)])
        return WindowAnswer(eps, push(batch.latents) if guided else None)

    clip = torch.randn(1, 3, frames, 2, 3, generator=torch.Generator().manual_seed(1))
    queue = start_queue(shape, solver, clip, seed=SEED)
    assert shape.head == published.front
    latents, first, wanted = queue.latents.double(), queue.first_number, []
    for moved in range(TICKS):
        latents, left = published.tick(latents, first + moved)
        wanted.append(left)
    found, _, fifo = run(solver, shape, clip, TICKS, denoise=denoise)
    torch.testing.assert_close(fifo.queue.latents.double(), latents, atol=2e-5, rtol=2e-5)
    # a latent leaves our queue for the film only when it is a frame of it; before that it is a copy that warms the queue up
    film = torch.cat(wanted, 2)[:, :, TICKS - found.shape[2] :]
    torch.testing.assert_close(found.double(), film, atol=2e-5, rtol=2e-5)
