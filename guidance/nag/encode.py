"""The negative text as a denoiser is told of it: encoded once by the pipeline's own `encode_prompt`.

Every pipeline returns its embeddings in an order of its own; `RETURNS` says which denoiser input each is. The settings that
shape the text (how many tokens it is filled up to) follow the positive text that the denoiser was just given.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.guidance.nag.sequences import like_these
from genattn.guidance.nag.streams import TextWay
from genattn.guidance.nag.ways import way_of

Texts = dict[str, Any]
_TEXT, _MASK = "encoder_hidden_states", "encoder_attention_mask"

# per denoiser class: the inputs that encode_prompt's results are, in order; None for what a negative text does not need
RETURNS: dict[str, tuple[str | None, ...]] = {
    "FluxTransformer2DModel": (_TEXT, None, "txt_ids"),
    "Flux2Transformer2DModel": (_TEXT, "txt_ids"),
    "ChromaTransformer2DModel": (_TEXT, "txt_ids", "attention_mask"),
    "QwenImageTransformer2DModel": (_TEXT, "encoder_hidden_states_mask"),
    "ZImageTransformer2DModel": ("cap_feats",),
    "HiDreamImageTransformer2DModel": ("encoder_hidden_states_t5", None, "encoder_hidden_states_llama3"),
    "HunyuanVideoTransformer3DModel": (_TEXT, None, _MASK),
    "HunyuanVideoFramepackTransformer3DModel": (_TEXT, None, _MASK),
    "HunyuanVideo15Transformer3DModel": (_TEXT, _MASK, "encoder_hidden_states_2", "encoder_attention_mask_2"),
    "AuraFlowTransformer2DModel": (_TEXT,),
    "HunyuanImageTransformer2DModel": (_TEXT, _MASK, "encoder_hidden_states_2", "encoder_attention_mask_2"),
    "BriaFiboTransformer2DModel": (_TEXT, None, "txt_ids", "attention_mask", None, "text_encoder_layers"),
    "LuminaNextDiT2DModel": (_TEXT, "encoder_mask"),
    "Kandinsky6Transformer3DModel": (_TEXT, None, _MASK),
    "NucleusMoEImageTransformer2DModel": (_TEXT, "encoder_hidden_states_mask"),
    "PRXTransformer2DModel": (_TEXT, "attention_mask"),
    "LongCatAudioDiTTransformer": (_TEXT, _MASK),
    "HunyuanDiT2DModel": (_TEXT, "text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5"),
    **dict.fromkeys(
        (
            "PixArtTransformer2DModel",
            "SanaTransformer2DModel",
            "Lumina2Transformer2DModel",
            "MochiTransformer3DModel",
            "LTXVideoTransformer3DModel",
            "AllegroTransformer3DModel",
            "Krea2Transformer2DModel",
        ),
        (_TEXT, _MASK),
    ),
}
# CLIP's tokens stand before T5's here, so that a text is longer than it was filled up to
_CLIP_FIRST = frozenset({"SD3Transformer2DModel"})
# these fill up nothing, or to a length of their own
_AS_LONG_AS_THE_TEXT = frozenset({"QwenImageTransformer2DModel", "ZImageTransformer2DModel"})
_PROMPTS = ("prompt", "prompt_2", "prompt_3", "prompt_4")
BATCH_AXIS = {"encoder_hidden_states_llama3": 1}
SHARED = frozenset({"txt_ids"})
PER_BLOCK = frozenset({"text_encoder_layers"})  # a list with an entry per block, not per sample


def encode(pipe: Any, model: Any, prompts: Sequence[str], told: Mapping[str, Any], settings: Mapping[str, Any]) -> Texts:
    """Denoiser inputs, by name, for negative prompts.

    Args:
        pipe: the pipeline.
        model: its denoiser.
        prompts: one text or several.
        told: the inputs of the positive forward, by name.
        settings: further arguments of `encode_prompt`, such as a template or `clip_skip`.

    Raises:
        GenAttnError: if the pipeline has no `encode_prompt`, or no text encoder to run.
    """
    name = _name_of(model)
    function = getattr(pipe, "encode_prompt", None)
    step = _text_step(pipe) if function is None else None
    if step is not None:
        return _by_step(pipe, step, model, prompts, told, settings)
    if pipe is None or function is None:
        raise GenAttnError(
            f"negative_prompt needs a pipeline with encode_prompt, got {type(pipe).__name__}; "
            "hand in the encoded text, NAG(negative_embeds={'encoder_hidden_states': ...})"
        )
    arguments = _arguments(function, prompts, told, name, pipe)
    strange = sorted(set(settings) - set(inspect.signature(function).parameters))
    if strange:
        raise GenAttnError(
            f"encode settings must be arguments of {type(pipe).__name__}.encode_prompt, got {strange}; drop them"
        )
    missing = _missing(function, {**arguments, **settings})
    if missing:
        raise GenAttnError(
            f"{type(pipe).__name__}.encode_prompt must be told {', '.join(missing)} as well, got a text alone; give it by "
            "NAG(encode={...}), or the encoded text by negative_embeds"
        )
    try:
        with torch.no_grad():
            results = _ENCODERS.get(name, _in_one)(function, {**arguments, **settings}, told)
    except (AttributeError, TypeError) as error:
        if all(getattr(pipe, part, None) is None for part in ("text_encoder", "text_encoder_2", "text_encoder_3")):
            raise GenAttnError(
                f"negative_prompt needs the text encoder, got a {type(pipe).__name__} without one; "
                "hand in the encoded text, NAG(negative_embeds={'encoder_hidden_states': ...})"
            ) from error
        raise
    if name == "LTX2VideoTransformer3DModel":
        return _through_connectors(pipe, results)
    names = RETURNS.get(name, (_TEXT,))
    found = {key: value for key, value in zip(names, results) if key is not None}
    if "text_encoder_layers" in found:
        found["text_encoder_layers"] = _one_per_block(model, found["text_encoder_layers"])
    return {key: value for key, value in found.items() if value is not None or key in told}


def _missing(function: Any, arguments: Mapping[str, Any]) -> list[str]:
    """What a function must be told and is not."""
    ask = inspect.signature(function).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in ask if p.kind in plain and p.default is inspect.Parameter.empty and p.name not in arguments]


def _in_one(function: Any, arguments: dict[str, Any], told: Mapping[str, Any]) -> Any:
    results = function(**arguments)
    return (results,) if isinstance(results, torch.Tensor) else results


def _by_two_encoders(function: Any, arguments: dict[str, Any], told: Mapping[str, Any]) -> Any:
    """HunyuanDiT: its second encoder's text is asked for by number, and is of a length of its own."""
    lengths = {0: told[_TEXT].shape[1], 1: told["encoder_hidden_states_t5"].shape[1]}
    both = [function(**{**arguments, "text_encoder_index": i, "max_sequence_length": n}) for i, n in lengths.items()]
    return tuple(part for results in both for part in (results[0], results[2]))


