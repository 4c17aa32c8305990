"""A LoRA on a stock denoiser's query, key, value and output projections: put on, trained alone, saved as diffusers saves it.

W x  ->  W x + (alpha / rank) B A x        Hu et al., arXiv 2106.09685; B starts at zero, so training starts at the model
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.whole_file import whole_file, write_whole

ADAPTER = "default"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
WEIGHTS = "pytorch_lora_weights.safetensors"


def why_no_lora(pipe: Any) -> str | None:
    """The reason why a pipeline cannot be fine-tuned by LoRA here, or None."""
    if getattr(pipe, "transformer", None) is None:
        return f"{type(pipe).__name__} has no transformer; LoRA training here is for video transformers"
    if getattr(pipe, "transformer_2", None) is not None:
        return f"{type(pipe).__name__} routes noise levels to two experts; train a checkpoint with one"
    save = getattr(type(pipe), "save_lora_weights", None)
    if save is None or "transformer_lora_layers" not in inspect.signature(save).parameters:
        return f"{type(pipe).__name__} has no stock LoRA loader, so what was trained could not be loaded again"
    return None


def add_lora(transformer: Any, rank: int, alpha: float) -> list[str]:
    """Freeze the denoiser and put a fresh LoRA in float32 on its attention projections; returns their module names.

    Raises GenAttnError without peft, for a rank or alpha that is not positive, and when there is no such projection.
    """
    if rank < 1 or not alpha > 0:
        raise GenAttnError(f"the rank must be >= 1 and alpha > 0, got {rank} and {alpha}")
    try:
        from peft import LoraConfig
    except ImportError:
        raise GenAttnError("fine-tuning needs peft, which is not installed; pip install 'genattn[train]'") from None
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear) and _is_target(name)]
    if not names:
        raise GenAttnError(f"{type(transformer).__name__} has no attention projection called {', '.join(TARGETS)}")
    transformer.requires_grad_(False)
    settings: Any = {"r": rank, "lora_alpha": alpha, "target_modules": names}
    transformer.add_adapter(LoraConfig(**settings), adapter_name=ADAPTER)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return names


def _is_target(name: str) -> bool:
    return ("attn" in name) and name.endswith(tuple(f".{target}" for target in TARGETS))


class LoraTrainer(nn.Module):
    """The trainable weights alone as a module, so that checkpoints, averages and optimiser never see the frozen ones.

    Args:
        transformer: with a LoRA on it; its LoRA parameters are shared, not copied.
        loss: what a call of this module computes.
    """

    def __init__(self, transformer: nn.Module, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        found = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
        for name, parameter in found.items():
            self.register_parameter(name.replace(".", "/"), parameter)
        self._loss = loss

    def forward(self, *inputs: Any) -> torch.Tensor:
        """The loss."""
        return self._loss(*inputs)


def save_lora(pipe: Any, folder: Path, note: dict[str, Any]) -> Path:
    """Write the LoRA so that `pipe.load_lora_weights(folder)` reads it; `note` goes beside it as finetune.json."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pipe.transformer, adapter_name=ADAPTER)
    layers = {name: value.detach().cpu().contiguous().clone() for name, value in layers.items()}
    folder.mkdir(parents=True, exist_ok=True)
    metadata = _collate_lora_metadata({"transformer": pipe.transformer})
    with whole_file(folder / WEIGHTS) as part:
        type(pipe).save_lora_weights(part.parent, transformer_lora_layers=layers, weight_name=part.name, **metadata)
    write_whole(folder / "finetune.json", json.dumps(note, indent=2) + "\n")
    return folder / WEIGHTS
