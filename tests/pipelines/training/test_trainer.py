import itertools

import pytest
import torch
from accelerate import Accelerator

from genattn.errors import GenAttnError
from genattn.pipelines.training import trainer as tiny_trainer
from genattn.pipelines.training.trainer import TrainSettings, train


def small_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def regression(model, step, generator):
    inputs = torch.randn(16, 4, generator=generator)
    return (model(inputs)[:, 0] - inputs.sum(1)).square().mean()


def killed_at(step):
    def loss_of(model, now, generator):
        if now == step:
            raise KeyboardInterrupt
        return regression(model, now, generator)

    return loss_of


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def settings(**changes):
    return TrainSettings(**({"steps": 30, "learning_rate": 0.01, "warmup": 3, "save_minutes": 1e9} | changes))


def test_training_learns_and_leaves_the_averaged_weights(tmp_path, accelerator):
    model = small_model()
    before = regression(model, 0, torch.Generator().manual_seed(5)).item()
    steps = train(model, regression, settings(steps=200), accelerator, tmp_path / "run.safetensors")
    after = regression(model, 0, torch.Generator().manual_seed(5)).item()
    assert steps == 200
    assert after < before / 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.safetensors"]


def test_a_killed_run_resumes_to_the_bit(tmp_path, accelerator, monkeypatch):
    whole = small_model()
    train(whole, regression, settings(), accelerator, tmp_path / "whole.safetensors")
    # a checkpoint after every step; the kill comes in the middle of the twelfth
    frequent = settings(save_minutes=1e-9)
    with pytest.raises(KeyboardInterrupt):
        train(small_model(), killed_at(11), frequent, accelerator, tmp_path / "run.safetensors")
    # other initial weights and another global random state must not matter
    resumed = small_model(seed=1)
    torch.manual_seed(99)
    train(resumed, regression, settings(), accelerator, tmp_path / "run.safetensors")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "run")]
    assert files[0] == files[1]


def test_the_clock_stops_a_run_and_the_next_call_goes_on(tmp_path, accelerator):
    path = tmp_path / "run.safetensors"
    assert train(small_model(), regression, settings(minutes=1e-9), accelerator, path) == 0
    assert train(small_model(), regression, settings(), accelerator, path) == 30
    assert train(small_model(), regression, settings(), accelerator, path) == 30


def test_saving_shows_the_average_and_goes_on_with_the_weights(tmp_path, accelerator):
    plain, watched = small_model(), small_model()
    shown = []
    train(plain, regression, settings(), accelerator, tmp_path / "plain.safetensors")
    train(
        watched,
        regression,
        settings(save_minutes=1e-9),
        accelerator,
        tmp_path / "watched.safetensors",
        on_save=lambda model, step: shown.append((step, model[0].weight.detach().clone())),
    )
    assert torch.equal(plain[0].weight, watched[0].weight)
    assert [step for step, _ in shown] == [*range(1, 31), 30]
    assert torch.equal(shown[-1][1], watched[0].weight)
    assert not torch.equal(shown[10][1], shown[11][1])


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, accelerator, monkeypatch):
    path = tmp_path / "run.safetensors"
    train(small_model(), regression, settings(steps=5), accelerator, path)
    kept = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(tiny_trainer, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        train(small_model(), regression, settings(), accelerator, path)
    assert path.read_bytes() == kept


def test_the_rate_warms_up_holds_and_decays():
    plan = TrainSettings(100, learning_rate=1.0, warmup=10, decay=0.25)
    rates = [plan.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:75] == [1.0] * 65
    assert rates[99] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(rates[75:]))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, accelerator):
    path = tmp_path / "run.safetensors"
    train(small_model(), regression, settings(steps=2), accelerator, path)
    with pytest.raises(GenAttnError, match="must hold this model's weights"):
        train(torch.nn.Linear(4, 1), regression, settings(), accelerator, path)


@pytest.mark.parametrize("damage", [b"", b"x" * 64, None])
def test_a_damaged_checkpoint_is_told(tmp_path, accelerator, damage):
    path = tmp_path / "run.safetensors"
    train(small_model(), regression, settings(steps=2), accelerator, path)
    path.write_bytes(path.read_bytes()[:-8] if damage is None else damage)
    with pytest.raises(GenAttnError, match="damaged"):
        train(small_model(), regression, settings(), accelerator, path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, accelerator):
    with pytest.raises(GenAttnError, match="must stay finite, got nan at step 0"):
        train(
            small_model(),
            lambda model, step, generator: model(torch.full((1, 4), torch.nan)).sum(),
            settings(),
            accelerator,
            tmp_path / "run.safetensors",
        )
    assert not (tmp_path / "run.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be > 0, got 0"),
        ({"minutes": -1.0}, "minutes must be > 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"save_minutes": 0.0}, "save_minutes must be > 0"),
        ({"decay": 1.5}, "decay must be in"),
        ({"ema": -0.1}, "ema must be in"),
        ({"seed": -1}, "seed and warmup must be >= 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(GenAttnError, match=message):
        settings(**changes)
