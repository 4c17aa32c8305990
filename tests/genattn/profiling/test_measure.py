"""Measuring candidates on a pipeline: exact errors, choices that trade error for density, a file that round-trips."""

from pathlib import Path
from typing import Any

import pytest
import torch

import genattn
from genattn.errors import GenAttnError
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.as_json import load_pattern, pattern_from_dict, pattern_to_dict, save_pattern
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.combine import Intersection, PerHead, PerLayer, Union
from genattn.patterns.dense import DensePattern
from genattn.patterns.global_tokens import GlobalTokens
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.profiling.measure import Measurement, measure_patterns, measured_budget, sparsest_above, with_and_without_tail
from genattn.selection.rules import TopK
from genattn.selection.tiling import Clusters

CANDIDATES = [
    RadialPattern(block=4, decay=0.2, sink=False, tail=None),
    NeighborhoodPattern((2, 2, 2), tail=None),
    NeighborhoodPattern((-1, 2, 4), tail=None),
]


@pytest.fixture(scope="module")
def pipe(random_wan_folder: Path) -> Any:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(random_wan_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _run(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = {"height": 96, "width": 128, "num_frames": 13}
    return pipe("a red circle", num_inference_steps=4, generator=generator, output_type="pt", **size).frames


@pytest.fixture(scope="module")
def found(pipe: Any) -> Measurement:
    return measure_patterns(pipe, lambda: _run(pipe), CANDIDATES)


def test_every_layer_and_head_is_measured(pipe: Any, found: Measurement) -> None:
    config = pipe.transformer.config
    assert found.errors.shape == (config.num_layers, config.num_attention_heads, 4)
    assert (found.errors[..., 0] == 0).all()
    assert (found.errors[..., 1:] > 0).all()
    assert found.densities[0] == 1
    assert (found.densities[1:] < 1).all()
    # three steps, two passes of guidance, every layer
    assert found.calls == 3 * 2 * config.num_layers
    assert found.notes()["calls"] == found.calls


def test_the_pipeline_is_left_alone(pipe: Any, found: Measurement) -> None:
    before = _run(pipe)
    measure_patterns(pipe, lambda: None if found is None else _run(pipe), CANDIDATES[:1])
    assert torch.equal(_run(pipe), before)


def test_choice_by_density_and_by_error(pipe: Any, found: Measurement) -> None:
    layers = pipe.transformer.config.num_layers
    chosen = [found.choose(target_density=d) for d in (float(found.densities.min()), 0.7, 1.0)]
    costs = [_cost(found, p, layers) for p in chosen]
    assert costs[0][0] >= costs[1][0] >= costs[2][0] == 0
    assert costs[1][1] <= 0.7
    for limit in (0.0, 0.5, 1e9):
        pattern = found.choose(max_error=limit)
        error, _ = _cost(found, pattern, layers, worst=True)
        assert error <= limit**2 + 1e-12
    assert found.choose(max_error=0.0).for_layer(0, layers) == DensePattern()


def _cost(found: Measurement, pattern: Pattern, layers: int, worst: bool = False) -> tuple[float, float]:
    errors, densities = [], []
    for layer in range(layers):
        part = pattern.for_layer(layer, layers)
        heads = found.errors.shape[1]
        each = [part.patterns[c] for c in part.choice] if isinstance(part, PerHead) else [part] * heads  # type: ignore[index,union-attr]
        for head, one in enumerate(each):
            index = found.candidates.index(one)
            errors.append(float(found.errors[layer, head, index]))
            densities.append(float(found.densities[index]))
    return (max(errors) if worst else sum(errors)), sum(densities) / len(densities)


@pytest.mark.parametrize("least", [0.1, 0.3, 1 / 3, 0.7])
def test_the_sparsest_density_there_is_can_be_asked_for(least: float) -> None:
    """Though a mean of many equal floats is not always that float, and an error be as large as floats go."""
    candidates = (DensePattern(), CANDIDATES[0])
    densities = torch.tensor([1.0, least])
    for worst in (0.5, 1e300):
        errors = torch.zeros(7, 23, 2, dtype=torch.float64)
        errors[..., 1] = worst
        chosen = Measurement(candidates, errors, densities, 1).choose(target_density=float(densities.min()))
        assert chosen.patterns == (CANDIDATES[0],)  # type: ignore[attr-defined]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_measurements_that_are_not_finite_choose_nothing(broken: float) -> None:
    errors, densities = torch.zeros(1, 2, 2, dtype=torch.float64), torch.tensor([1.0, 0.2])
    errors[0, 1, 1] = broken
    for one in (Measurement((DensePattern(), CANDIDATES[0]), errors, densities, 1),):
        for how in ({"target_density": 0.2}, {"max_error": 0.1}):
            with pytest.raises(GenAttnError, match="errors and densities must be finite"):
                one.choose(**how)
    finite = Measurement((DensePattern(), CANDIDATES[0]), torch.zeros(1, 2, 2), densities, 1)
    with pytest.raises(GenAttnError, match="max_error must be >= 0, got nan"):
        finite.choose(max_error=float("nan"))


def test_chosen_settings_run_and_beat_the_wrong_way_round(pipe: Any, found: Measurement) -> None:
    """The video is nearer to dense under the chosen heads than under the heads chosen for the largest error."""
    turned = Measurement(found.candidates, found.errors.max() - found.errors, found.densities, found.calls)
    turned.errors[..., 0] = 0
    dense, away = _run(pipe), []
    for measurement in (found, turned):
        with genattn.apply(pipe, measurement.choose(target_density=0.75), dense_steps=0, dense_layers=0) as handle:
            away.append(float((_run(pipe) - dense).square().mean()))
            assert handle.report()
    assert away[0] < away[1]


def test_sparsest_above_a_psnr(pipe: Any, found: Measurement) -> None:
    pattern, density, psnr = sparsest_above(pipe, lambda: _run(pipe), found, 10.0, densities=(0.6, 0.9), dense_steps=0)
    assert density == 0.6
    assert psnr >= 10
    assert isinstance(pattern, PerLayer)
    dense, one, most = sparsest_above(pipe, lambda: _run(pipe), found, 1000.0, densities=(0.6,), dense_steps=0)
    assert (dense, one) == (DensePattern(), 1.0)
    assert most > 1000


def test_settings_file(found: Measurement, tmp_path: Path) -> None:
    pattern = found.choose(target_density=0.8)
    save_pattern(pattern, tmp_path / "settings.json", found.notes())
    assert load_pattern(tmp_path / "settings.json") == pattern
    assert not list(tmp_path.glob("*.part"))


def test_every_pattern_goes_to_json_and_back() -> None:
    patterns = [
        RadialPattern(decay=(0.2, 0.5), window="box"),
        RadialPattern(layer_decay=(0.2, (0.5, 1.0))),
        NeighborhoodPattern((-1, 12, 24), (1, 4, 8), base_size=(-1, 44, 80), is_causal=(True, False, False)),
        BlockTopK(keep=0.1),
        GlobalTokens(Union(RadialPattern(), NeighborhoodPattern(3)), frames=(0, -1), every=(1, 8, 8)),
        Intersection(DensePattern(), PerHead((RadialPattern(), DensePattern()), (0, 1, 1))),
    ]
    for pattern in patterns:
        assert pattern_from_dict(pattern_to_dict(pattern)) == pattern


def test_refusals(pipe: Any, found: Measurement, tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="at least one pattern besides dense"):
        measure_patterns(pipe, lambda: None, [DensePattern()])
    with pytest.raises(GenAttnError, match=r"fractions must lie in \[0, 1\)"):
        measure_patterns(pipe, lambda: None, CANDIDATES, fractions=(1.0,))
    with pytest.raises(GenAttnError, match="no self-attention was called"):
        measure_patterns(pipe, lambda: None, CANDIDATES)
    with pytest.raises(GenAttnError, match="nearest legal window_size"):
        measure_patterns(pipe, lambda: _run(pipe), [NeighborhoodPattern((99, 1, 1))])
    for arguments, says in (
        ({}, "give target_density or max_error"),
        ({"max_error": -1.0}, "max_error must be >= 0"),
        ({"target_density": 0.01}, "the sparsest candidate"),
    ):
        with pytest.raises(GenAttnError, match=says):
            found.choose(**arguments)
    with pytest.raises(GenAttnError, match="type must be one of"):
        pattern_from_dict({"type": "os.system"})
    with pytest.raises(GenAttnError, match="the description of a RadialPattern is damaged"):
        pattern_from_dict({"type": "RadialPattern", "speed": 3})
    with pytest.raises(GenAttnError, match="must be a readable JSON file"):
        load_pattern(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(GenAttnError, match="genattn-pattern-1"):
        load_pattern(tmp_path / "other.json")

    class Mine(DensePattern):
        pass

    with pytest.raises(GenAttnError, match="to be saved must be one of"):
        pattern_to_dict(Mine())


def test_tails_are_switched_by_layer_and_head() -> None:
    window = NeighborhoodPattern((2, 4, 4))
    candidates = with_and_without_tail([window, RadialPattern(variant="official", tail=None)])
    tails = [p.tail for p in candidates]
    assert tails == [None, "mean2", None]
    assert [p.tail for p in with_and_without_tail([AdaptivePattern(tiles=Clusters(8, 24))])] == [None, "mean2"]
    assert [p.tail for p in with_and_without_tail([window.with_tail("mean")])] == ["mean"], "what is named stays"
    errors = torch.full((2, 2, 4), 9.0, dtype=torch.float64)
    errors[..., 0] = 0
    for layer, head, best in ((0, 0, 2), (0, 1, 1), (1, 0, 2), (1, 1, 2)):
        errors[layer, head, best] = 0.1
    densities = torch.tensor([1.0, 0.3, 0.3, 0.3], dtype=torch.float64)
    found = Measurement((DensePattern(), *candidates), errors, densities, 1).choose(target_density=0.3)
    layers = [found.for_layer(n, 2) for n in range(2)]
    assert layers[0].tail_of_heads() == ("mean2", None)
    assert layers[1].tail_of_heads() == "mean2"
    plan = layers[0].plan(genattn.TokenLayout.from_grid((4, 8, 8)), 16, 16)
    assert plan.tail is not None
    assert plan.tail.skipped[0].any()
    assert not plan.tail.skipped[1].any()


def test_a_budget_from_measured_curves(pipe: Any) -> None:
    """A head that gains more gets more, the mean is what was asked for, and the pattern runs with it."""
    rule = [AdaptivePattern(TopK(share), tail=None) for share in (0.6, 0.2)]
    found = measure_patterns(pipe, lambda: _run(pipe), rule)
    budget = measured_budget(found, 0.5)
    shares = torch.tensor(budget.layers)
    assert shares.shape == found.errors.shape[:2]
    assert float(shares.mean()) == pytest.approx(0.5)
    with genattn.apply(pipe, AdaptivePattern(budget=budget, tail=None), dense_steps=0, dense_layers=0) as handle:
        _run(pipe)
        assert handle.report().sparse_calls > 0
    with pytest.raises(GenAttnError, match="a budget needs AdaptivePatterns of one share each, got .'NeighborhoodPattern'"):
        measured_budget(
            Measurement((DensePattern(), NeighborhoodPattern(3)), found.errors[..., :2], found.densities[:2], 1), 0.5
        )
    with pytest.raises(GenAttnError, match="target must be between the smallest share 0.2"):
        measured_budget(found, 0.1)
