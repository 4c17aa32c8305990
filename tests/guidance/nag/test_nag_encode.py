"""Texts of pipelines that tell them in a way of their own, with stand-ins for their `encode_prompt`."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genattn.errors import GenAttnError
from genattn.guidance.nag import ways
from genattn.guidance.nag.encode import encode, for_samples
from genattn.guidance.nag.sequences import ending_there, like_these
from genattn.guidance.nag.ways import WAYS

TEXT = "encoder_hidden_states"


def of_class(name: str, **parts: Any) -> Any:
    return type(name, (), parts)()


def test_hunyuan_dit_is_asked_once_per_encoder() -> None:
    asked = []

    def encode_prompt(prompt: list[str], text_encoder_index: int = 0, max_sequence_length: int | None = None) -> Any:
        asked.append((text_encoder_index, max_sequence_length))
        return torch.full((1, 4, 2), float(text_encoder_index)), None, torch.ones(1, 4), None

    told = {TEXT: torch.zeros(1, 77, 2), "encoder_hidden_states_t5": torch.zeros(1, 256, 2)}
    found = encode(SimpleNamespace(encode_prompt=encode_prompt), of_class("HunyuanDiT2DModel"), ["x"], told, {})
    assert asked == [(0, 77), (1, 256)]
    assert set(found) == {TEXT, "text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5"}
    assert found[TEXT].eq(0).all()
    assert found["encoder_hidden_states_t5"].eq(1).all()


def test_stable_audio_keeps_the_prompts_seconds() -> None:
    told = {TEXT: torch.randn(2, 7, 3)}
    pipe = SimpleNamespace(encode_prompt=lambda prompt, device, do_classifier_free_guidance: torch.zeros(1, 5, 3))
    found = encode(pipe, of_class("StableAudioDiTModel"), ["x"], told, {})
    assert torch.equal(found[TEXT][:, -2:], told[TEXT][:1, -2:])
    assert found[TEXT].shape == (1, 7, 3)


def test_longcat_audio_has_lengths_for_a_mask() -> None:
    pipe = SimpleNamespace(encode_prompt=lambda prompt, device: (torch.zeros(2, 4, 3), torch.tensor([4, 1])))
    found = encode(pipe, of_class("LongCatAudioDiTTransformer"), ["x", "y"], {TEXT: torch.zeros(2, 9, 3)}, {})
    assert found["encoder_attention_mask"].tolist() == [[True] * 4, [True, False, False, False]]


@pytest.mark.parametrize(("layers", "expected"), [(5, [2, 3, 4]), (2, [0, 1, 1])])
def test_bria_fibo_has_a_text_for_every_block(layers: int, expected: list[int]) -> None:
    texts = [torch.full((1, 4, 3), float(i)) for i in range(layers)]

    def encode_prompt(prompt: list[str]) -> Any:
        return texts[0], None, torch.zeros(4, 3), torch.ones(1, 4), None, texts, None

    model = of_class("BriaFiboTransformer2DModel", transformer_blocks=[0], single_transformer_blocks=[0, 0])
    found = encode(SimpleNamespace(encode_prompt=encode_prompt), model, ["x"], {}, {})["text_encoder_layers"]
    assert [int(text[0, 0, 0]) for text in found] == expected
    way = WAYS["BriaFiboTransformer2DModel"]
    told = {"text_encoder_layers": found}
    again = for_samples(told, torch.tensor([0, 0]), told, way)
    assert [text.shape[0] for text in again["text_encoder_layers"]] == [2, 2, 2]


def test_an_encoder_that_must_know_more_says_so() -> None:
    pipe = SimpleNamespace(encode_prompt=lambda prompt, lyrics, device: None)
    with pytest.raises(GenAttnError, match="encode_prompt must be told lyrics as well, got a text alone"):
        encode(pipe, of_class("AceStepTransformer1DModel"), ["x"], {}, {})


def test_positions_go_on_and_end_where_the_others_do() -> None:
    ids = torch.tensor([[0.0, 0], [1, 0], [2, 0]])
    assert like_these(ids, 5)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert like_these(ids, 2)[:, 0].tolist() == [0, 1]
    assert ending_there(ids, 5)[:, 0].tolist() == [-2, -1, 0, 1, 2]
    assert ending_there(ids, 2)[:, 0].tolist() == [1, 2]
    assert ending_there(torch.zeros(3, 2), 4).eq(0).all()


def test_an_encoder_is_asked_for_one_plain_text_a_sample() -> None:
    """No second text for classifier-free guidance, no copies, no cleaning: what stock encoders do on their own differs."""
    asked: dict[str, Any] = {}

    def encode_prompt(
        prompt: Any, num_images_per_prompt: int, num_videos_per_prompt: int, batch_size: int,
        do_classifier_free_guidance: bool, clean_caption: bool, clip_skip: Any, max_sequence_length: int,
    ) -> Any:  # fmt: skip
        asked.update(locals())
        return torch.zeros(2, 4, 3), None

    told = {TEXT: torch.zeros(2, 9, 3)}
    encode(SimpleNamespace(encode_prompt=encode_prompt, clip_skip=2), of_class("WanTransformer3DModel"), ["x", "y"], told, {})
    del asked["asked"]
    assert asked == {
        "prompt": ["x", "y"], "num_images_per_prompt": 1, "num_videos_per_prompt": 1, "batch_size": 2,
        "do_classifier_free_guidance": False, "clean_caption": False, "clip_skip": 2, "max_sequence_length": 9,
    }  # fmt: skip


def test_a_class_of_ones_own_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine:
        """A denoiser that nobody else has."""

    class Derived(Mine):
        """Known by its base."""

    monkeypatch.setattr(ways, "WAYS", dict(WAYS))
    assert ways.way_of(Mine()) is None
    ways.register_way("Mine", WAYS["WanTransformer3DModel"])
    assert ways.way_of(Mine()) is ways.way_of(Derived()) is WAYS["WanTransformer3DModel"]
