"""Enhance-A-Video: the published score, on every video family, text rows left alone."""

from typing import Any

import pytest
import torch

import genattn
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.guidance.broadway.enhance_a_video import WEIGHTS, EnhanceAVideo, enhance_score
from genattn.guidance.broadway.frame_marginal_approx import same_place_rows
from genattn.guidance.broadway.key_frames import key_frames
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.plugin import AttentionCall, Inner, Plugin

VIDEO = ("wan", "skyreels", "hunyuan-video", "cogvideox", "ltx")


def published_score(query: torch.Tensor, key: torch.Tensor, frames: int, weight: float) -> float:
    """As the authors compute it: rows (batch, place) of F tokens, off-diagonal mean, times F + w, at least 1."""
    dim = query.shape[-1]
    queries, keys = (x.unflatten(1, (frames, -1)).permute(0, 2, 3, 1, 4).reshape(-1, frames, dim) for x in (query, key))
    maps = (queries.double() * dim**-0.5 @ keys.double().transpose(1, 2)).softmax(-1)
    maps = maps * (1 - torch.eye(frames, dtype=torch.float64))
    intensity = maps.sum((-2, -1)) / (frames**2 - frames)
    return max(1.0, float(intensity.mean() * (frames + weight)))


class Spy(Plugin):
    """What went into the attention and what came out of the plugin outside."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[AttentionCall, torch.Tensor]] = {}

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        out = inner(call)
        self.calls[call.site.name] = (call, out)
        return out


@torch.no_grad()
def run(model: Any, family: str) -> torch.Tensor:
    out = model(**build_inputs(family))
    return out[0] if isinstance(out, tuple) else out.sample


@pytest.mark.parametrize("weight", [-3.0, 0.0, 4.0, 40.0])
@pytest.mark.parametrize("frames", [2, 5, 8])
def test_score_is_the_published_one(weight: float, frames: int) -> None:
    layout = TokenLayout.from_grid((frames, 2, 3))
    query, key = torch.randn(2, layout.seqlen, 3, 8), torch.randn(2, layout.seqlen, 3, 8)
    rows = same_place_rows(query, key, key_frames(layout))
    alone = [published_score(query[i : i + 1], key[i : i + 1], frames, weight) for i in range(2)]
    assert enhance_score(rows, weight).tolist() == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("family", VIDEO)
def test_multiplies_video_rows_by_the_score(family: str) -> None:
    model = build_model(family)
    stock = run(model, family)
    outside, inside = Spy(), Spy()
    plugin = EnhanceAVideo(40.0)
    with genattn.apply(model, outside, plugin, inside) as handle:
        enhanced = run(model, family)
        told = handle.report().to_dict()
    assert not torch.allclose(enhanced, stock, atol=1e-5)
    sites = {row["site"] for row in told["sites"] if row["kind"] in ("self", "joint")}
    assert told["plugins"][1]["guided_calls"] == dict.fromkeys(sites, 1)
    assert len(sites) == len(outside.calls) >= 2
    for name, (call, out) in outside.calls.items():
        plain = inside.calls[name][1]
        assert call.layout is not None
        frames = key_frames(call.layout)
        grid = [x.index_select(1, frames.queries) for x in (call.query, call.key)]
        # the authors' mean is over the batch of one prompt; a sample must not depend on its neighbours
        alone = [published_score(*(x[i : i + 1] for x in grid), frames.frames, 40.0) for i in range(len(grid[0]))]
        assert min(alone) > 1
        score = torch.tensor(alone)[:, None, None, None]
        torch.testing.assert_close(out[:, frames.queries], plain[:, frames.queries] * score, atol=1e-5, rtol=1e-4)
        assert torch.equal(out[:, frames.others], plain[:, frames.others])
        assert told["plugins"][1]["scores"][name] == pytest.approx(sum(alone) / len(alone), rel=1e-4)


def test_low_weight_is_stock_bit_for_bit() -> None:
    model = build_model("wan")
    stock = run(model, "wan")
    with genattn.apply(model, EnhanceAVideo(-3.0)):
        assert torch.equal(run(model, "wan"), stock)


def test_window_blocks_and_options() -> None:
    pipe, kwargs = build_pipeline("wan")
    kwargs["output_type"] = "latent"

    def sample(**more: Any) -> torch.Tensor:
        return pipe(**kwargs, **more, generator=torch.Generator().manual_seed(0)).frames

    stock = sample()
    with genattn.apply(pipe, EnhanceAVideo.preset("wan", blocks=["blocks.1"], stop=0.0, weight=30.0)) as handle:
        early = sample()
        edited = handle.report().to_dict()["plugins"][0]["guided_calls"]
        with pytest.raises(GenAttnError, match="weight must be a number"):
            sample(attention_kwargs={"genattn": {"weight": 1e9}})
        assert torch.equal(sample(attention_kwargs={"genattn": {"weight": -50.0}}), stock)
    assert edited == {"blocks.1.attn1": 2}  # the first step's two passes
    assert not torch.equal(early, stock)
    assert torch.equal(sample(), stock)


def test_presets() -> None:
    assert EnhanceAVideo.preset("cogvideox").weight == WEIGHTS["cogvideox"] == 3.4
    with pytest.raises(GenAttnError, match="preset must be one of wan, hunyuanvideo, cogvideox"):
        EnhanceAVideo.preset("sora")


@pytest.mark.parametrize("weight", ["4", True, 1e4, float("nan")])
def test_weight_is_checked(weight: Any) -> None:
    with pytest.raises(GenAttnError, match=r"weight must be a number in \[-100, 100\]"):
        EnhanceAVideo(weight)


def test_models_without_full_video_attention_are_refused() -> None:
    with pytest.raises(GenAttnError, match="needs full video attention"):
        genattn.apply(build_model("animatediff"), EnhanceAVideo())
    picture = build_model("sd3")
    handle = genattn.apply(picture, EnhanceAVideo())
    with torch.no_grad(), pytest.raises(GenAttnError, match="latent frames, got 1"):
        picture(**build_inputs("sd3"))
    handle.remove()
