"""The guided pass among its neighbours: caches, sparse patterns, other terms, other methods as presets."""

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import nn

import genattn
from genattn import NeighborhoodPattern, RadialPattern
from genattn.errors import GenAttnError
from genattn.guidance.passes.delta import Projection
from genattn.guidance.passes.pass_role import PassReader
from genattn.guidance.passes.prediction import leaves, map_leaves, take_call, with_leaves
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.plugin import Plugin, Run


def run(family: str, *plugins: Any, cache: bool = False, applied: dict | None = None, **call: Any) -> torch.Tensor:
    pipe, kwargs = build_pipeline(family)
    if cache:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    kwargs |= {"output_type": "latent", **call}
    generate = lambda: pipe(**kwargs, generator=torch.Generator().manual_seed(0))[0]  # noqa: E731
    if not plugins:
        return generate()
    with genattn.apply(pipe, *plugins, **(applied or {})):
        return generate()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# ---- caches


def test_block_caches_keep_the_two_passes_apart() -> None:
    # with an endless threshold every step after the first repeats the residual of its own pass, so the delta of the
    # first step goes on; if both passes shared one cache, the second step's delta would vanish
    plain = run("wan", cache=True, num_inference_steps=4)
    guided = run("wan", SoftPAG("L2", u=1.0, reuse_prefix=False), cache=True, num_inference_steps=4)
    only_first = run("wan", SoftPAG("L2", u=1.0, reuse_prefix=False, stop=0.0), cache=True, num_inference_steps=4)
    assert difference(guided, plain) > 0.5
    assert difference(guided, only_first) > 0.5


@pytest.mark.parametrize("mode", ["extra", "batched"])
def test_a_cache_that_never_skips_changes_nothing(mode: str) -> None:
    pipe, kwargs = build_pipeline("wan")
    kwargs |= {"output_type": "latent"}
    plugin = lambda: SoftPAG("L1", stop=0.4, mode=mode)  # noqa: E731
    expected = run("wan", plugin())
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
    with genattn.apply(pipe, plugin()) as handle:
        found = pipe(**kwargs, generator=torch.Generator().manual_seed(0))[0]
        told = handle.plugins[0].describe()["models"]["WanTransformer3DModel"]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert "hook, which must see every pass" in told["why_whole"]


# ---- several plugins


@pytest.mark.parametrize("pattern", [RadialPattern(decay=0.1), NeighborhoodPattern((1, 2, 2))])
def test_goes_with_sparse_patterns(pattern: Any) -> None:
    plugins = (pattern, SoftPAG("L1H1", u=1.0, scale=2.0))
    settings = {"num_frames": 33, "num_inference_steps": 2}
    everywhere = {"applied": {"dense_steps": 0, "dense_layers": 0}, **settings}
    both = run("wan", *plugins, **everywhere)
    assert difference(both, run("wan", *plugins[::-1], **everywhere)) == 0
    assert difference(both, run("wan", pattern, **everywhere)) > 1e-2
    assert difference(both, run("wan", plugins[1], **settings)) > 1e-3


def test_goes_with_sparse_patterns_exactly_for_full_heads() -> None:
    """Heads at u = 1 give their values, whatever pattern the layer runs under."""
    model, inputs = build_model("wan"), build_inputs("wan")
    seen: list[torch.Tensor] = []

    class Reader(Plugin):
        def attention(self, call: Any, inner: Any) -> torch.Tensor:
            out = inner(call)
            if call.run.extra and call.site.depth == 1:
                seen.append(out[:, :, 1].clone() - call.value[:, :, 1])
            return out

    plugins = (NeighborhoodPattern((1, 2, 2)), Reader(), SoftPAG("L1H1", u=1.0, layout="single"))
    with genattn.apply(model, *plugins, dense_steps=0, dense_layers=0), torch.no_grad():
        model(**inputs)
    assert len(seen) == 1
    assert seen[0].abs().max() == 0


