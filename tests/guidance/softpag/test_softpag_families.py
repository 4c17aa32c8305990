"""SoftPAG on every family: one guided forward equals explicit maps, and skipping the shared prefix changes nothing."""

import copy
from typing import Any

import explicit_guidance
import pytest
import torch
from older_diffusers import ABSENT
from torch import nn

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.passes.block_swap import CHAINS
from genattn.guidance.passes.prediction import leaves
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.guidance.softpag.tap import primary_sites
from genattn.layouts.site import AttentionSite
from genattn.pipelines.tiny.random.build import build_inputs, build_model, families

LINEAR = {"sana"}
ONE_BY_ONE = {"mochi", "omnigen"}  # the second's input images are told by number of sample
# some tokens are keys alone there: explicit maps of the whole sequence say nothing of them
PART = {"anyflow-far", "cosmos3", "flux2-kv", "nucleus-moe", "prx", "qwen-image-2.1"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:CPU Autocast"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated"),
]
NOT_CHAINS = {"wan-vace", "latte", "animatediff"}


class Watching(SoftPAG):
    """Keeps the sites that it was shown."""

    def attach(self, model: nn.Module, sites: Any) -> None:
        self.sites: dict[int, AttentionSite] = primary_sites(sites)
        super().attach(model, sites)


def some_heads(sites: dict[int, AttentionSite]) -> dict[tuple[int, int], float]:
    """The first head of the last layer, the last head of a layer in the middle."""
    depths = sorted(sites)
    middle = depths[len(depths) // 2]
    return {(middle, sites[middle].heads - 1): 1.0, (depths[-1], 0): 0.6}


def guided(model: nn.Module, inputs: dict[str, Any], heads: dict, **settings: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
    with genattn.apply(model, SoftPAG(heads, scale=3.0, layout="single", **settings)) as handle, torch.no_grad():
        out = leaves(model(**inputs))
    return out, handle.plugins[0].describe()


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("family", sorted(PART & set(families())))
def test_runs_where_some_tokens_are_keys_alone(family: str) -> None:
    """The guided answer is finite and differs; a perturbed head that looks at itself alone gives its own value."""
    model, inputs = build_model(family), build_inputs(family)
    watching = Watching("L0-0", layout="single")
    genattn.apply(model, watching).remove()
    heads = some_heads(watching.sites)
    with torch.no_grad():
        clean = leaves(model(**copy.deepcopy(inputs)))
    out, told = guided(model, copy.deepcopy(inputs), heads)
    assert all(o.isfinite().all() for o in out)
    assert max((o - c).abs().max() for o, c in zip(out, clean, strict=True)) > 1e-4
    summary = next(iter(told["models"].values()))
    assert all(summary["hits"].values())


@pytest.mark.parametrize("family", sorted(set(families()) - LINEAR - PART))
def test_equals_explicit_maps(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build_model(family), build_inputs(family)
    watching = Watching("L0-0", layout="single")
    try:
        genattn.apply(model, watching).remove()
    except GenAttnError:  # a UNet's first block may be a motion module
        assert watching.sites
    heads = some_heads(watching.sites)
    order = list(watching.sites)
    monkeypatch.setattr(
        explicit_guidance, "attention_modules", lambda model: [model.get_submodule(s.name) for s in watching.sites.values()]
    )
    rows: dict[int, torch.Tensor] = {}
    for (layer, head), u in heads.items():
        rows.setdefault(order.index(layer), torch.zeros(watching.sites[layer].heads))[head] = u
    with torch.no_grad():
        clean = leaves(model(**inputs))
        with explicit_guidance.explicit_maps(model, rows):
            perturbed = leaves(model(**inputs))
    expected = [c + 3.0 * (c - p) for c, p in zip(clean, perturbed, strict=True)]
    assert max((e - c).abs().max() for e, c in zip(expected, clean, strict=True)) > 1e-4

    whole, _ = guided(model, inputs, heads, reuse_prefix=False)
    assert max((a - b).abs().max() for a, b in zip(whole, expected, strict=True)) <= 1e-5
    reused, told = guided(model, inputs, heads)
    assert all(torch.equal(a, b) for a, b in zip(whole, reused, strict=True))
    summary = next(iter(told["models"].values()))
    if type(model).__name__ in CHAINS and family not in NOT_CHAINS:
        assert summary["blocks_per_extra_pass"] < 1
    else:
        assert "not known to form a chain" in summary["why_whole"]
    if family not in ONE_BY_ONE:
        batched, _ = guided(model, inputs, heads, mode="batched")
        assert max((a - b).abs().max() for a, b in zip(batched, expected, strict=True)) <= 1e-5


@pytest.mark.parametrize("family", sorted(LINEAR))
def test_refuses_linear_attention(family: str) -> None:
    with pytest.raises(GenAttnError, match="is linear attention"):
        genattn.apply(build_model(family), SoftPAG("L0H0"))


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_refuses_samples_that_differ_where_they_go_one_by_one() -> None:
    model, inputs = build_model("mochi"), build_inputs("mochi")
    told = r"\(mode='batched', per_sample\) .* a call of 1 for 4 samples: this model attends to its samples one by one"
    with pytest.raises(GenAttnError, match=told):
        guided(model, inputs, {(1, 0): 0.5}, mode="batched")


def test_every_known_chain_is_shown() -> None:
    shown = {type(build_model(family)).__name__ for family in set(families()) - NOT_CHAINS}
    assert shown >= CHAINS - ABSENT
