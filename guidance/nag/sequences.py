"""What a denoiser must be told of a sequence with the negative text in it: positions, indices, lengths.

The text may be of another length than the prompt's. Where a pipeline numbers the image's tokens after the caption's, the
negative's tokens are numbered so that they end where the prompt's end: the image stays where it is, and every distance between
a token of text and one of the image is that of a run with the negative text as the prompt.
"""

from collections.abc import Mapping
from typing import Any

import torch

from genattn.errors import GenAttnError

Inputs = Mapping[str, Any]


def like_these(ids: torch.Tensor, length: int) -> torch.Tensor:
    """Positions [..., length, n] of tokens that go on as `ids` [..., T, n] do."""
    axis = ids.ndim - 2
    count = ids.shape[axis]
    if length <= count:
        return ids.narrow(axis, 0, length)
    last = ids.narrow(axis, count - 1, 1)
    step = last - ids.narrow(axis, max(count - 2, 0), 1)
    more = torch.arange(1, length - count + 1, device=ids.device, dtype=ids.dtype)[:, None]
    return torch.cat([ids, last + step * more], axis)


def ending_there(ids: torch.Tensor, length: int) -> torch.Tensor:
    """Positions [length, n] of tokens that end where `ids` [T, n] end, with the same steps."""
    last, step = ids[-1:], ids[-1:] - ids[max(len(ids) - 2, 0)][None]
    back = torch.arange(length - 1, -1, -1, device=ids.device, dtype=ids.dtype)[:, None]
    return last - step * back


def krea2(model: Any, told: Inputs, theirs: Inputs) -> dict[str, Any]:
    """One list of positions for text and image; the text stands at the origin."""
    words = told["encoder_hidden_states"].shape[1]
    ids = told["position_ids"]
    return {"position_ids": torch.cat([like_these(ids[:words], theirs["encoder_hidden_states"].shape[1]), ids[words:]])}


def minimax_h3(model: Any, told: Inputs, theirs: Inputs) -> dict[str, Any]:
    """The rows of a packed sequence, which begins with the text."""
    words, own = told["encoder_hidden_states"].shape[1], theirs["encoder_hidden_states"].shape[1]
    rest = {name: told[name] + (own - words) for name in ("video_indices", "audio_indices")}
    ids = told["position_ids"]
    return {
        "text_indices": torch.arange(own, device=told["text_indices"].device),
        "position_ids": torch.cat([ending_there(ids[:words], own), ids[words:]]),
        **{name: _first_again(told[name], words, own) for name in ("token_tags", "timestep_indices")},
        **rest,
    }


def minimax_h3_refuses(model: Any, told: Inputs) -> str:
    """The text must be what the sequence begins with, all of one kind."""
    words = told["encoder_hidden_states"].shape[1]
    places = torch.arange(words, device=told["text_indices"].device)
    if not torch.equal(told["text_indices"], places):
        return "its text does not stand at the sequence's beginning"
    # with given images the encoder's rows are not all text
    return "" if len(told["token_tags"][:words].unique()) == 1 else "pictures stand among its text"


def minimax_h3_image(model: Any, told: Inputs) -> int:
    """Rows that are no text."""
    return len(told["position_ids"]) - told["encoder_hidden_states"].shape[1]


def bria_fibo(model: Any, told: Inputs, theirs: Inputs) -> dict[str, Any]:
    """A text for every block beside the first, and a mask over text and image where a text is filled up."""
    if "text_encoder_layers" not in theirs:
        raise GenAttnError(
            "negative_embeds must hold text_encoder_layers beside encoder_hidden_states for this model, got only one of them; "
            "every block is told a layer of the text encoder"
        )
    text, asked = theirs["encoder_hidden_states"], told.get("joint_attention_kwargs") or {}
    mask, own = asked.get("attention_mask"), theirs.get("attention_mask")
    if mask is None and (own is None or bool(own.bool().all())):
        return {}
    tokens, image = text.shape[1], told["hidden_states"].shape[1]
    own = torch.ones(len(text), tokens, dtype=torch.bool, device=text.device) if own is None else own.bool()
    after = own.new_ones(len(text), 1, 1, image) if mask is None else mask[..., -image:]
    return {"joint_attention_kwargs": {**asked, "attention_mask": torch.cat([own[:, None, None, :].to(after), after], -1)}}


def halves(kept: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """Bria FIBO: half of the channels as the last block gave them, half anew from the text encoder."""
    half = kept.shape[-1] // 2
    return torch.cat([kept[..., :half], fresh[..., half:]], -1)


def _first_again(entries: torch.Tensor, words: int, own: int) -> torch.Tensor:
    return torch.cat([entries[:1].expand(own), entries[words:]])