def test_terms_add_up_against_the_clean_prediction() -> None:
    model, inputs = build_model("sd3"), build_inputs("sd3")
    first = lambda **s: SoftPAG("L1H1", u=1.0, scale=2.0, layout="single", **s)  # noqa: E731
    second = lambda **s: SoftPAG("L2H0", u=0.5, scale=-1.0, layout="single", **s)  # noqa: E731

    def out(*plugins: Plugin) -> torch.Tensor:
        with genattn.apply(model, *plugins), torch.no_grad():
            return leaves(model(**inputs))[0]

    with torch.no_grad():
        clean = leaves(model(**inputs))[0]
    both = out(first(rescale=0.7), second(projection=Projection(eta=0.5)))
    expected = out(first(rescale=0.7)) + out(second(projection=Projection(eta=0.5))) - clean
    torch.testing.assert_close(both, expected, atol=2e-6, rtol=0)
    with pytest.raises(GenAttnError, match="several terms at once need mode='extra'"):
        out(first(), second(mode="batched"))


def test_an_exception_leaves_nothing_behind() -> None:
    model, inputs = build_model("sd3"), build_inputs("sd3")
    blocks, fail = model.transformer_blocks, [True]

    def hook(*_: Any) -> None:
        if fail[0]:
            raise RuntimeError("lost")

    plugin = SoftPAG("L1H1", layout="single")
    with genattn.apply(model, plugin), torch.no_grad():
        remove = model.transformer_blocks[2].register_forward_hook(hook)
        with pytest.raises(RuntimeError, match="lost"):
            model(**inputs)
        fail[0] = False
        remove.remove()
        assert model.transformer_blocks is blocks
        first = leaves(model(**inputs))[0]
    with genattn.apply(model, SoftPAG("L1H1", layout="single")), torch.no_grad():
        assert torch.equal(leaves(model(**inputs))[0], first)


# ---- replacing the unconditional pass


@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_replaces_the_unconditional_pass(family: str) -> None:
    """At g = 1 + w with the prompt as its own negative, perturbing the unconditional pass is guidance by w."""
    negative = {"negative_prompt": "a cat", "prompt": "a cat"}
    replaced = run(family, SoftPAG("L1", u=0.8, mode="replace_uncond"), guidance_scale=4.0, **negative)
    guided = run(family, SoftPAG("L1", u=0.8, scale=3.0), guidance_scale=1.0, **negative)
    torch.testing.assert_close(replaced, guided, atol=1e-5, rtol=0)


def test_replacing_costs_no_pass_and_needs_cfg() -> None:
    pipe, kwargs = build_pipeline("wan")
    forwards: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    with genattn.apply(pipe, SoftPAG("L1", mode="replace_uncond")) as handle:
        pipe(**{**kwargs, "output_type": "latent"})
        assert len(forwards) == 6
        assert handle.plugins[0].plan(3)["extra_passes"] == 0
    with pytest.raises(GenAttnError, match="needs an unconditional pass"):
        run("wan", SoftPAG("L1", mode="replace_uncond"), guidance_scale=1.0)


# ---- presets


def test_pag_is_all_heads_at_full_weight() -> None:
    heads = {(1, h): 1.0 for h in range(4)}
    assert difference(run("sd3", SoftPAG.pag("L1")), run("sd3", SoftPAG(heads))) == 0


def test_image_to_image_is_the_pag_of_diffusers() -> None:
    from diffusers import StableDiffusion3PAGPipeline

    pipe, kwargs = build_pipeline("sd3")
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    stock = StableDiffusion3PAGPipeline(**parts, pag_applied_layers="transformer_blocks.2")
    stock.set_progress_bar_config(disable=True)
    for guidance_scale in (1.0, 5.0):
        kwargs |= {"output_type": "latent", "guidance_scale": guidance_scale}
        with torch.no_grad():
            expected = stock(**kwargs, pag_scale=2.0, generator=torch.Generator().manual_seed(0))[0]
        found = run("sd3", SoftPAG.pag("L2", scale=2.0, target="image_to_image"), guidance_scale=guidance_scale)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


