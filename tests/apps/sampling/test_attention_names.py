"""Names of the command line become patterns, and unknown ones are listed."""

import pytest

import genattn
from genattn.apps.sampling.attention_names import ATTENTIONS, pattern_from_name
from genattn.errors import GenAttnError


def test_names_give_patterns() -> None:
    assert pattern_from_name("dense") is None
    assert pattern_from_name("radial") == genattn.RadialPattern(variant="genattn")
    assert pattern_from_name("radial-paper") == genattn.RadialPattern(variant="paper")
    wanted = genattn.NeighborhoodPattern((3, 4, 4), stride=(1, 2, 2))
    assert pattern_from_name("neighborhood", '{"window_size": [3, 4, 4], "stride": [1, 2, 2]}') == wanted
    assert pattern_from_name("neighborhood", "window_size=3x4x4,stride=1x2x2") == wanted
    assert pattern_from_name("neighborhood:3x4x4/1x2x2") == wanted
    assert pattern_from_name("neighborhood", window="3x4x4", stride="1x2x2") == wanted
    assert pattern_from_name("neighborhood", "stride=1x2x2", window="3x4x4") == wanted
    assert pattern_from_name("neighborhood:5") == genattn.NeighborhoodPattern(5)
    assert pattern_from_name("radial", "decay=0.3") == genattn.RadialPattern(decay=0.3)
    causal = pattern_from_name("neighborhood:4x4", "is_causal=True,tile=runs")
    assert causal == genattn.NeighborhoodPattern((4, 4), is_causal=True, tile="runs")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nonsense", None, "must be one of " + ", ".join(ATTENTIONS)),
        ("radial", "{", "must be a JSON object or KEY=VALUE, got '{'"),
        ("radial", "[1]", "must be a JSON object"),
        ("dense", '{"decay": 1}', "dense attention has no settings"),
        ("radial", '{"decai": 0.3}', "radial has no setting 'decai'; did you mean 'decay'. It has: .*decay"),
        ("radial", "variant=official", "radial has no setting 'variant'"),
        (
            "neighborhood",
            "tilee=runs",
            "neighborhood has no setting 'tilee'; did you mean 'tile'. It has: .*window_size, stride",
        ),
        ("neighborhood", None, "--attention neighborhood needs a window; give --window 18x24x24"),
        ("neighborhood:8x8x8x8", None, "--window must be 1 to 3 whole numbers joined by x"),
        ("neighborhood:8x8/2x2", "stride=2", "give either --stride or 'stride' in --pattern-options, got both"),
        ("radial:8x8", None, "--window and --stride belong to neighborhood, got --attention radial:8x8"),
    ],
)
def test_refusals(name: str, options: str | None, message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        pattern_from_name(name, options)


def test_a_window_is_given_once() -> None:
    with pytest.raises(GenAttnError, match="give the window in the name or by --window and --stride, got both"):
        pattern_from_name("neighborhood:8x8", window="4x4")
