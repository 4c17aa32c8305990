"""The training loop behind the tiny models: resumable to the bit, stopped by steps or by the clock.

Everything random in a step comes from a generator seeded by (seed, step), so a run that was killed and resumed takes
the same steps as one that was not. A checkpoint is one safetensors file (weights, their moving average, AdamW's
moments; the step in its metadata), replaced in one move: a kill while saving leaves the old one whole.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from genattn.errors import GenAttnError
from genattn.reading import whole
from genattn.whole_file import whole_file

LossOf = Callable[[nn.Module, int, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to train.

    Attributes:
        steps: number of the last step, >= 1; the learning rate decays towards it.
        minutes: wall-clock limit of this call, > 0; training resumes from there next time.
        learning_rate: AdamW's peak rate, > 0.
        warmup: steps of linear warm-up, >= 0.
        decay: share of the steps, at the end, over which the rate falls linearly to a twentieth, in [0, 1].
        ema: decay of the moving average of the weights, in [0, 1).
        seed: seed of everything random, >= 0.
        save_minutes: minutes between checkpoints, > 0.
    """

    steps: int
    minutes: float = 1e9
    learning_rate: float = 1e-3
    warmup: int = 50
    decay: float = 0.25
    ema: float = 0.998
    seed: int = 0
    save_minutes: float = 3.0

    def __post_init__(self) -> None:
        for name in ("steps", "minutes", "learning_rate", "save_minutes"):
            if not getattr(self, name) > 0:
                raise GenAttnError(f"{name} must be > 0, got {getattr(self, name)}; give a positive number")
        for name in ("decay", "ema"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise GenAttnError(f"{name} must be in [0, 1], got {getattr(self, name)}; give a share")
        if self.seed < 0 or self.warmup < 0:
            raise GenAttnError(f"seed and warmup must be >= 0, got {self.seed} and {self.warmup}; raise them")

    def rate(self, step: int) -> float:
        """Learning rate of a step: warm-up, plateau, linear decay."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        left = (self.steps - step) / max(self.decay * self.steps, 1.0)
        return self.learning_rate * warm * max(0.05, min(1.0, left))


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for everything random in one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)


def train(
    model: nn.Module,
    loss_of: LossOf,
    settings: TrainSettings,
    accelerator: Accelerator,
    checkpoint: Path,
    on_save: Callable[[nn.Module, int], None] | None = None,
) -> int:
    """Train a model in place, from its checkpoint where there is one; it leaves with the averaged weights.

    Args:
        model: what to train, in its final dtype; moved to the accelerator's device.
        loss_of: (model, step, generator) -> 0-dim loss; must take everything random from the generator.
        settings: how long and how fast.
        accelerator: says device and mixed precision.
        checkpoint: the safetensors file to resume from and to write.
        on_save: called with the averaged weights loaded, after each checkpoint.

    Returns:
        The number of steps done in all.

    Raises:
        GenAttnError: if the loss stops being finite, or the checkpoint is of another model.
    """
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)  # names without a wrapper's prefix: a run goes on with any number of processes
    average = {name: value.detach().clone() for name, value in bare.state_dict().items()}
    first = load_checkpoint(checkpoint, bare, optimizer, average) if checkpoint.exists() else 0
    begun = saved = time.monotonic()
    step, shown = first, 0.0
    bar = tqdm(total=settings.steps, initial=first, desc=checkpoint.stem, mininterval=5.0, disable=None)
    for step in range(first, settings.steps):
        if _agreed(time.monotonic() - begun > settings.minutes * 60, accelerator):
            break
        value = _take_step(model, loss_of, settings, accelerator, optimizer, average, step)
        shown = value if step == first else 0.98 * shown + 0.02 * value
        bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
        bar.update()
        if _agreed(time.monotonic() - saved > settings.save_minutes * 60, accelerator):
            if accelerator.is_main_process:
                save_checkpoint(checkpoint, bare, optimizer, average, step + 1)
            if on_save is not None:
                with_average(bare, average, partial(_call_with, on_save, step + 1), accelerator)
            saved = time.monotonic()
    else:
        step = settings.steps
    bar.close()
    if accelerator.is_main_process:  # all processes hold the same, and one file takes one writer
        save_checkpoint(checkpoint, bare, optimizer, average, step)
    bare.load_state_dict(average)
    if on_save is not None:
        on_save(bare, step)
    return step


def _agreed(wanted: bool, accelerator: Accelerator) -> bool:
    """What the first process wants: clocks differ, and one that stopped alone would leave the others waiting."""
    if accelerator.num_processes == 1:
        return wanted
    return bool(broadcast(torch.tensor(wanted, device=accelerator.device)))


def with_average(
    model: nn.Module, average: dict[str, torch.Tensor], use: Callable[[nn.Module], None], accelerator: Accelerator
) -> None:
    """Call `use` with the averaged weights in the model, then put the trained ones back."""
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(average)
    try:
        use(accelerator.unwrap_model(model))
    finally:
        model.load_state_dict(kept)
        model.train()


def _call_with(on_save: Callable[[nn.Module, int], None], step: int, model: nn.Module) -> None:
    on_save(model, step)


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, torch.Tensor], step: int
) -> None:
    """Write weights, moving average and optimiser state, in one move."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in average.items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optim.{name}.{key}"] = value
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with whole_file(path) as part:
        save_file(tensors, part, metadata={"state": json.dumps({"step": step})})


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, torch.Tensor]) -> int:
    """Load what `save_checkpoint` wrote; returns the number of steps done.

    Raises:
        GenAttnError: if the file is damaged or belongs to another model.
    """
    try:
        with whole(f"the checkpoint {path}"), safe_open(path, "pt") as file:
            step = int(json.loads(file.metadata()["state"])["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise GenAttnError(f"the checkpoint {path} is damaged ({error}); delete it to begin anew") from error
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        raise GenAttnError(f"the checkpoint must hold this model's weights, got {path} of another; delete or move it")
    model.load_state_dict(weights)
    with whole(f"the checkpoint {path}"):
        for name in average:
            average[name].copy_(tensors[f"ema.{name}"])
    for name, parameter in model.named_parameters():
        prefix = f"optim.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            # AdamW keeps its step counter on the CPU, its moments beside the parameter
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }
    return step


def _take_step(
    model: nn.Module,
    loss_of: LossOf,
    settings: TrainSettings,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor],
    step: int,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step)
    with accelerator.autocast():
        loss = loss_of(model, step, step_generator(settings.seed, step))
    if not torch.isfinite(loss):
        raise GenAttnError(f"the loss must stay finite, got {loss.item()} at step {step}; lower the learning rate")
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    keep = min(settings.ema, (1 + step) / (10 + step))
    for name, value in accelerator.unwrap_model(model).state_dict().items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value.detach(), 1.0 - keep)
        else:
            average[name].copy_(value)
    return float(loss.detach())
