"""The tiny models' text side: a word tokenizer that takes any text, and a small UMT5 encoder.

Every word of the world's captions is one piece; anything else falls back to characters, then to bytes. An empty prompt
is the end-of-sequence token alone, which training uses as the unconditional caption.
"""

import string

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
_EXTRA_WORDS = ("a", "an", "and", "on", "the", "in", "of", "with", "to", "background", "moves", "stays", "grey", "no")


def caption_words() -> list[str]:
    """Every word that a caption of the world can hold, and a few that people add, sorted."""
    words = {*COLOURS, *SHAPES, *SIZES, *BACKGROUNDS, *_EXTRA_WORDS}
    words |= {word for phrase in MOTIONS.values() for word in phrase.split()}
    return sorted(words)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer in the manner of T5: <pad> 0, </s> 1, <unk> 2, `</s>` appended; lower-case, 512 tokens."""
    vocabulary = [(token, 0.0) for token in SPECIAL_TOKENS]
    vocabulary += [(f"<0x{value:02X}>", -50.0) for value in range(256)]
    vocabulary += [("\u2581" + word, -4.0) for word in caption_words()]
    characters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary += [("\u2581", -8.0)] + [(character, -8.0) for character in characters]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(vocabulary: int, width: int = 96, layers: int = 2, heads: int = 4) -> UMT5EncoderModel:
    """A fresh UMT5 encoder: token ids [B, L] -> hidden states [B, L, width].

    Raises:
        GenAttnError: if the heads do not divide the width.
    """
    if width % heads:
        raise GenAttnError(f"heads must divide width, got {heads} heads for {width}; change one")
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config)
