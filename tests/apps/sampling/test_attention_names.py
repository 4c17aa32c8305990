"""Names of the command line become patterns, and unknown ones are listed."""

import pytest

import genattn
from genattn.apps.sampling.attention_names import ATTENTIONS, pattern_from_name
from genattn.errors import GenAttnError


def test_names_give_patterns() -> None:
    assert pattern_from_name("dense") is None
    assert pattern_from_name("radial") == genattn.RadialPattern(variant="genattn")
    assert pattern_from_name("radial-paper") == genattn.RadialPattern(variant="paper")
    options = '{"window_size": [3, 4, 4], "stride": [1, 2, 2]}'
    assert pattern_from_name("neighborhood", options) == genattn.NeighborhoodPattern((3, 4, 4), stride=(1, 2, 2))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nonsense", None, "must be one of " + ", ".join(ATTENTIONS)),
        ("radial", "{", "must be a JSON object, got '{'"),
        ("radial", "[1]", "must be a JSON object"),
        ("dense", '{"decay": 1}', "dense attention has no settings"),
        ("radial", '{"nonsense": 1}', "nonsense"),
    ],
)
def test_refusals(name: str, options: str | None, message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        pattern_from_name(name, options)
