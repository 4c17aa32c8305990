"""A denoiser's answer as a tree of predictions: a tensor, a tuple or list of them, or a diffusers output object.

Guidance is arithmetic on these trees: `(sample,)`, `Transformer2DModelOutput(sample=...)`, Z-Image's list of one tensor
per sample, LTX-2's video and audio. The same walk picks rows out of a forward's inputs.
"""

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any

import torch

from genattn.errors import GenAttnError

# shared by all samples, whatever their first axis counts
UNBATCHED = frozenset(
    (
        "img_ids",
        "image_cond_ids",
        "position_ids",
        "timestep_indices",
        "token_tags",
        "video_indices",
        "audio_indices",
        "text_indices",
        "kv_cache",
        "kv_caches",
        "txt_ids",
        "image_rotary_emb",
        "rotary_embedding",
        "rope_interpolation_scale",
        "skip_layers",
        "attention_kwargs",
        "joint_attention_kwargs",
        "cross_attention_kwargs",
    )
)


# per-layer states of one text encoder, stacked in front of the samples (HiDream)
BATCH_AXIS = {"encoder_hidden_states_llama3": 1}


def leaves(tree: Any) -> list[torch.Tensor]:
    """The predictions of an answer, in order; a list with one tensor per sample counts as one, stacked."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_leaves(keep, tree)
    return found


def map_leaves(change: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """A copy of an answer with every prediction changed; the rest is passed on."""
    if isinstance(tree, torch.Tensor):
        return change(tree) if tree.is_floating_point() else tree
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{name: map_leaves(change, getattr(tree, name)) for name in tree.__dataclass_fields__})
    if isinstance(tree, dict):
        return type(tree)({name: map_leaves(change, value) for name, value in tree.items()})
    if isinstance(tree, list) and tree and all(isinstance(part, dict) for part in tree):
        return tree  # keys that a model keeps for its next chunk
    if isinstance(tree, list) and tree and all(isinstance(part, torch.Tensor) for part in tree):
        return list(change(torch.stack(tree)).unbind())
    if isinstance(tree, list | tuple):
        return type(tree)(map_leaves(change, value) for value in tree)
    return tree


def with_leaves(tree: Any, tensors: list[torch.Tensor]) -> Any:
    """A copy of an answer with its predictions replaced, in order."""
    rest = iter(tensors)
    return map_leaves(lambda _: next(rest), tree)


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor | list[torch.Tensor], int]:
    """The latents that a forward is given and the number of samples in them.

    Raises:
        GenAttnError: if there are none among the arguments.
    """
    for name in ("hidden_states", "sample", "x"):
        if name in kwargs:
            return kwargs[name], len(kwargs[name])
    if kwargs.get("vision_tokens"):  # one sample, packed: the last of its videos is the one that is made
        return kwargs["vision_tokens"][-1], 1
    if args and (isinstance(args[0], torch.Tensor) or _is_tensor_list(args[0])):
        return args[0], len(args[0])
    raise GenAttnError(
        f"a denoiser's forward must get its latents as hidden_states, sample or x, got arguments {sorted(kwargs)}; "
        "this model cannot be guided"
    )


def take_rows(value: Any, rows: torch.Tensor, batch: int, name: str = "") -> Any:
    """The chosen samples of a forward's argument; what does not count samples is passed on.

    Args:
        value: tensor, list, tuple or dict of such; anything else is passed on.
        rows: int64, samples to take, repeats allowed.
        batch: number of samples.
        name: the argument's name.
    """
    if name in UNBATCHED:
        return value
    if name in BATCH_AXIS and isinstance(value, torch.Tensor):
        return value.index_select(BATCH_AXIS[name], rows.to(value.device))
    if isinstance(value, torch.Tensor):
        copies = len(value) // batch if value.ndim else 0
        if copies > 1 and name == "encoder_hidden_states" and copies * batch == len(value):
            # AnimateDiff hands in each text once per frame
            return value.unflatten(0, (batch, copies)).index_select(0, rows.to(value.device)).flatten(0, 1)
        return value.index_select(0, rows.to(value.device)) if copies == 1 and len(value) == batch else value
    if is_dataclass(value) and not isinstance(value, type):  # diffusers' output objects are dicts as well
        return replace(value, **{key: take_rows(getattr(value, key), rows, batch, key) for key in value.__dataclass_fields__})
    if isinstance(value, dict):
        return {key: take_rows(part, rows, batch, key) for key, part in value.items()}
    if isinstance(value, list | tuple):
        if _one_per_sample(value, batch):
            return type(value)(value[int(row)] for row in rows)
        return type(value)(take_rows(part, rows, batch) for part in value)
    return value


def take_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], rows: torch.Tensor, batch: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward's arguments with only the chosen samples."""
    chosen = tuple(take_rows(value, rows, batch) for value in args)
    return chosen, {name: take_rows(value, rows, batch, name) for name, value in kwargs.items()}


def _is_tensor_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, torch.Tensor) for v in value)


def _one_per_sample(value: list[Any] | tuple[Any, ...], batch: int) -> bool:
    """Whether a list is a batch itself (texts of differing length, sizes of images) and no bundle of batched tensors."""
    return len(value) == batch and not any(
        isinstance(part, torch.Tensor) and part.ndim and len(part) == batch for part in value
    )
