"""Tokenizers and text encoders with random weights, made from nothing: no vocabulary file, no download."""

import json
import string
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

_SYMBOLS = string.ascii_letters + string.digits + string.punctuation


def t5_tokenizer() -> Any:
    """One token per ASCII character, `</s>` at the end, as T5 pads and ends."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in _SYMBOLS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def llama_tokenizer() -> Any:
    """The same characters, padded on the left as Llama is."""
    tokenizer = t5_tokenizer()
    tokenizer.bos_token = "</s>"
    tokenizer.padding_side = "left"
    return tokenizer


@cache
def _clip_files() -> str:
    folder = tempfile.mkdtemp(prefix="genattn-clip-")
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (Path(folder) / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
    return folder


def clip_tokenizer() -> Any:
    """A CLIP tokenizer without merges: one token per character."""
    folder = Path(_clip_files())
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def t5_encoder(width: int = 32) -> Any:
    """A T5 encoder of two layers."""
    torch.manual_seed(0)
    shape = {"d_model": width, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}
    return T5EncoderModel(T5Config(vocab_size=128, feed_forward_proj="gated-gelu", **shape)).eval()


def umt5_encoder(width: int = 32) -> Any:
    """A UMT5 encoder of two layers."""
    torch.manual_seed(0)
    shape = {"d_model": width, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}
    return UMT5EncoderModel(UMT5Config(vocab_size=128, **shape)).eval()


def clip_encoder(width: int = 32, projected: bool = False, layers: int = 2) -> Any:
    """A CLIP text encoder."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=layers,
        vocab_size=1000,
        hidden_act="gelu",
        projection_dim=32,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def llama_encoder(width: int = 16) -> Any:
    """A Llama of two layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=1000,
    )
    return LlamaModel(config).eval()