def _with_seconds(function: Any, arguments: dict[str, Any], told: Mapping[str, Any]) -> Any:
    """Stable Audio: behind the text stand two tokens that say where the sound starts and ends."""
    text = function(**arguments)
    return (torch.cat([text, told[_TEXT][:1, -2:].to(text).expand(len(text), -1, -1)], 1),)


def _with_lengths(function: Any, arguments: dict[str, Any], told: Mapping[str, Any]) -> Any:
    """LongCat-Audio tells lengths in place of a mask."""
    text, lengths = function(**arguments)
    return text, torch.arange(text.shape[1], device=text.device)[None] < lengths.to(text.device)[:, None]


_ENCODERS = {
    "HunyuanDiT2DModel": _by_two_encoders,
    "StableAudioDiTModel": _with_seconds,
    "LongCatAudioDiTTransformer": _with_lengths,
}


def _one_per_block(model: Any, layers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Bria FIBO: the encoder's last layers, the last one again where there are more blocks."""
    blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    return [*layers[-blocks:], *[layers[-1]] * (blocks - len(layers))]


def _text_step(pipe: Any) -> Any:
    """The step of a Modular pipeline that encodes its text, None where there is none."""
    blocks = getattr(getattr(pipe, "blocks", None), "sub_blocks", None)
    return blocks.get("text_encoder") if blocks is not None else None


def _by_step(
    pipe: Any, step: Any, model: Any, prompts: Sequence[str], told: Mapping[str, Any], settings: Mapping[str, Any]
) -> Texts:
    """Modular Diffusers: the text step alone, on the pipeline's own components."""
    way = way_of(model)
    assert way is not None
    known = {given.name for given in step.inputs}
    strange = sorted(set(settings) - known)
    if strange:
        raise GenAttnError(f"encode settings must be inputs of the text step ({sorted(known)}), got {strange}")
    alone = step.init_pipeline()
    parts = {part.name: getattr(pipe, part.name, None) for part in step.expected_components}
    alone.update_components(**{name: part for name, part in parts.items() if part is not None})
    asked = {**_wanted(prompts, told, _name_of(model), pipe), **settings}
    if len(prompts) == 1:
        asked |= dict.fromkeys(_PROMPTS, prompts[0])  # MiniMax-H3 takes one text and no list; the others take either
    with torch.no_grad():
        # the text step knows no device of its own: it runs where its text encoder is
        state = alone(**{name: value for name, value in asked.items() if name in known})
    mask = next((name for name in way.inputs if "mask" in name), None)
    names = {"prompt_embeds": way.inputs[0], "prompt_embeds_mask": mask, "prompt_attention_mask": mask}
    found = {key: state.get(name) for name, key in names.items() if key is not None}
    return {key: value for key, value in found.items() if value is not None}


def _name_of(model: Any) -> str:
    known = {*RETURNS, *_CLIP_FIRST, *_ENCODERS, "LTX2VideoTransformer3DModel"}
    return next((base.__name__ for base in type(model).__mro__ if base.__name__ in known), type(model).__name__)


def _arguments(function: Any, prompts: Sequence[str], told: Mapping[str, Any], name: str, pipe: Any) -> dict[str, Any]:
    """What encode_prompt is called with, of what it takes."""
    known = inspect.signature(function).parameters
    return {key: value for key, value in _wanted(prompts, told, name, pipe).items() if key in known}


def _wanted(prompts: Sequence[str], told: Mapping[str, Any], name: str, pipe: Any) -> dict[str, Any]:
    """Everything that an encoder of texts may want to know; as long as the positive text, where texts are filled up."""
    wanted: dict[str, Any] = {
        **{key: list(prompts) for key in _PROMPTS},
        "device": getattr(pipe, "_execution_device", None),
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "batch_size": len(prompts),
        "do_classifier_free_guidance": False,
        "clean_caption": False,
        "clip_skip": getattr(pipe, "clip_skip", None),
    }
    tokens = told.get(_TEXT, told.get("encoder_hidden_states_t5"))
    if isinstance(tokens, torch.Tensor) and name not in _AS_LONG_AS_THE_TEXT:
        tokenizer = getattr(pipe, "tokenizer", None)
        clip = int(getattr(tokenizer, "model_max_length", 77)) if name in _CLIP_FIRST else 0
        wanted["max_sequence_length"] = max(1, tokens.shape[1] - clip)
    return wanted


def _through_connectors(pipe: Any, results: Sequence[Any]) -> Texts:
    """LTX-2: one text for the video and one for the audio come out of the connectors."""
    side = getattr(pipe.tokenizer, "padding_side", "left")
    video, audio, mask = pipe.connectors(results[0], results[1], padding_side=side)
    return {
        _TEXT: video,
        "audio_encoder_hidden_states": audio,
        _MASK: mask,
        "audio_encoder_attention_mask": mask,
    }


def count_of(texts: Texts, way: TextWay) -> int:
    """Number of negative texts."""
    first = next(iter(texts))
    value = texts[way.inputs[0]] if way.inputs[0] in texts else texts[first]
    return len(value) if isinstance(value, list) else int(value.shape[BATCH_AXIS.get(way.inputs[0], 0)])


def for_samples(texts: Texts, samples: torch.Tensor, told: Mapping[str, Any], way: TextWay) -> Texts:
    """The denoiser inputs of a forward that differ for the negative text.

    Args:
        texts: from `encode`, or what the user handed in; a mask or token positions that are missing are made.
        samples: int64 [B], which negative text each sample of the forward has.
        told: the positive inputs; they give dtype, device and repeats (AnimateDiff has each text once per frame).
        way: the text's way through the denoiser.
    """
    found = {name: _one(name, value, samples, told.get(name)) for name, value in texts.items()}
    tokens, mine = found.get(way.inputs[0]), told.get(way.inputs[0])
    if not isinstance(tokens, torch.Tensor) or not isinstance(mine, torch.Tensor):
        return found
    length, before = tokens.shape[1], mine.shape[1]
    for name in way.inputs[1:]:
        like, text = told.get(name), _text_of(name)
        if name in found or not isinstance(like, torch.Tensor):
            continue
        if name in SHARED:
            found[name] = like_these(like, length)
        elif "mask" in name and text in found and like.ndim == 2:
            over_image = like.shape[-1] - told[text].shape[1]
            found[name] = like.new_ones(len(like), found[text].shape[1] + over_image)
    mask = found.get("attention_mask")
    over = told.get("attention_mask")
    if (
        isinstance(mask, torch.Tensor)
        and isinstance(over, torch.Tensor)
        and mask.shape[-1] == length
        and over.shape[-1] > before
    ):
        # Chroma's mask goes on over the tokens of the image, which are all there
        image = over.shape[-1] - before
        found["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), image)], 1)
    return found


def _text_of(mask: str) -> str:
    """The input that a mask belongs to."""
    if mask.endswith("_mask") and mask[: -len("_mask")].endswith("hidden_states"):
        return mask[: -len("_mask")]
    return _TEXT if mask in ("attention_mask", "encoder_mask") else mask.replace("attention_mask", "hidden_states")


def _one(name: str, value: Any, samples: torch.Tensor, like: Any) -> Any:
    if name in PER_BLOCK:
        return [_as(part.index_select(0, samples.to(part.device)), near) for part, near in zip(value, like)]
    if isinstance(value, list):
        near = like[0] if isinstance(like, list) and like else None
        return [_as(value[int(i)], near) for i in samples]
    if not isinstance(value, torch.Tensor) or name in SHARED:
        return _as(value, like)
    chosen = value.index_select(BATCH_AXIS.get(name, 0), samples.to(value.device))
    if isinstance(like, tuple | list):
        return type(like)((_as(chosen, like[0]), *like[1:]))
    copies = len(like) // len(samples) if isinstance(like, torch.Tensor) and name == _TEXT and like.ndim == 3 else 1
    return _as(chosen.repeat_interleave(copies, 0) if copies > 1 else chosen, like)


def _as(value: Any, like: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not isinstance(like, torch.Tensor):
        return value
    return value.to(device=like.device, dtype=like.dtype)
