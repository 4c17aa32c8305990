"""Qwen's tokenizer and vision-language encoders with random weights, made from nothing: no vocabulary file, no download."""

from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen_tokenizer() -> Any:
    """One token per byte, no merges, and Qwen's marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    return Qwen2TokenizerFast(vocab=vocabulary, merges=[], extra_special_tokens=list(_MARKS))


def _marks() -> dict[str, int]:
    ids = dict(zip(_MARKS, qwen_tokenizer().convert_tokens_to_ids(list(_MARKS)), strict=True))
    return {
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
    }


def qwen25_vl_encoder(width: int = 16) -> Any:
    """A Qwen2.5-VL of two layers, as Qwen-Image reads its text with."""
    torch.manual_seed(0)
    text = {
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(qwen_tokenizer()),
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": width, "patch_size": 4}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_marks())).eval()


def qwen3_vl_encoder(width: int = 8, layers: int = 51) -> Any:
    """A narrow Qwen3-VL; MiniMax-H3 reads its 50th layer, so there are as many."""
    torch.manual_seed(0)
    text = {
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(qwen_tokenizer()),
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    }
    vision = {
        "depth": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **_marks())).eval()


def qwen3_vl_processor() -> Any:
    """Qwen3-VL's processor without its part for clips, which needs torchvision."""
    found = object.__new__(Qwen3VLProcessor)
    found.tokenizer = qwen_tokenizer()
    found.image_processor = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    found.image_token_id, found.video_token_id = found.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    return found
