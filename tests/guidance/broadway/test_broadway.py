"""BroadWay on whole video DiTs through the seam: against stock, against the explicit full map, and in company."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import genattn
from genattn.errors import GenAttnError
from genattn.functional.masks import key_mask
from genattn.guidance.broadway.blocks import choose_sites
from genattn.guidance.broadway.broadway import BroadWay
from genattn.guidance.broadway.enhance_a_video import EnhanceAVideo
from genattn.guidance.broadway.frame_marginal_reference import frame_rows, full_map, reference_edit
from genattn.guidance.broadway.key_frames import KeyFrames, key_frames
from genattn.guidance.broadway.temporal_map import MapEdit
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.patterns.combine import PerHead
from genattn.patterns.dense import DensePattern
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.plugin import AttentionCall, Inner, Plugin

VIDEO = ("wan", "skyreels", "hunyuan-video", "cogvideox", "ltx")
MORE = ("wan-vace", "hunyuan-video-1.5", "framepack", "mochi", "cogvideox-1.5", "ltx-condition", "ltx2", "cosmos", "latte")


class ExplicitBroadWay(Plugin):
    """The same on explicit float64 maps: softmax over everything, marginal, edit, everything again."""

    def __init__(self, edit: MapEdit, conditional: slice = slice(None), keep_first: bool = False, pattern: Any = None) -> None:
        self.edit, self.conditional, self.keep_first, self.pattern = edit, conditional, keep_first, pattern
        self.maps: dict[str, torch.Tensor] = {}

    def attach(self, model: Any, sites: Any) -> None:
        self.guided = choose_sites(sites)

    def wants(self, site: Any) -> bool:
        return site.name in self.guided.anchor_of

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        frames = key_frames(call.layout, self.keep_first)
        visible = None
        if call.mask is not None:
            keys, reason = key_mask(call.mask, call.query.shape[0], call.query.shape[1], call.key.shape[1])
            assert not reason
            visible = None if keys is None else keys[:, None, None, :]
        if self.pattern is not None:
            seen = self.pattern.mask(call.layout)
            visible = seen if visible is None else visible & seen
        source = self.guided.anchor_of[call.site.name]
        if source == call.site.name:
            self.maps[source] = frame_rows(full_map(call.query, call.key, call.scale, visible), frames)[0]
        anchor = None if source == call.site.name else self.maps[source]
        # samples stand alone; the two halves of one guided sample share what its conditional half decides
        every = slice(None)
        places = [slice(i, i + 1) for i in range(len(call.query))] if self.conditional == every else [every]
        out = torch.cat([self._sample(call, frames, place, anchor, visible) for place in places])
        # rows outside of the grid hold no frame; padding among them may see nothing at all
        stock = inner(call)
        return stock.index_copy(1, frames.queries, out.to(stock.dtype)[:, frames.queries])

    def _sample(self, call: AttentionCall, frames: KeyFrames, one: slice, anchor: Any, visible: Any) -> torch.Tensor:
        """Part of the batch by itself: the floor on its energy is its own."""
        tensors = (x[one] for x in (call.query, call.key, call.value))
        seen = visible[one] if visible is not None and visible.ndim == 4 and len(visible) > 1 else visible
        base = None if anchor is None else anchor[one]
        out, _ = reference_edit(
            *tensors, frames, self.edit, anchor=base, conditional=self.conditional, scale=call.scale, visible=seen
        )
        return out


def sample(tree: Any) -> torch.Tensor:
    return tree[0] if isinstance(tree, tuple) else tree.sample


@torch.no_grad()
def run_model(model: Any, family: str) -> torch.Tensor:
    return sample(model(**build_inputs(family)))


@torch.no_grad()
def run_pipe(pipe: Any, kwargs: dict[str, Any], **more: Any) -> torch.Tensor:
    result = pipe(**{**kwargs, "output_type": "latent", **more}, generator=torch.Generator().manual_seed(0))
    return result[0] if isinstance(result, tuple) else result.frames


@contextmanager
def refused(target: Any, *plugins: Any, words: str, num_steps: int | None = 2, **settings: Any) -> Iterator[None]:
    """A forward inside raises GenAttnError."""
    handle = genattn.apply(target, *plugins, **settings)
    if num_steps is not None:
        handle.set(num_steps=num_steps)
    with handle, torch.no_grad(), pytest.raises(GenAttnError, match=words):
        yield


@pytest.mark.filterwarnings("ignore:.*autocast")  # Mochi's forward asks for one that the CPU does not have
@pytest.mark.parametrize("family", [*VIDEO, *MORE])
def test_nothing_edited_is_stock(family: str) -> None:
    model = build_model(family)
    stock = run_model(model, family)
    plugin = BroadWay(0.0, 1.0, stop=1.0)
    with genattn.apply(model, plugin).set(num_steps=4):
        torch.testing.assert_close(run_model(model, family), stock, atol=1e-5, rtol=1e-5)
    rows = plugin.report.rows()
    assert rows
    assert all(r["beta"] == pytest.approx(1.0, abs=1e-5) and r["e3"] == pytest.approx(r["e1"], rel=1e-5) for r in rows)
    assert torch.equal(run_model(model, family), stock)


@pytest.mark.parametrize("family", VIDEO)
@pytest.mark.parametrize("edit", [MapEdit(), MapEdit(0.4, energy=0.2), MapEdit("auto", "auto")])
@pytest.mark.parametrize("keep_first", [False, True])
def test_equals_the_explicit_full_map(family: str, edit: MapEdit, keep_first: bool) -> None:
    model = build_model(family)
    stock = run_model(model, family)
    plugin = BroadWay(edit.alpha, edit.beta, energy=edit.energy, stop=1.0, conditional="all", keep_first_frame=keep_first)
    with genattn.apply(model, plugin).set(num_steps=4):
        got = run_model(model, family)
    with genattn.apply(model, ExplicitBroadWay(edit, keep_first=keep_first)):
        want = run_model(model, family)
    effect = float((want - stock).abs().max())
    assert effect > 1e-4
    assert float((got - want).abs().max()) < 2e-3 * effect + 1e-5
    assert all(r["e3"] >= r["e1"] * (1 - 1e-5) for r in plugin.report.rows())


def test_two_passes_share_the_conditional_beta() -> None:
    pipe, kwargs = build_pipeline("wan")
    plugin = BroadWay(0.7, "auto", stop=0.66)
    with genattn.apply(pipe, plugin):
        run_pipe(pipe, kwargs)
    rows = plugin.report.rows()
    assert {r["pass_name"] for r in rows} == {"cond", "uncond"}
    assert {r["step"] for r in rows} == {0, 1}
    beta = {(r["site"], r["step"], r["pass_name"]): r["beta"] for r in rows}
    for (site, step, name), value in beta.items():
        assert value == beta[site, step, "cond"], (site, step, name)
    assert len({r["beta"] for r in rows if r["pass_name"] == "cond"}) > 1


def test_pipeline_window_and_exact_removal() -> None:
    pipe, kwargs = build_pipeline("wan")
    stock = run_pipe(pipe, kwargs)
    plugin = BroadWay(stop=0.2)
    with genattn.apply(pipe, plugin) as handle:
        guided = run_pipe(pipe, kwargs)
        told = handle.report().to_dict()
        assert plugin._betas
        assert plugin._frames
    assert not plugin._betas
    assert not plugin._frames
    assert told["plugins"][0]["guided_calls"] > 0
    assert {row["step"] for row in told["plugins"][0]["measured"]} == {0}
    assert not torch.allclose(guided, stock, atol=1e-4)
    assert torch.equal(run_pipe(pipe, kwargs), stock)
    with genattn.apply(pipe, BroadWay(sigma_start=0.5, sigma_stop=0.0, stop=1.0)) as handle:
        run_pipe(pipe, kwargs)
        sigmas = [row["sigma"] for row in handle.report().to_dict()["plugins"][0]["measured"]]
    assert sigmas
    assert max(sigmas) <= 0.5


def test_options_of_one_call() -> None:
    pipe, kwargs = build_pipeline("wan")
    stock = run_pipe(pipe, kwargs)
    with genattn.apply(pipe, BroadWay(stop=1.0)):
        neutral = run_pipe(pipe, kwargs, attention_kwargs={"genattn": {"alpha": 0.0, "beta": 1.0}})
        torch.testing.assert_close(neutral, stock, atol=1e-4, rtol=1e-4)
        more = run_pipe(pipe, kwargs, attention_kwargs={"genattn": {"energy": "+50%"}})
        assert not torch.allclose(more, stock, atol=1e-4)
        with pytest.raises(GenAttnError, match="alpha must be in"):
            run_pipe(pipe, kwargs, attention_kwargs={"genattn": {"alpha": 2.0}})
        off = run_pipe(pipe, kwargs, attention_kwargs={"genattn": {"enabled": False}})
        assert torch.equal(off, stock)


@pytest.mark.parametrize("pool", [1, 2, 99])
def test_pooled_keeps_stock_and_steers(pool: int) -> None:
    pipe, kwargs = build_pipeline("wan")
    stock = run_pipe(pipe, kwargs)
    with genattn.apply(pipe, BroadWay(0.0, 1.0, stop=1.0, method="pooled", pool=pool)):
        assert torch.equal(run_pipe(pipe, kwargs), stock)
    with genattn.apply(pipe, BroadWay(stop=1.0, method="pooled", pool=pool)):
        pooled = run_pipe(pipe, kwargs)
    assert not torch.allclose(pooled, stock, atol=1e-4)
    with genattn.apply(pipe, BroadWay(stop=1.0)):
        exact = run_pipe(pipe, kwargs)
    if pool == 1:
        torch.testing.assert_close(pooled, exact, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("anchor", ["first", "mean", "blocks.0", 0])
def test_anchors(anchor: str | int) -> None:
    model = build_model("wan")
    plugin = BroadWay(anchor=anchor, blocks=["1-2"], stop=1.0)
    with genattn.apply(model, plugin).set(num_steps=2):
        assert bool(torch.isfinite(run_model(model, "wan")).all())
    pulled = [r["block"] for r in plugin.report.rows() if r["disparity"] > 0]
    assert pulled == (["blocks.2"] if anchor in ("first", "mean") else ["blocks.1", "blocks.2"])


def test_bfloat16_model() -> None:
    model = build_model("wan").bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in build_inputs("wan").items()}
    plugin = BroadWay(stop=1.0)
    with torch.no_grad(), genattn.apply(model, plugin).set(num_steps=2):
        out = sample(model(**inputs))
    assert out.dtype == torch.bfloat16
    assert bool(torch.isfinite(out).all())
    assert all(r["e3"] >= r["e1"] * (1 - 1e-5) for r in plugin.report.rows())


# ---- in company


def wide_inputs() -> dict[str, Any]:
    """Enough frames for a pattern to hide some of them."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 6, 8, 8, generator=generator)
    return {**build_inputs("wan"), "hidden_states": latents}


