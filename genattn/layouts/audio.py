"""Transformers of sound: one token per piece of time, behind what the model puts in front."""

from collections.abc import Mapping
from typing import Any

from genattn.geometry.token_layout import TokenLayout
from genattn.layouts.family import Family, grid, layout, registers

Inputs = Mapping[str, Any]


def ace_step(model: Any, inputs: Inputs) -> TokenLayout:
    """Latents [B, S, C], some to a token; the last token is filled up."""
    return layout(grid(-(-inputs["hidden_states"].shape[1] // model.config.patch_size)))


def one_then_sound(model: Any, inputs: Inputs) -> TokenLayout:
    """Stable Audio, Music 3: latents [B, C, S] behind one token of the conditions or the time."""
    return layout(registers(1), grid(inputs["hidden_states"].shape[-1]))


def stable_audio3(model: Any, inputs: Inputs) -> TokenLayout:
    """Latents [B, C, S] behind learned memory tokens."""
    config = model.config
    return layout(registers(config.num_memory_tokens), grid(inputs["hidden_states"].shape[-1] // config.patch_size))


def longcat_audio(model: Any, inputs: Inputs) -> TokenLayout:
    """Latents [B, S, C]; text by cross-attention."""
    return layout(grid(inputs["hidden_states"].shape[1]))


_KINDS = (("cross_attn", "cross"), ("self_attn", "self"))

FAMILIES = (
    Family(
        "ace-step",
        ("AceStepTransformer1DModel",),
        ("layers",),
        ace_step,
        kinds=_KINDS,  # type: ignore[arg-type]
        cfg="batched",
        note="every other layer has a window of its own, a band as its mask: it stays as it is",
    ),
    Family("stable-audio", ("StableAudioDiTModel",), ("transformer_blocks",), one_then_sound, cfg="batched"),
    Family("stable-audio-3", ("StableAudio3DiTModel",), ("transformer_blocks",), stable_audio3, kinds=_KINDS, cfg="batched"),  # type: ignore[arg-type]
    Family("longcat-audio", ("LongCatAudioDiTTransformer",), ("blocks",), longcat_audio, kinds=_KINDS, rising=True),  # type: ignore[arg-type]
    Family("minimax-music3", ("MiniMaxMusic3Transformer1DModel",), ("transformer_blocks",), one_then_sound, rising=True),
)
