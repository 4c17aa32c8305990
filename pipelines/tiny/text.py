"""The tiny models' text side: a word tokenizer that takes any text, a small UMT5 encoder, and how the encoder learns to bind.

Every word of the world's captions is one piece; anything else falls back to characters, then to bytes. An empty prompt
is the end-of-sequence token alone, which training uses as the unconditional caption.

An encoder that only the denoiser's loss trains hardly learns which word goes with which: of two objects' captions a linear
reading of the colour's embedding tells the right shape in .48 of the cases, as if it named both shapes at random, and clips
of two objects have each other's shapes. Captions cost nothing, so `CaptionReader` trains the encoder on them alone: a
linear head reads all attributes of an object from the embedding of each of its words.
"""

import copy
import string
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.world import BACKGROUNDS, COLOURS, ENDLESS, MOTIONS, SHAPES, SIZES, Scene, caption, sample_scene

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
TEXT_TOKENS = 20
ENDLESS_TEXT_TOKENS = 24  # two objects whose motions go on take more words
PAIRS = 0.7
_ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": tuple(MOTIONS | ENDLESS), "size": tuple(SIZES)}
_ORDER = ("alone", "first", "second")
_CAPTION_SEEDS = 10_000_000, 1 << 40  # far from the scenes that are drawn as clips
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


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int = TEXT_TOKENS) -> torch.Tensor:
    """Token ids int64 [B, length] of captions, padded with 0."""
    ids: torch.Tensor = tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt").input_ids
    return ids


def encode_text(text_encoder: UMT5EncoderModel, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings [B, L, D] of token ids [B, L], zero where padded, as `WanPipeline` makes them."""
    mask = (ids != 0).long()
    embeds: torch.Tensor = text_encoder(ids, mask).last_hidden_state * mask[..., None]
    return embeds


def word_labels(scenes: Sequence[Scene], words: Sequence[Sequence[str]]) -> torch.Tensor:
    """What each word of a caption should tell of the object that it describes.

    Args:
        scenes: B scenes.
        words: the L pieces of each scene's caption, as `PreTrainedTokenizerFast.convert_ids_to_tokens` gives them.

    Returns:
        int64 [B, L, 5]: indices of colour, shape, motion, size and place in the sentence (alone, first, second); -1 for
        words of no object.
    """
    labels = torch.full((len(scenes), len(words[0]), len(_ATTRIBUTES) + 1), -1)
    for row, (scene, pieces) in enumerate(zip(scenes, words, strict=True)):
        objects = []
        for index, thing in enumerate(scene.objects):
            values = [known.index(getattr(thing, name)) for name, known in _ATTRIBUTES.items()]
            objects.append([*values, 0 if len(scene.objects) == 1 else index + 1])
        current = 0
        for column, piece in enumerate(pieces):
            if piece == "\u2581on":
                break
            # "moves left and right" is one object's motion: another object begins with its article
            if piece == "\u2581and" and pieces[column + 1] == "\u2581a":
                current += 1
            else:
                labels[row, column] = torch.tensor(objects[current])
    return labels


class CaptionReader(nn.Module):
    """An encoder with linear heads that read an object's attributes off each of its words; trained on captions alone.

    Args:
        text_encoder: what to train, in place. Its embeddings are held near those it had, so that a denoiser that knows them
            still does.
        tokenizer: the captions' tokenizer.
        hold: weight of the squared change of the embeddings, in their variance, >= 0; 0 for a fresh encoder.

    Raises:
        GenAttnError: for a negative weight.
    """

    def __init__(self, text_encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, hold: float = 1.0) -> None:
        super().__init__()
        if hold < 0:
            raise GenAttnError(f"hold must be >= 0, got {hold}; give 0 to let the embeddings change freely")
        self.text_encoder, self.hold = text_encoder, hold
        self.sizes = [len(known) for known in _ATTRIBUTES.values()] + [len(_ORDER)]
        self.heads = nn.Linear(text_encoder.config.d_model, sum(self.sizes))
        # not modules of this one: neither is trained or kept in a checkpoint
        self._outside = copy.deepcopy(text_encoder).eval().requires_grad_(False), tokenizer

    def draw(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, L] and word labels [B, L, 5] of captions of trained combinations, every fourth of endless motions."""
        tokenizer = self._outside[1]
        seeds = torch.randint(*_CAPTION_SEEDS, (batch,), generator=generator).tolist()
        motions = [ENDLESS if index % 4 == 3 else MOTIONS for index in range(batch)]
        scenes = [sample_scene(seed, False, PAIRS, tuple(known)) for seed, known in zip(seeds, motions, strict=True)]
        ids = tokenize(tokenizer, [caption(scene) for scene in scenes], ENDLESS_TEXT_TOKENS)
        return ids, word_labels(scenes, [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()])

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of what the words should tell, plus the weighted change of the embeddings; 0-dim.

        Args:
            ids: int [B, L].
            labels: int [B, L, 5] of `word_labels`.
        """
        embeds, told = encode_text(self.text_encoder, ids), labels[..., 0] >= 0
        read = self.heads(embeds[told]).split(self.sizes, -1)
        wrong = [F.cross_entropy(part, right) for part, right in zip(read, labels[told].unbind(-1), strict=True)]
        loss = torch.stack(wrong).mean()
        if not self.hold:
            return loss
        # outside of this module, so it does not move with it
        before, real = encode_text(self._outside[0].to(ids.device), ids), ids != 0
        return loss + self.hold * (embeds - before)[real].square().mean() / before[real].var()

    @torch.no_grad()
    def accuracy(self, ids: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of words from which every attribute of their object is read right."""
        told = labels[..., 0] >= 0
        read = self.heads(encode_text(self.text_encoder, ids)[told]).split(self.sizes, -1)
        right = torch.stack([part.argmax(-1) for part in read], -1) == labels[told]
        return float(right.all(-1).float().mean())
