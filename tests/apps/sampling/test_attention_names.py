"""Names of the command line become patterns, and unknown ones are listed."""

import pytest

import genattn
from genattn.apps.sampling.attention_names import ATTENTIONS, attention_from_name, pattern_from_name
from genattn.errors import GenAttnError
from genattn.planning.fitted import FittedNeighborhood


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
        ("nonsense", None, "must be one of auto, " + ", ".join(ATTENTIONS)),
        ("radail", None, "got 'radail'; did you mean 'radial'"),
        ("neighborhood", "window_size=5,9,9", "must be KEY=VALUE pairs, got '9' alone; write a shape as 5x9x9"),
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
        ("neighborhood", "stride=4", "--attention neighborhood needs a window beside stride; give --window 18x24x24"),
        ("auto", None, "auto is for sampling with a model; name a pattern with --attention"),
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


def test_a_window_that_nobody_named_is_made_for_the_size() -> None:
    assert pattern_from_name("neighborhood") == FittedNeighborhood(0.4)
    assert pattern_from_name("neighborhood", "density=0.25,tail=mean") == FittedNeighborhood(0.25, tail="mean")
    layout = genattn.TokenLayout.from_grid((8, 16, 16))
    assert FittedNeighborhood(0.25).plan(layout).density == 0.25


def test_what_a_model_fills_in_stays_a_name() -> None:
    assert attention_from_name("auto") == "auto"
    assert attention_from_name("neighborhood") == attention_from_name("gna") == "gna"
    assert pattern_from_name("gna:3x4x4") == pattern_from_name("neighborhood:3x4x4")
    assert attention_from_name("neighborhood", "density=0.3") == FittedNeighborhood(0.3)
    assert attention_from_name("neighborhood:5") == attention_from_name("neighborhood", window="5")
    assert attention_from_name("radial") == genattn.RadialPattern()
    assert attention_from_name("dense") is None


def test_a_preset_has_no_settings_beside_it() -> None:
    with pytest.raises(GenAttnError, match="auto takes its settings from the model's preset, got --pattern-options, --window"):
        attention_from_name("auto", "decay=0.3", window="5")
