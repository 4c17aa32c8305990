"""The text side of the tiny models: every caption a word a token, and an encoder that tells which word goes with which."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import UMT5EncoderModel

from genattn.errors import GenAttnError
from genattn.pipelines.tiny import wan as tiny_wan
from genattn.pipelines.tiny.text import (
    ENDLESS_TEXT_TOKENS,
    TEXT_TOKENS,
    CaptionReader,
    build_text_encoder,
    build_tokenizer,
    caption_words,
    encode_text,
    tokenize,
    word_labels,
)
from genattn.pipelines.tiny.world import (
    COLOURS,
    ENDLESS,
    MOTIONS,
    SHAPES,
    SIZES,
    caption,
    is_held_out,
    parse_caption,
    sample_scene,
)
from genattn.pipelines.training.trainer import TrainSettings, step_generator

ASSETS = Path(__file__).resolve().parents[3] / "assets"
PAIR = "a small red circle moves left and right and a blue ring stays still on a dark background"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def labels_of(text, tokenizer):
    ids = tokenize(tokenizer, [text], ENDLESS_TEXT_TOKENS)
    return word_labels([parse_caption(text)], [tokenizer.convert_ids_to_tokens(ids[0].tolist())])[0]


def label(thing, order):
    motions = [*MOTIONS, *ENDLESS]
    return [
        list(COLOURS).index(thing.colour),
        SHAPES.index(thing.shape),
        motions.index(thing.motion),
        list(SIZES).index(thing.size),
        order,
    ]


def test_every_caption_is_one_token_a_word(tokenizer):
    for seed in range(200):
        text = caption(sample_scene(seed, two_objects=0.5))
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 1 < TEXT_TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert {"red", "right", "orbits", "background"} <= set(caption_words())


@pytest.mark.parametrize("text", ["", " ", "A photo of Ünïcode 漢字 🎉", "a  RED\ncircle", "x" * 3000])
def test_any_text_tokenizes_without_unknowns(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert 2 not in ids
    assert ids[-1] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == text.lower().split()


def test_the_tokenizer_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a red circle moves right on a dark background", ""):
        assert loaded(text).input_ids == tokenizer(text).input_ids


def test_each_word_tells_of_its_own_object(tokenizer):
    labels = labels_of(PAIR, tokenizer)
    first, second = parse_caption(PAIR).objects
    words = PAIR.split()
    split, end = words.index("blue") - 2, words.index("on")
    assert labels[:split].tolist() == [label(first, 1)] * split  # "and right" is still the first one's motion
    assert labels[split].tolist() == [-1] * 5
    assert labels[split + 1 : end].tolist() == [label(second, 2)] * (end - split - 1)
    assert (labels[end:] == -1).all()  # the background, the end and the padding


def test_one_object_stands_alone(tokenizer):
    text = "a large cyan cross orbits on a gray background"
    labels = labels_of(text, tokenizer)
    assert labels[:5].tolist() == [label(parse_caption(text).objects[0], 0)] * 5


def test_captions_are_drawn_from_trained_combinations_every_fourth_of_motions_that_go_on(tokenizer):
    reader = CaptionReader(build_text_encoder(len(tokenizer), 8, 1, 2), tokenizer)
    ids, labels = reader.draw(64, step_generator(0, 3))
    again, _ = reader.draw(64, step_generator(0, 3))
    assert torch.equal(ids, again)
    scenes = [parse_caption(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    for index, scene in enumerate(scenes):
        assert not any(is_held_out(*thing.combination) for thing in scene.objects)
        assert {thing.motion in ENDLESS for thing in scene.objects} == {index % 4 == 3}
    assert 32 < sum(len(scene.objects) == 2 for scene in scenes) < 64
    assert labels.shape == (*ids.shape, 5)


def test_the_loss_is_what_is_read_wrong_and_how_far_the_embeddings_moved(tokenizer):
    torch.manual_seed(0)
    encoder = build_text_encoder(len(tokenizer), 8, 1, 2)
    reader, free = CaptionReader(encoder, tokenizer, 3.0), CaptionReader(encoder, tokenizer, 0.0)
    free.heads = reader.heads
    ids, labels = reader.draw(8, step_generator(0, 0))
    before = encode_text(encoder, ids).detach()
    torch.testing.assert_close(reader(ids, labels), free(ids, labels))  # nothing has moved yet
    with torch.no_grad():
        encoder.encoder.final_layer_norm.weight *= 1.5
    real = before[ids != 0]
    moved = (0.5 * real).square().mean() / real.var()
    torch.testing.assert_close(reader(ids, labels), free(ids, labels) + 3.0 * moved)
    torch.nn.init.zeros_(free.heads.weight)
    torch.nn.init.zeros_(free.heads.bias)
    blind = torch.tensor([float(size) for size in free.sizes]).log().mean()
    torch.testing.assert_close(free(ids, labels), blind)
    assert not any("outside" in name for name, _ in reader.named_parameters())


def test_the_encoder_that_is_held_to_follows_the_words_to_their_device(tokenizer):
    encoder = build_text_encoder(len(tokenizer), 8, 1, 2)
    reader = CaptionReader(encoder, tokenizer)
    ids, labels = reader.draw(2, step_generator(0, 0))
    before, moved = reader._outside[0], []

    class Elsewhere:
        def to(self, device):
            moved.append(device)
            return before

    reader._outside = Elsewhere(), tokenizer
    reader(ids, labels)
    assert moved == [ids.device]
    reader.hold = 0.0
    reader(ids, labels)
    assert len(moved) == 1, "an encoder that nothing holds is not asked for what it was"


def test_what_is_read_right_is_counted_by_whole_words(tokenizer):
    reader = CaptionReader(build_text_encoder(len(tokenizer), 8, 1, 2), tokenizer)
    ids, labels = reader.draw(4, step_generator(0, 1))
    torch.nn.init.zeros_(reader.heads.weight)
    torch.nn.init.zeros_(reader.heads.bias)
    told = labels[labels[..., 0] >= 0]
    answer = told[0].tolist()
    starts = [sum(reader.sizes[:part]) for part in range(5)]
    for start, value in zip(starts, answer, strict=True):
        reader.heads.bias.data[start + value] = 1.0
    assert reader.accuracy(ids, labels) == pytest.approx(float((told == told[0]).all(-1).float().mean()))


def test_a_negative_hold_is_refused(tokenizer):
    with pytest.raises(GenAttnError, match=r"hold must be >= 0, got -1.0; give 0"):
        CaptionReader(build_text_encoder(len(tokenizer), 8, 1, 2), tokenizer, -1.0)


def test_the_phase_teaches_resumes_and_hands_its_encoder_on(tmp_path, monkeypatch, capsys):
    def few(steps, folder):
        settings = TrainSettings(steps, learning_rate=5e-3, warmup=1, decay=0.0, save_minutes=1e9)
        return tiny_wan.train_text(folder, Accelerator(cpu=True), settings)

    assert few(4, tmp_path / "whole") == 4
    assert few(2, tmp_path / "parts") == 2
    assert few(4, tmp_path / "parts") == 4
    files = [(tmp_path / run / "text.safetensors").read_bytes() for run in ("whole", "parts")]
    assert files[0] == files[1]
    assert "text step 4: " in capsys.readouterr().out
    made = UMT5EncoderModel.from_pretrained(tmp_path / "whole" / "text_encoder").state_dict()
    begun = []

    def train(model, *arguments):
        begun.append(model.text_encoder.state_dict())
        return 0

    monkeypatch.setattr(tiny_wan, "train", train)
    (tmp_path / "whole" / "latents.json").write_text('{"latents_mean": [0, 0], "latents_std": [1, 1]}')
    tiny_wan.train_transformer(tmp_path / "whole", Accelerator(cpu=True), TrainSettings(1), tiny_wan.Curriculum(1, 1))
    for name, value in made.items():
        torch.testing.assert_close(begun[0][name], value, rtol=0, atol=0)


def test_the_shipped_encoder_tells_which_shape_has_which_colour(tokenizer):
    """Read by least squares off the colours of two objects; an encoder that only the denoiser trained gave .48."""
    encoder = UMT5EncoderModel.from_pretrained(ASSETS / "tiny-wan-long-bound" / "text_encoder", local_files_only=True).eval()
    scenes = [sample_scene(seed, two_objects=1.0) for seed in range(2_000_000, 2_001_200)]
    ids = tokenize(tokenizer, [caption(scene) for scene in scenes])
    with torch.no_grad():
        embeds = encode_text(encoder, ids)
    colours = torch.tensor(
        [[tokenizer.convert_tokens_to_ids("\u2581" + thing.colour) for thing in scene.objects] for scene in scenes]
    )
    shapes = torch.tensor([[SHAPES.index(thing.shape) for thing in scene.objects] for scene in scenes]).flatten()
    places = (ids[:, None, :] == colours[..., None]).int().argmax(-1)
    words = embeds.gather(1, places[..., None].expand(-1, -1, embeds.shape[-1])).flatten(0, 1)
    words = torch.cat([words, torch.ones(len(words), 1)], 1)
    fit = torch.linalg.lstsq(words[:2000], torch.nn.functional.one_hot(shapes[:2000]).float()).solution
    assert ((words[2000:] @ fit).argmax(-1) == shapes[2000:]).float().mean() > 0.95