class WithoutBlock(nn.Module):
    """A model's answer with one block left out."""

    def __init__(self, model: nn.Module, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index

    def forward(self, **inputs: Any) -> torch.Tensor:
        blocks = self.model.transformer_blocks if hasattr(self.model, "transformer_blocks") else self.model.blocks
        stock = blocks[self.index].forward

        def skip(hidden_states: torch.Tensor, encoder_hidden_states: Any = None, *_: Any, **__: Any) -> Any:
            single = hasattr(self.model, "blocks")
            return hidden_states if single else (encoder_hidden_states, hidden_states)

        blocks[self.index].forward = skip
        try:
            return leaves(self.model(**inputs))[0]
        finally:
            blocks[self.index].forward = stock


@pytest.mark.parametrize("family", ["sd3", "wan", "flux", "qwen-image"])
def test_stg_leaves_out_whole_blocks(family: str) -> None:
    model, inputs = build_model(family), build_inputs(family)
    with torch.no_grad():
        clean, skipped = leaves(model(**inputs))[0], WithoutBlock(model, 1)(**inputs)
        with genattn.apply(model, SoftPAG.stg("L1", scale=2.0, layout="single")) as handle:
            found = leaves(model(**inputs))[0]
            assert handle.plugins[0].describe()["models"][type(model).__name__]["hits"] == {"L1": 1}
        torch.testing.assert_close(found, clean + 2.0 * (clean - skipped), atol=2e-6, rtol=0)
        with genattn.apply(model, SoftPAG("L1", u=0.0, scale=2.0, target="skip", layout="single")):
            torch.testing.assert_close(leaves(model(**inputs))[0], clean, atol=2e-6, rtol=0)


@pytest.mark.parametrize("preset", [SoftPAG.seg, SoftPAG.stg, SoftPAG.pag])
def test_presets_run(preset: Any) -> None:
    assert difference(run("flux", preset("L1", layout="auto")), run("flux")) > 1e-3


# ---- roles and trees


def role(kwargs: dict[str, Any], pass_name: str | None = None, pipe: Any = None, layout: str = "auto") -> Any:
    return PassReader(layout).role(Run(step=0, timestep=1.0, pass_name=pass_name), (), kwargs, pipe)


def test_reads_the_conditional_rows() -> None:
    half, text = torch.randn(2, 4, 6, 6), torch.randn(4, 5, 8)
    joined = {"hidden_states": torch.cat([half, half]), "encoder_hidden_states": text}
    assert role(joined, "cond_uncond").rows.tolist() == [2, 3]
    assert role(joined, "cond_uncond").others.tolist() == [0, 1]
    assert role(joined, "cond").rows.tolist() == [0, 1, 2, 3]
    assert role(joined, layout="cond_uncond").rows.tolist() == [0, 1]
    assert role({**joined, "hidden_states": torch.randn(4, 4, 6, 6)}).rows.tolist() == [0, 1, 2, 3]
    # one seed and one prompt twice is no guidance
    assert role({"hidden_states": half[[0, 0]], "encoder_hidden_states": text[[0, 0]]}).rows.tolist() == [0, 1]


def test_reads_later_passes_of_a_step() -> None:
    reader, latents = PassReader(), torch.randn(1, 4, 6, 6)
    one = {"hidden_states": latents, "encoder_hidden_states": torch.randn(1, 5, 8)}
    two = {"hidden_states": latents, "encoder_hidden_states": torch.randn(1, 5, 8)}
    at = lambda step, name=None: Run(step=step, timestep=1.0 - step / 10, pass_name=name)  # noqa: E731
    assert [reader.role(at(0), (), kw).kind for kw in (one, two)] == ["cond", "uncond"]
    assert reader.role(at(1), (), {**one, "hidden_states": latents + 1}).kind == "cond"
    # other latents at the same time are another chunk, not another pass
    assert reader.role(at(1), (), {**two, "hidden_states": latents + 2}).kind == "cond"
    assert reader.role(at(2, "cond"), (), one).kind == "cond"
    assert reader.role(at(2, "uncond"), (), two).kind == "uncond"
    assert reader.role(at(2, "uncond_modality"), (), one).kind == "other"


@pytest.mark.parametrize(
    ("kwargs", "name", "layout", "message"),
    [
        (
            {"hidden_states": torch.zeros(2, 4, 6, 6), "encoder_hidden_states": torch.randn(2, 5, 8)},
            None,
            "auto",
            "may be CFG or",
        ),
        ({"hidden_states": torch.zeros(3, 4, 6, 6), "encoder_hidden_states": torch.randn(3, 5, 8)}, None, "auto", "three-way"),
        ({"hidden_states": torch.zeros(3, 4, 6, 6)}, None, "uncond_cond", "must be even, got 3"),
        ({"hidden_states": torch.zeros(1, 4, 6, 6)}, "uncond", "auto", "must come before"),
        ({"noise": torch.zeros(1, 4, 6, 6)}, None, "auto", "must get its latents as hidden_states"),
    ],
)
def test_refuses_what_is_ambiguous(kwargs: dict, name: str | None, layout: str, message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        role(kwargs, name, layout=layout)


def test_refuses_a_named_batch_that_repeats_nothing() -> None:
    class Guided:
        @property
        def do_classifier_free_guidance(self) -> bool:
            return True

    with pytest.raises(GenAttnError, match="must repeat its latents, got 2 different samples"):
        role({"hidden_states": torch.randn(2, 4, 6, 6)}, "cond_uncond", Guided())
    # three-way guidance of two samples with one seed: six equal latents are no [uncond, cond] of three
    six = {"hidden_states": torch.ones(6, 4, 6, 6), "encoder_hidden_states": torch.randn(6, 5, 8)}
    with pytest.raises(GenAttnError, match="three-way guidance in one batch"):
        PassReader().role(Run(step=0, timestep=1.0, samples=2), (), six, Guided())
    reader = PassReader()
    first = reader.role(Run(step=0), (), {"hidden_states": torch.randn(2, 4)})
    with pytest.raises(GenAttnError, match="a whole number of times, got 2 samples after 3"):
        first.spread(torch.zeros(3, 4))


def test_trees_keep_their_form() -> None:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    one, two = torch.randn(2, 3), torch.randn(2, 3)
    for tree in ((one,), Transformer2DModelOutput(sample=one), {"sample": one, "n": 3}, (one, two), ([one[0], one[1]],)):
        doubled = map_leaves(lambda t: 2 * t, tree)
        assert type(doubled) is type(tree)
        assert all(torch.equal(2 * a, b) for a, b in zip(leaves(tree), leaves(doubled), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(leaves(with_leaves(doubled, leaves(tree))), leaves(tree), strict=True))
    args, kwargs = take_call(
        (one,),
        {
            "texts": [torch.zeros(3), torch.ones(4)],
            "img_ids": torch.zeros(2, 3),
            "pair": (one, two),
            "encoder_hidden_states": torch.arange(6)[:, None],
            "scale": 2.0,
            "nested": {"size": [[1], [2]]},
        },
        torch.tensor([1, 1]),
        2,
    )
    assert torch.equal(args[0], one[[1, 1]])
    assert [len(t) for t in kwargs["texts"]] == [4, 4]
    assert torch.equal(kwargs["pair"][1], two[[1, 1]])
    assert len(kwargs["img_ids"]) == 2
    assert kwargs["encoder_hidden_states"].flatten().tolist() == [3, 4, 5, 3, 4, 5]
    assert kwargs["nested"] == {"size": [[2], [2]]}
    assert kwargs["scale"] == 2.0
