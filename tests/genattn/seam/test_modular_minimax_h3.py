"""MiniMax-H3 whole, as it comes: a Modular pipeline of its own blocks, from the prompt to video and sound."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

import genattn
from genattn import DensePattern, NeighborhoodPattern, RadialPattern
from genattn.errors import GenAttnError
from genattn.guidance.nag import NAG
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.guidance.tag import TAG
from genattn.guidance.tag.tangential import amplify_reference

pytest.importorskip("diffusers.modular_pipelines.minimax_h3", reason="this diffusers has no MiniMax-H3")
pytest.importorskip("transformers.models.qwen3_vl", reason="this transformers has no Qwen3-VL")
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")

PICTURE = Image.new("RGB", (32, 24), (200, 30, 30))
FORWARDS = 2  # its scheduler makes two steps of the three asked for


def _reference() -> Any:
    from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3ImageReference

    return MiniMaxH3ImageReference(image=PICTURE)


WORKFLOWS: dict[str, Callable[[], dict[str, Any]]] = {
    "text": dict,
    "first-frame": lambda: {"image": PICTURE},
    "both-frames": lambda: {"image": PICTURE, "last_image": PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)},
    "references": lambda: {"references": [_reference()]},
}


@pytest.fixture(scope="module")
def h3() -> tuple[Any, dict[str, Any]]:
    from genattn.pipelines.tiny.random.modular_pipes import minimax_h3

    return minimax_h3()


def sampled(pipe: Any, call: dict[str, Any], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Video and sound."""
    state = pipe(**{**call, **more}, generator=torch.Generator().manual_seed(0))
    return state.get("videos"), state.get("audio")


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_workflow_dense_sparse_and_removed(h3: Any, workflow: str) -> None:
    """Both transformers of the repository are applied to; each workflow runs its own."""
    pipe, call = h3
    call = {**call, **WORKFLOWS[workflow]()}
    stock = sampled(pipe, call)
    assert stock[0].shape == (1, 124, 3, 24, 32)
    with genattn.apply(pipe, DensePattern(), dense_steps=0, dense_layers=0):
        assert same(sampled(pipe, call), stock)
    pattern = NeighborhoodPattern((5, -1, -1))
    with genattn.apply(pipe, pattern, dense_steps=0, dense_layers=0) as handle:
        sparse = sampled(pipe, call)
        report = handle.report()
    assert report.sparse_calls > 0
    assert all(torch.isfinite(part).all() for part in sparse)
    assert not torch.allclose(sparse[0], stock[0], atol=1e-4)
    with genattn.apply(pipe, NeighborhoodPattern(-1), dense_steps=0, dense_layers=0):
        for found, expected in zip(sampled(pipe, call), stock, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert same(sampled(pipe, call), stock)


def test_the_pattern_is_on_the_video_alone(h3: Any) -> None:
    """444 of 870 tokens are video, so a quarter of the scores can be left out: text and sound see all."""
    pipe, call = h3
    with genattn.apply(pipe, NeighborhoodPattern((5, -1, -1)), dense_steps=0, dense_layers=0) as handle:
        sampled(pipe, call)
        rows = [row for row in handle.report().sites if row["sparse"]]
    assert len(rows) == 3
    assert all(0.73 < row["density"] < 0.9 for row in rows), [row["density"] for row in rows]
    with genattn.apply(pipe, RadialPattern()) as handle:
        sampled(pipe, call, num_inference_steps=4)
        report = handle.report()
    assert report.runs == 1
    assert report.dense_reasons.keys() >= {"first dense steps (dense_steps=0.25)", "dense layer (dense_layers=1)"}


def test_options_reach_it_by_attention_kwargs(h3: Any) -> None:
    pipe, call = h3
    stock = sampled(pipe, call)
    with genattn.apply(pipe, NeighborhoodPattern((5, -1, -1)), dense_steps=0, dense_layers=0):
        assert same(sampled(pipe, call, attention_kwargs={"genattn": {"enabled": False}}), stock)


def test_softpag(h3: Any) -> None:
    pipe, call = h3
    stock = sampled(pipe, call)
    with genattn.apply(pipe, SoftPAG("L1H1", scale=2.0)) as handle:
        guided = sampled(pipe, call)
        assert handle.plugins[0].counts["extra_passes"] == FORWARDS
    assert not torch.allclose(guided[0], stock[0], atol=1e-4)
    assert not torch.allclose(guided[1], stock[1], atol=1e-5)  # the sound is guided as well
    with genattn.apply(pipe, SoftPAG("L1H1", scale=0.0)):
        assert same(sampled(pipe, call), stock)
    assert same(sampled(pipe, call), stock)


@pytest.mark.parametrize("negative", ["a dog", "a dog that sleeps all day long"])
def test_nag_encodes_by_the_pipelines_own_text_step(h3: Any, negative: str) -> None:
    pipe, call = h3
    stock = sampled(pipe, call)
    with genattn.apply(pipe, NAG(negative, scale=4.0, alpha=0.6, tau=1.3)) as handle:
        guided = sampled(pipe, call)
        counts = handle.report().plugins[0]["counts"]
    assert counts["guided_forwards"] == FORWARDS
    assert counts["encoded"] == 1
    assert not torch.allclose(guided[0], stock[0], atol=1e-4)
    with genattn.apply(pipe, NAG(negative, scale=1.0)):
        assert same(sampled(pipe, call), stock)
    assert same(sampled(pipe, call), stock)


def test_nag_beside_a_pattern_that_lets_all_through(h3: Any) -> None:
    pipe, call = h3
    strong = {"scale": 4.0, "alpha": 0.6, "tau": 1.3}
    with genattn.apply(pipe, NAG("a dog", **strong)):
        expected = sampled(pipe, call)
    with genattn.apply(pipe, NeighborhoodPattern(-1), NAG("a dog", **strong), dense_steps=0, dense_layers=0):
        for found, value in zip(sampled(pipe, call), expected, strict=True):
            torch.testing.assert_close(found, value, atol=2e-4, rtol=0)


def test_nag_refuses_two_negatives_for_its_one_prompt(h3: Any) -> None:
    pipe, call = h3
    with genattn.apply(pipe, NAG(["a dog", "a cow"])), pytest.raises(GenAttnError, match="one text or one per prompt"):
        sampled(pipe, call)


def test_tag_measures_what_is_made_and_not_the_references(h3: Any) -> None:
    """Video and sound each: what both schedulers step with is amplified, keyframes and reference sound are not looked at."""
    from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3AudioReference

    pipe, call = h3
    tone = torch.sin(torch.arange(640) * 0.5).expand(2, -1)
    call = {**call, "references": [_reference(), MiniMaxH3AudioReference(audio=tone)]}
    schedulers = pipe.scheduler, pipe.audio_scheduler
    stock = [scheduler.step for scheduler in schedulers]
    sizes: list[int] = []

    def step(prediction: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, of: Any, **kwargs: Any) -> Any:
        sizes.append(len(prediction))
        return of(amplify_reference(prediction[None], sample[None], 1.5)[0].to(sample.dtype), timestep, sample, *args, **kwargs)

    for scheduler, own in zip(schedulers, stock):
        scheduler.step = functools.partial(step, of=own)
    expected = sampled(pipe, call)
    for scheduler in schedulers:
        del scheduler.step
    seen: list[tuple[int, ...]] = []
    hook = pipe.transformer_ref.register_forward_hook(lambda _, __, out: seen.append(tuple(len(p[0]) for p in out[:2])))
    with genattn.apply(pipe, TAG(1.5)):
        found = sampled(pipe, call)
    hook.remove()
    assert sizes[0] < seen[0][0]  # there are references among the answers of both kinds
    assert sizes[1] < seen[0][1]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert not same(found, sampled(pipe, call))
