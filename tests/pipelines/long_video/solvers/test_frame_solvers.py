"""Per-frame solvers: each equals its stock scheduler when all frames share a level; mixed levels equal frame by frame."""

import copy

import diffusers
import pytest
import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.solvers import frame_solvers
from genattn.pipelines.long_video.solvers.frame_solvers import SingleStepSolver, solver_from_scheduler
from genattn.pipelines.long_video.solvers.noise_grid import NoiseGrid

# diffusers turns tensors into arrays the old way in its sigma tables
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

CASES = {
    "ddim": (diffusers.DDIMScheduler(**VP, clip_sample=False, steps_offset=1), {}),
    "ddim-v-trailing": (
        diffusers.DDIMScheduler(**VP, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"),
        {"off_grid": True},
    ),
    "ddim-linspace": (diffusers.DDIMScheduler(**VP, clip_sample=False, timestep_spacing="linspace"), {"off_grid": True}),
    "ddim-clip-sample": (diffusers.DDIMScheduler(**VP, clip_sample=True, prediction_type="sample"), {}),
    "ddim-zero-snr": (
        diffusers.DDIMScheduler(
            **VP, clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        {"off_grid": True},
    ),
    "cog-ddim": (diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="leading"), {}),
    "euler": (diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0), {}),
    "euler-terminal": (
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        {"mu": 0.9},
    ),
    "dpm-flow": (diffusers.DPMSolverMultistepScheduler(**FLOW), {}),
    "dpm-flow-heun": (diffusers.DPMSolverMultistepScheduler(**FLOW, solver_type="heun", euler_at_final=True), {}),
    "dpm-order1": (diffusers.DPMSolverMultistepScheduler(**FLOW, solver_order=1), {}),
    "dpm-vp": (diffusers.DPMSolverMultistepScheduler(**VP), {}),
    "unipc-flow": (diffusers.UniPCMultistepScheduler(**FLOW), {}),
    "unipc-bh1": (
        diffusers.UniPCMultistepScheduler(**FLOW, solver_type="bh1", disable_corrector=[0, 2], final_sigmas_type="sigma_min"),
        {},
    ),
    "unipc-order1": (diffusers.UniPCMultistepScheduler(**FLOW, solver_order=1), {}),
    "unipc-vp": (diffusers.UniPCMultistepScheduler(**VP, timestep_spacing="trailing"), {}),
}


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A stand-in denoiser: smooth, nonlinear in the sample and different at every timestep; t [F]."""
    return torch.tanh(0.7 * x + t.to(x).reshape(1, 1, -1, 1, 1) / 1000) + 0.1 * x.roll(1, -1)


def by_level(solver, x, noise=None):
    state = solver.empty_state(x)
    for level in reversed(range(solver.num_levels)):
        levels = torch.full((x.shape[2],), level)
        prediction = model(x, solver.grid.model_timesteps(levels))
        x, state = solver.step(x, prediction, levels, state, None if noise is None else noise[level])
    return x


def stock(scheduler, steps, x, **schedule):
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, **schedule)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.reshape(1).expand(x.shape[2])), t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("name", CASES)
def test_equal_levels_equal_the_stock_scheduler(name, steps):
    scheduler, extra = CASES[name]
    if name == "euler-terminal" and steps == 1:
        pytest.skip("the stock scheduler itself divides by zero for one step with shift_terminal")
    schedule = {"mu": extra["mu"]} if "mu" in extra else {}
    x = torch.randn(1, 2, 3, 4, 4, dtype=torch.float64)
    got = by_level(solver_from_scheduler(scheduler, steps, **extra), x)
    want = stock(scheduler, steps, x, **schedule)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, check_dtype=False)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_equals_stock(eta):
    scheduler = diffusers.DDIMScheduler(**VP, clip_sample=False)
    solver = solver_from_scheduler(scheduler, 8, eta=eta)
    x, noise = torch.randn(1, 2, 3, 4, 4), torch.randn(8, 1, 2, 3, 4, 4)
    want = x
    scheduler.set_timesteps(8)
    for i, t in enumerate(scheduler.timesteps):
        prediction = model(want, t.reshape(1).expand(3))
        want = scheduler.step(prediction, t, want, eta=eta, variance_noise=noise[7 - i]).prev_sample
    torch.testing.assert_close(by_level(solver, x, noise), want, rtol=2e-5, atol=2e-5)


def stock_with_noise(scheduler, steps, x, noise, monkeypatch):
    scheduler.set_timesteps(steps)
    draws = iter(noise.flip(0))
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: next(draws))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.reshape(1).expand(x.shape[2])), t, x).prev_sample
    return x


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.LCMScheduler(),
        diffusers.LCMScheduler(prediction_type="v_prediction", original_inference_steps=40),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        diffusers.FlowMatchLCMScheduler(shift=3.0),
    ],
    ids=["lcm", "lcm-v", "euler-stochastic", "flow-lcm"],
)
def test_few_step_schedules_equal_stock_with_the_same_noise(scheduler, monkeypatch):
    solver = solver_from_scheduler(scheduler, 4)
    assert solver.needs_noise
    x, noise = torch.randn(1, 2, 3, 4, 4), torch.randn(4, 1, 2, 3, 4, 4)
    want = stock_with_noise(scheduler, 4, x, noise, monkeypatch)
    torch.testing.assert_close(by_level(solver, x, noise), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_mixed_levels_equal_frame_by_frame(name):
    scheduler, extra = CASES[name]
    solver = solver_from_scheduler(scheduler, 6, **extra)
    levels = torch.tensor([0, 5, 2, 3])
    x = torch.randn(1, 2, 4, 3, 3, dtype=torch.float64)
    state = {k: torch.randn_like(v) if v.shape[1] > 1 else torch.ones_like(v) for k, v in solver.empty_state(x).items()}
    prediction = torch.randn_like(x)
    together, after = solver.step(x, prediction, levels, state, None)
    for i in range(4):
        one = slice(i, i + 1)
        alone, after_one = solver.step(
            x[:, :, one], prediction[:, :, one], levels[one], {k: v[:, :, one] for k, v in state.items()}, None
        )
        assert torch.equal(together[:, :, one], alone)
        assert all(torch.equal(after[k][:, :, one], after_one[k]) for k in after)


def test_a_latent_without_history_starts_at_order_one():
    # a clip that joins the queue half-way must step as if its sampler had just begun
    for name in ("dpm-flow", "unipc-flow"):
        solver = solver_from_scheduler(CASES[name][0], 6)
        x, prediction = torch.randn(1, 2, 1, 3, 3), torch.randn(1, 2, 1, 3, 3)
        got, _ = solver.step(x, prediction, torch.tensor([3]), solver.empty_state(x), None)
        clean = solver.grid.clean(x, prediction, torch.tensor([3]))
        grid = solver.grid
        keep, gain = grid.sigma[3] / grid.sigma[4], grid.alpha[3] - grid.alpha[4] * grid.sigma[3] / grid.sigma[4]
        torch.testing.assert_close(got, (keep * x + gain * clean).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "ddim-v-trailing", "ddim-clip-sample", "euler", "dpm-vp"])
def test_clean_and_noise_invert_add_noise(name):
    grid = solver_from_scheduler(CASES[name][0], 6).grid
    levels = torch.tensor([0, 2, 5])
    clean, noise = torch.rand(1, 2, 3, 2, 2, dtype=torch.float64), torch.randn(1, 2, 3, 2, 2, dtype=torch.float64)
    noisy = grid.add_noise(clean, levels, noise)
    prediction = grid.prediction_from_clean(noisy, clean, levels)
    torch.testing.assert_close(grid.clean(noisy, prediction, levels), clean)
    torch.testing.assert_close(grid.noise(noisy, prediction, levels), noise)


def test_renoise_in_one_jump_keeps_variance_and_signal():
    torch.manual_seed(1)
    for name in ("ddim", "euler", "dpm-flow"):
        grid = solver_from_scheduler(CASES[name][0], 8).grid
        low, high = torch.tensor([2]), torch.tensor([6])
        clean, n = (
            torch.ones(1, 1, 1, 300, 300, dtype=torch.float64),
            lambda: torch.randn(1, 1, 1, 300, 300, dtype=torch.float64),
        )
        up = grid.renoise(grid.add_noise(clean, low, n()), low, high, n())
        assert abs(float(up.mean() - grid.alpha[7])) < 0.02
        assert abs(float(up.std() - grid.sigma[7])) < 0.02


def test_finished_latents_are_kept_as_they_are():
    grid = solver_from_scheduler(CASES["ddim"][0], 8).grid
    clean = torch.randn(1, 2, 2, 3, 3)
    noisy = grid.add_noise(clean, torch.tensor([-1, 0]), torch.randn_like(clean))
    assert torch.equal(noisy[:, :, 0], clean[:, :, 0])
    assert not torch.equal(noisy[:, :, 1], clean[:, :, 1])


def test_the_pipelines_own_scheduler_is_left_alone():
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
    before = scheduler.num_inference_steps
    solver_from_scheduler(scheduler, 7)
    assert scheduler.num_inference_steps == before


@pytest.mark.parametrize(
    ("scheduler", "extra", "message"),
    [
        (diffusers.PNDMScheduler(), {}, "no by-level solver for PNDMScheduler"),
        (diffusers.DDIMScheduler(), {"eta": 1.5}, "eta must be 0"),
        (diffusers.UniPCMultistepScheduler(**FLOW), {"eta": 0.5}, "eta belongs to DDIM"),
        (diffusers.UniPCMultistepScheduler(**FLOW, solver_order=3), {}, "solver_order must be one of"),
        (diffusers.UniPCMultistepScheduler(**FLOW, lower_order_final=False), {}, "not finite"),
        (diffusers.UniPCMultistepScheduler(**FLOW, solver_type="bh1"), {}, "bh1"),
        (diffusers.UniPCMultistepScheduler(**VP, predict_x0=False), {}, "predict_x0=True"),
        (diffusers.DPMSolverMultistepScheduler(**VP, algorithm_type="sde-dpmsolver++"), {}, "algorithm_type='dpmsolver\\+\\+'"),
        (diffusers.DPMSolverMultistepScheduler(**VP, thresholding=True), {}, "thresholding=True"),
        (diffusers.DDIMScheduler(thresholding=True), {}, "thresholding=True"),
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), {}, "do not go together"),
        (diffusers.DDIMScheduler(), {"mu": 1.0}, "set_timesteps takes"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(scheduler, extra, message):
    with pytest.raises(GenAttnError, match=message):
        solver_from_scheduler(scheduler, 5, **extra)


def test_a_schedule_without_a_length_is_refused():
    with pytest.raises(GenAttnError, match="num_levels must be given"):
        solver_from_scheduler(diffusers.DDIMScheduler())


def test_schedulers_of_scaled_latents_are_refused(monkeypatch):
    scheduler = diffusers.DDIMScheduler
    monkeypatch.setattr(scheduler, "init_noise_sigma", 14.6, raising=False)
    monkeypatch.setattr(scheduler, "__init__", _init_keeping_sigma(scheduler.__init__))
    with pytest.raises(GenAttnError, match="unit variance"):
        solver_from_scheduler(scheduler(), 5)


def _init_keeping_sigma(init):
    def wrapped(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.init_noise_sigma = 14.6

    wrapped.__signature__ = __import__("inspect").signature(init)
    return wrapped


def test_noise_that_is_needed_must_be_given():
    solver = solver_from_scheduler(diffusers.LCMScheduler(), 4)
    with pytest.raises(GenAttnError, match="needs noise"):
        solver.step(torch.randn(1, 1, 1, 2, 2), torch.randn(1, 1, 1, 2, 2), torch.tensor([1]), {}, None)


def test_settings_tell_two_solvers_apart():
    flow = solver_from_scheduler(CASES["euler"][0], 5).settings()
    assert flow == solver_from_scheduler(CASES["euler"][0], 5).settings()
    assert flow != solver_from_scheduler(CASES["euler"][0], 5, eta=0.5).settings()
    assert flow != solver_from_scheduler(CASES["unipc-flow"][0], 5).settings()


def test_custom_timesteps_set_the_number_of_levels():
    solver = solver_from_scheduler(diffusers.LCMScheduler(), timesteps=[999, 599, 199])
    assert solver.num_levels == 3
    assert solver.grid.timesteps.tolist() == [0, 199, 599, 999]
    assert isinstance(solver, SingleStepSolver)
    assert isinstance(solver.grid, NoiseGrid)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", ["ddim", "euler"])
def test_direction_gain_is_what_a_push_does_to_the_result(case: str, eta: float) -> None:
    """By the definition: the noise direction moved by one, the clean latent held."""
    solver = solver_from_scheduler(CASES[case][0], 6, eta=eta)
    grid, levels = solver.grid, torch.arange(6)
    sample, clean, noise = (torch.randn(1, 2, 6, 3, 3, dtype=torch.float64) for _ in range(3))

    def stepped(direction: torch.Tensor) -> torch.Tensor:
        noisy = grid.at(grid.alpha, levels, sample) * clean + grid.at(grid.sigma, levels, sample) * direction
        prediction = grid.prediction_from_clean(noisy, clean, levels)
        return solver.step(noisy, prediction, levels, solver.empty_state(noisy), noise if solver.needs_noise else None)[0]

    moved = stepped(sample + 1) - stepped(sample)
    gain = solver.direction_gain(levels, sample)
    torch.testing.assert_close(moved, gain.expand_as(moved).to(moved), atol=1e-5, rtol=1e-5)
    assert float(gain.flatten()[0]) == pytest.approx(0.0, abs=0.05)


def test_a_schedule_of_another_length_than_asked_for_is_refused(monkeypatch):
    fresh = frame_solvers.fresh_scheduler
    monkeypatch.setattr(
        frame_solvers, "fresh_scheduler", lambda scheduler, levels, **more: fresh(scheduler, levels - 1, **more)
    )
    with pytest.raises(GenAttnError, match="the scheduler made 4 steps of the 5 asked for; pass num_levels=4"):
        solver_from_scheduler(diffusers.DDIMScheduler(), 5)