WINDOW = NeighborhoodPattern(window_size=(3, 3, 3), tail=None)  # the definition at hand is that of a mask


@pytest.mark.parametrize("pattern", [WINDOW, PerHead((DensePattern(), WINDOW))])
def test_under_a_pattern_it_is_the_marginal_of_the_sparse_map(pattern: Pattern) -> None:
    model = build_model("wan")
    with torch.no_grad():
        plugin = BroadWay(0.4, 1.2, stop=1.0, conditional="all")
        with genattn.apply(model, plugin, pattern, dense_steps=0, dense_layers=0).set(num_steps=4) as handle:
            got = sample(model(**wide_inputs()))
            sparse = [row["sparse"] for row in handle.report().to_dict()["sites"]]
        explicit = ExplicitBroadWay(plugin.edit, pattern=pattern)
        with genattn.apply(model, explicit, pattern, dense_steps=0, dense_layers=0).set(num_steps=4):
            want = sample(model(**wide_inputs()))
        with genattn.apply(model, pattern, dense_steps=0, dense_layers=0).set(num_steps=4):
            alone = sample(model(**wide_inputs()))
    assert all(sparse)
    effect = float((want - alone).abs().max())
    assert float((got - want).abs().max()) < 2e-3 * effect + 1e-5


def test_order_does_not_matter_beside_a_pattern() -> None:
    model = build_model("wan")
    outs = []
    with torch.no_grad():
        for order in (1, -1):
            plugin = BroadWay(stop=1.0, conditional="all")
            plugins = [plugin, RadialPattern()][::order]
            with genattn.apply(model, *plugins, dense_steps=0, dense_layers=0).set(num_steps=4):
                outs.append(sample(model(**wide_inputs())))
            assert len(plugin.report) > 0
    torch.testing.assert_close(outs[0], outs[1])


