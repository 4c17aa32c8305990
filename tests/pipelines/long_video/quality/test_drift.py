"""Drift: slopes against least squares, the correction against AdaIN, both through a checkpoint."""

import json

import numpy as np
import pytest
import torch
from fifo_runs import CLIP, flow_solver, run

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.quality.drift import DriftCorrection, DriftMonitor, describe_drift, frame_statistics
from genattn.pipelines.long_video.queue.latent_queue import QueueShape


def frames(count=40):
    rng = np.random.default_rng(0)
    base = rng.integers(40, 120, (16, 20, 3))
    return [np.clip(base * (1 + 0.01 * t), 0, 255).astype(np.uint8) for t in range(count)]


def test_slopes_are_least_squares_per_hundred_frames():
    monitor = DriftMonitor()
    seen = {}
    for i, frame in enumerate(frames()):
        monitor.add_frame(i, frame)
        for name, value in frame_statistics(frame).items():
            seen.setdefault(name, []).append(value)
    for name, values in seen.items():
        want = np.polyfit(np.arange(len(values)) / 100, values, 1)[0]
        assert monitor.slopes()[name] == pytest.approx(want, rel=1e-5, abs=1e-5)
    assert monitor.slopes()["brightness"] > 50


def test_statistics_of_simple_pictures():
    grey = frame_statistics(np.full((8, 8, 3), 100, np.uint8))
    assert (grey["red"], grey["contrast"], grey["saturation"]) == (100.0, 0.0, 0.0)
    assert grey["brightness"] == pytest.approx(100, abs=1e-3)
    assert grey["log_sharpness"] == pytest.approx(-3)
    red = frame_statistics(np.tile(np.array([200, 0, 0], np.uint8), (8, 8, 1)))
    assert red["saturation"] == 255
    checker = np.indices((8, 8)).sum(0) % 2 * 255
    assert frame_statistics(np.repeat(checker[..., None], 3, -1).astype(np.uint8))["log_sharpness"] > 4


def test_the_monitor_needs_two_places_and_survives_json():
    monitor = DriftMonitor()
    assert monitor.slopes() == {}
    monitor.add_latent(0, torch.ones(4, 2, 2))
    assert monitor.slopes() == {"latent_mean": 0.0, "latent_std": 0.0}
    monitor.add_latent(100, 3 * torch.ones(4, 2, 2))
    again = DriftMonitor()
    again.load(json.loads(json.dumps(monitor.to_numbers())))
    assert again.slopes() == monitor.slopes()
    assert again.slopes()["latent_mean"] == pytest.approx(2.0)
    assert "bright" in describe_drift({"brightness": 1.0})


def statistics(latents):
    return torch.stack([latents.mean((0, 2, 3, 4)), latents.std((3, 4)).mean((0, 2))])


def test_full_correction_holds_the_first_latents_statistics():
    shape, solver, clip = QueueShape(8, 4), flow_solver(8), torch.randn(CLIP)

    class Fade(DriftCorrection):
        """Every leaving latent comes out a little brighter, then the correction follows."""

        def after_step(self, fifo, stepped):
            stepped = stepped.clone()
            stepped[:, :, fifo.queue.leaving] += 0.02 * fifo.queue.tick
            return super().after_step(fifo, stepped)

    means = {}
    for strength in (0.0, 1.0):
        out = run(solver, shape, clip, 40, hooks=[Fade(strength, reference=2)])[0]
        means[strength] = out.mean((0, 1, 3, 4))
    assert means[0.0][-1] - means[0.0][2] > 0.3
    assert abs(float(means[1.0][-1] - means[1.0][2])) < 0.1


def test_zero_strength_changes_nothing():
    shape, solver, clip = QueueShape(8, 4), flow_solver(8), torch.randn(CLIP)
    plain = run(solver, shape, clip, 20)[0]
    assert torch.equal(run(solver, shape, clip, 20, hooks=[DriftCorrection(0.0)])[0], plain)


def test_the_correction_survives_a_checkpoint_and_refuses_wrong_settings():
    first = DriftCorrection(0.5, reference=3)
    run(flow_solver(8), QueueShape(8, 4), torch.randn(CLIP), 10, hooks=[first])
    again = DriftCorrection(0.5, reference=3)
    again.load(first.to_tensors(), json.loads(json.dumps(first.to_numbers())))
    assert torch.equal(again.goal, first.goal)
    assert again.count == first.count == 3
    with pytest.raises(GenAttnError, match="strength must be 0 to 1"):
        DriftCorrection(2.0)
    with pytest.raises(GenAttnError, match="reference must be >= 1"):
        DriftCorrection(0.5, 0)
