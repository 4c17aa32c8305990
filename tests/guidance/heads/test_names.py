"""Head names: what is read is what was written, and everything else is refused with the model's ranges."""

from typing import Any

import pytest
from hypothesis import given, strategies as st

from genattn.errors import GenAttnError
from genattn.guidance.heads.names import all_heads, check_head_names, describe_layers, format_heads, parse_head, resolve_heads
from genattn.guidance.softpag.softpag import SoftPAG

LAYERS = {0: 4, 1: 4, 2: 6}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("L1H2", {(1, 2): 0.5}),
        ("l1h2, L0H3 ,", {(0, 3): 0.5, (1, 2): 0.5}),
        ("L2H4-5", {(2, 4): 0.5, (2, 5): 0.5}),
        ("L0-1H0", {(0, 0): 0.5, (1, 0): 0.5}),
        ("L1", {(1, h): 0.5 for h in range(4)}),
        ("L2H*", {(2, h): 0.5 for h in range(6)}),
        ("L1H2:0.25,L0H0", {(0, 0): 0.5, (1, 2): 0.25}),
        ([(1, 2), (0, 1)], {(0, 1): 0.5, (1, 2): 0.5}),
        (["L1H2", "L0H1:1"], {(0, 1): 1.0, (1, 2): 0.5}),
        ({(1, 2): 0.75}, {(1, 2): 0.75}),
        ({"L1H2": 0}, {(1, 2): 0.0}),
    ],
)
def test_reads_names(text: object, expected: dict) -> None:
    found = resolve_heads(text, LAYERS, 0.5)
    assert found == expected
    assert list(found) == sorted(found)


@given(st.dictionaries(st.tuples(st.integers(0, 1), st.integers(0, 3)), st.floats(0, 1), min_size=1))
def test_written_names_are_read_back(heads: dict) -> None:
    assert resolve_heads(format_heads(heads), LAYERS) == heads
    assert set(resolve_heads(format_heads(list(heads)), LAYERS, 0.5)) == set(heads)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ("L3H0", "L0-2 with H0-3 to H0-5"),
        ("L1H4", "layer 1 has heads H0-3, got L1H4"),
        ("L1H2-9", "got L1H4"),
        ("", "at least one head"),
        ([], "at least one head"),
        ("L2H5-4", "must run upwards"),
        ("H3", "must be written like"),
        ("L1H2:2", "u of L1H2 must be a number in \\[0, 1\\], got 2"),
        ("L1H2:nan", "got nan"),
        ("L1H2:x", "after ':' must be a number"),
        ("L1H2,L1H2:0.3", "must have one u, got 0.5 and 0.3 for L1H2"),
        ({(1, 2): "x"}, "u of L1H2"),
        ([1], "a name like L11H15"),
        (5, "heads must be names"),
    ],
)
def test_refuses(heads: object, message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        resolve_heads(heads, LAYERS, 0.5)


@pytest.mark.parametrize("u", [-0.1, 1.1, float("nan"), "x", None])
def test_refuses_a_default_weight_outside_the_range(u: object) -> None:
    with pytest.raises(GenAttnError, match="u must be a number"):
        resolve_heads("L1H2", LAYERS, u)


def test_lists_and_describes() -> None:
    assert len(all_heads(LAYERS)) == 14
    assert describe_layers({0: 4, 1: 4}) == "L0-1 with heads H0-3 each"
    assert describe_layers({0: 4, 2: 4}) == "L0,L2 with heads H0-3 each"
    assert describe_layers({}) == "no layers"
    assert parse_head("L11H15") == (11, 15)
    with pytest.raises(GenAttnError, match="written like L11H15"):
        parse_head("L11")


@pytest.mark.parametrize("heads", ["foo", "L1H2,H3", "L1H2;L2H0", ["L1", "1"], {"layer1": 0.5}])
def test_names_that_no_model_has_are_refused_when_they_are_written(heads: Any) -> None:
    with pytest.raises(GenAttnError, match="heads must be written like L11H15, L2H0-5, L7 or L11H15:0.3, got '"):
        SoftPAG(heads)


def test_heads_that_can_be_read_once_are_left_for_the_model() -> None:
    assert list(SoftPAG(iter(["L1H0"])).heads) == ["L1H0"]  # type: ignore[arg-type]
    for heads in ("L7", "L7-9H3", "l1h2:0.3", "L1H*", [(1, 2)], {(1, 2): 0.5}):
        check_head_names(heads)  # type: ignore[arg-type]