@pytest.mark.parametrize("outside", [True, False])
def test_softpag_sees_the_same_guided_model(outside: bool) -> None:
    """With u = 0 its extra pass must repeat the clean one, so nothing may be added."""
    pipe, kwargs = build_pipeline("wan")
    with genattn.apply(pipe, BroadWay(0.5, 1.3, stop=1.0)):
        alone = run_pipe(pipe, kwargs)
    plugins = [SoftPAG("L2H1", u=0.0, scale=3.0), BroadWay(0.5, 1.3, stop=1.0)]
    with genattn.apply(pipe, *(plugins if outside else reversed(plugins))):
        both = run_pipe(pipe, kwargs)
    torch.testing.assert_close(both, alone, atol=2e-4, rtol=1e-3)
    plugins = [SoftPAG("L2H1", u=0.6, scale=3.0), BroadWay(0.5, 1.3, stop=1.0)]
    with genattn.apply(pipe, *(plugins if outside else reversed(plugins))):
        both = run_pipe(pipe, kwargs)
    assert bool(torch.isfinite(both).all())
    assert not torch.allclose(both, alone, atol=1e-4)


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 2.0}, "alpha must be in"),
        ({"beta": -1.0}, "beta must be in"),
        ({"tau": 20.0}, "tau must be in"),
        ({"energy": "a lot"}, "energy must be a percentage"),
        ({"start": 0.5, "stop": 0.5}, "stop must be above start"),
        ({"stop": 1.5}, "stop"),
        ({"conditional": "half"}, "conditional must be"),
        ({"conditional": (0.5, 0.5)}, "conditional must be"),
        ({"method": "fast"}, "method must be one of exact"),
        ({"pool": 0}, "pool must be an integer >= 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(GenAttnError, match=words):
        BroadWay(**settings)


def test_presets() -> None:
    preset = BroadWay.preset("videocrafter2", beta=5.0)
    assert (preset.edit.alpha, preset.edit.beta, preset.edit.tau) == (0.1, 5.0, 7.0)
    assert BroadWay.preset("animatediff").edit == MapEdit(0.6, 1.5, 7.0)
    with pytest.raises(GenAttnError, match="preset must be one of animatediff, videocrafter2"):
        BroadWay.preset("sora")


def test_models_that_cannot_be_guided_are_refused() -> None:
    model = build_model("wan")
    with pytest.raises(GenAttnError, match=r"known|among blocks\.0"):
        genattn.apply(model, BroadWay(blocks=["up_blocks.2"]))
    with refused(model, BroadWay(stop=1.0), words="2 latent frames, got 1"):
        model(**{**build_inputs("wan"), "hidden_states": torch.randn(1, 16, 1, 8, 8)})
    with refused(model, BroadWay(), words="number of steps", num_steps=None):
        model(**build_inputs("wan"))
    picture = build_model("sd3")
    with refused(picture, BroadWay(stop=1.0), words="latent frames, got 1"):
        picture(**build_inputs("sd3"))


def test_masks_that_differ_between_queries_are_refused() -> None:
    class Causal(Plugin):
        def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
            length = call.query.shape[1]
            return inner(call.with_tensors(mask=torch.ones(length, length, dtype=torch.bool).tril()[None, None]))

    model = build_model("wan")
    with refused(model, Causal(), BroadWay(stop=1.0), words="hides the same keys from all queries"):
        model(**build_inputs("wan"))


def test_maps_do_not_outlive_the_forward() -> None:
    model = build_model("wan")
    plugin = BroadWay(stop=1.0)
    with genattn.apply(model, plugin).set(num_steps=2):
        run_model(model, "wan")
        assert not plugin._forwards
        assert not plugin._last
        with genattn.apply(model, SoftPAG("L0H0", scale=1.0)).set(num_steps=2):  # its extra pass may ask for them
            run_model(model, "wan")
            assert plugin._last
        run_model(model, "wan")
        assert not plugin._last
    assert not plugin._guided


class Changed(Plugin):
    """Hands calls on with other settings, or answers those of some sites by itself."""

    def __init__(self, *skipped: str, **changes: Any) -> None:
        self.skipped, self.changes = skipped, changes

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        if call.site.name in self.skipped:
            return torch.zeros_like(call.query)
        return inner(replace(call, **self.changes))


def test_calls_that_cannot_be_guided_are_refused() -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    names = [f"blocks.{layer}.attn1" for layer in range(len(model.blocks))]
    with refused(model, Changed(is_causal=True), BroadWay(stop=1.0), words="in both directions, got a causal call at 'blocks"):
        model(**inputs)
    with refused(model, Changed(layout=None), BroadWay(stop=1.0), words="needs the token layout of 'blocks.*, got none for"):
        model(**inputs)
    with refused(model, Changed(layout=None), EnhanceAVideo(), words="Enhance-A-Video needs the token layout of 'blocks"):
        model(**inputs)
    guided = BroadWay(blocks=[1, 2], anchor=1, stop=1.0)
    with refused(model, Changed(names[1]), guided, words=f"the anchor must run before .*, got no call of '{names[1]}'"):
        model(**inputs)
