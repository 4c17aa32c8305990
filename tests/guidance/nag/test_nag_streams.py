"""How what a block is told of the tokens follows the carried sequence: every entry at its token's place."""

import pytest
import torch

from genattn.guidance.nag.cut import Cut
from genattn.guidance.nag.streams import at_end, inside, rows, spliced

TEXT, MORE, IMAGE = 3, 2, 4
FIRST = Cut(TEXT + IMAGE, TEXT, MORE, TEXT, text_first=True)  # [text | negative | image]
LAST = Cut(TEXT + IMAGE, TEXT, MORE, TEXT + IMAGE, text_first=False)  # [image | text | negative]


def _sequence(cut: Cut, text: float, image: float) -> torch.Tensor:
    """The numbers of a stock sequence's tokens: text from `text` on, image from `image` on."""
    words = text + torch.arange(float(cut.text if text < 100 else cut.more))
    pixels = image + torch.arange(float(cut.image))
    return torch.cat([words, pixels] if cut.text_first else [pixels, words])


@pytest.mark.parametrize("cut", [FIRST, LAST], ids=["text first", "text last"])
def test_the_negatives_entries_stand_where_its_tokens_do(cut: Cut) -> None:
    mine, theirs = _sequence(cut, 0, 50), _sequence(cut, 100, 150)
    text, more, image = torch.arange(3.0), 100 + torch.arange(2.0), 50 + torch.arange(4.0)
    wanted = torch.cat([text, more, image] if cut.text_first else [image, text, more])
    assert torch.equal(spliced(mine, theirs, cut, 0), wanted)
    assert torch.equal(rows(-1)(mine[None], theirs[None], cut), wanted[None])
    pair = rows(0)((mine, -mine), (theirs, -theirs), cut)
    assert torch.equal(pair[0], wanted)
    assert torch.equal(pair[1], -wanted)
    assert rows(0)(None, None, cut) is None


@pytest.mark.parametrize(
    ("mask", "neutral"),
    [(torch.tensor([[True, False, True]]), True), (torch.tensor([[0.0, -9.0, 0.0]]), 0.0), (torch.tensor([[1, 0, 1]]), 1)],
    ids=["boolean", "additive", "numbers"],
)
def test_a_text_without_a_mask_hides_nothing(mask: torch.Tensor, neutral: float) -> None:
    """Where one of the two texts needed none."""
    free = mask.new_full((1, MORE), neutral)
    assert torch.equal(at_end(mask, None, FIRST), torch.cat([mask, free], -1))
    theirs = mask[:, 1:]
    assert torch.equal(at_end(None, theirs, FIRST), torch.cat([mask.new_full((1, TEXT), neutral), theirs], -1))
    assert torch.equal(at_end(mask, theirs, FIRST), torch.cat([mask, theirs], -1))
    assert at_end(None, None, FIRST) is None


@pytest.mark.parametrize("cut", [FIRST, LAST], ids=["text first", "text last"])
def test_a_mask_over_the_whole_sequence_may_be_missing_too(cut: Cut) -> None:
    mine = torch.rand(1, 1, 1, cut.length) < 0.5
    found = rows(-1)(mine, None, cut)
    assert found.shape[-1] == cut.total
    assert found[..., cut.at : cut.at + MORE].all()
    assert torch.equal(torch.cat([found[..., : cut.at], found[..., cut.at + MORE :]], -1), mine)
    theirs = torch.zeros(1, 1, 1, MORE + IMAGE, dtype=torch.bool)
    found = rows(-1)(None, theirs, cut)
    assert not found[..., cut.at : cut.at + MORE].any()
    assert found.sum() == cut.length


def test_one_entry_of_a_dictionary_follows() -> None:
    follow = inside("attention_mask", at_end)
    mask = torch.tensor([[True, False, True]])
    found = follow({"attention_mask": mask, "scale": 2}, {"attention_mask": mask[:, :MORE]}, FIRST)
    assert found["scale"] == 2
    assert found["attention_mask"].tolist() == [[True, False, True, True, False]]
    assert follow({"scale": 2}, None, FIRST) == {"scale": 2}
    assert follow(None, None, FIRST) is None
