"""An unconditional pass takes its factor from the conditional pass of the same step and run, and from no other; one plugin
serves several models at once."""

from typing import Any

import pytest
import torch

import genattn
from genattn.guidance.broadway.broadway import BroadWay
from genattn.guidance.broadway.enhance_a_video import EnhanceAVideo
from genattn.pipelines.tiny.random.build import build_inputs, build_model
from genattn.seam.plugin import Plugin

FIRST = [("cond", 900), ("uncond", 900), ("cond", 500), ("uncond", 500)]


@pytest.mark.parametrize(
    ("earlier", "last"),
    [
        (FIRST, ("uncond", 500)),  # a repeated pass of the step is what it was
        ([("cond", 900), ("uncond", 900)], ("uncond", 500)),  # the next step's comes before its conditional pass
        (FIRST[:2], ("uncond", 950)),  # a run of one step, and then another run
    ],
)
def test_the_factor_is_that_of_the_step(earlier: list[tuple[str, int]], last: tuple[str, int]) -> None:
    model: Any = build_model("wan")
    inputs = {name: build_inputs("wan", seed=seed) for seed, name in enumerate(("cond", "uncond"))}

    def forward(name: str, timestep: int) -> torch.Tensor:
        with torch.no_grad(), model.cache_context(name):
            return model(**{**inputs[name], "timestep": torch.tensor([timestep])}, return_dict=False)[0]  # type: ignore[no-any-return]

    def run(calls: list[tuple[str, int]]) -> torch.Tensor:
        with genattn.apply(model, BroadWay(alpha=0.6, energy="+20%", stop=1.0)) as handle:
            handle.set(num_steps=2)
            return [forward(*call) for call in calls][-1]

    own = run([last])  # its own factor: no conditional pass came before
    shared = run([("cond", last[1]), last])
    assert not torch.equal(own, shared)
    assert torch.equal(run([*earlier, last]), shared if earlier[-1][1] == last[1] else own)


@pytest.mark.parametrize("make", [lambda: BroadWay(stop=1.0), lambda: EnhanceAVideo(50.0)])
def test_one_plugin_on_two_models_of_different_families(make: Any) -> None:
    models = {family: build_model(family) for family in ("wan", "cogvideox")}

    def out(family: str) -> torch.Tensor:
        with torch.no_grad():
            return models[family](**build_inputs(family), return_dict=False)[0]  # type: ignore[no-any-return]

    stock = {family: out(family) for family in models}
    alone = {}
    for family, model in models.items():
        with genattn.apply(model, make()) as handle:
            handle.set(num_steps=1)
            alone[family] = out(family)
        assert not torch.equal(alone[family], stock[family])
    plugin = make()
    handles = {family: genattn.apply(model, plugin).set(num_steps=1) for family, model in models.items()}
    assert all(torch.equal(out(family), alone[family]) for family in models)
    handles["cogvideox"].remove()
    with genattn.apply(models["wan"], Plugin()):  # chains are made anew
        assert torch.equal(out("wan"), alone["wan"])
    assert torch.equal(out("cogvideox"), stock["cogvideox"])
    handles["wan"].remove()
    assert torch.equal(out("wan"), stock["wan"])
