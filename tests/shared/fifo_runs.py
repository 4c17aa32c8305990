"""A queue with a stand-in model: what the tests of the queue and of its hooks run."""

import torch

from genattn.pipelines.long_video.queue.fifo import Fifo, WindowAnswer, WindowBatch, start_queue
from genattn.pipelines.long_video.solvers.frame_solvers import solver_from_scheduler


def flow_solver(levels, **extra):
    import diffusers

    return solver_from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), levels, **extra)


def unipc_solver(levels):
    import diffusers

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return solver_from_scheduler(diffusers.UniPCMultistepScheduler(**flow), levels)


def denoise(batch: WindowBatch) -> WindowAnswer:
    """A stand-in model that mixes all frames of a window and knows each frame's level and place in the window."""
    x, levels = batch.latents, batch.levels.to(batch.latents)
    mean = x.mean(2, keepdim=True)
    place = torch.linspace(0, 1, x.shape[2]).reshape(1, 1, -1, 1, 1)
    return WindowAnswer(torch.tanh(0.6 * x + 0.3 * mean + 0.1 * levels[:, None, :, None, None] / 8 + 0.05 * place))


CLIP = (1, 3, 4, 5, 6)


def run(solver, shape, clip, ticks, **extra):
    fifo = Fifo(extra.pop("denoise", denoise), solver, start_queue(shape, solver, clip, seed=7), seed=7, **extra)
    out = [fifo.tick() for _ in range(ticks)]
    return torch.cat([latents for latents, _ in out], 2), [n for _, numbers in out for n in numbers], fifo
