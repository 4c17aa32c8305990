"""TAG: the formula, the published step on a whole pipeline, every family, and what it may not touch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.passes.prediction import leaves
from genattn.guidance.tag import TAG
from genattn.guidance.tag.tangential import amplified, amplify, amplify_reference
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline, families

# diffusers' own models import a class of theirs by its old name
OLD_NAME = "ignore:`Transformer2DModelOutput` is deprecated:FutureWarning"
pytestmark = [pytest.mark.filterwarnings(text) for text in ("ignore:In CPU autocast", "ignore:CPU Autocast", OLD_NAME)]


@given(st.integers(0, 10**6), st.floats(0.0, 2.0), st.booleans())
@settings(max_examples=50, deadline=None)
def test_equals_the_definition(seed: int, eta: float, nothing: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(3, 2, 4, 5, generator=generator, dtype=torch.float64)
    latents = torch.zeros_like(prediction) if nothing else torch.randn(3, 2, 4, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(amplify(prediction, latents, eta), amplify_reference(prediction, latents, eta))
    radial = (prediction * latents).flatten(1).sum(1)
    kept = (amplify(prediction, latents, eta) * latents).flatten(1).sum(1)
    torch.testing.assert_close(kept, radial)


@pytest.mark.parametrize(("family", "guidance_scale"), [("sd3", 1.0), ("sd3", 5.0), ("wan", 6.0), ("unet", 7.5), ("flux", 3.5)])
def test_equals_the_published_step(family: str, guidance_scale: float) -> None:
    """The update of every step, split at the latents, its tangential part amplified: as in algorithm 1 of the paper."""
    pipe, call = build_pipeline(family)
    call = {**call, "guidance_scale": guidance_scale, "output_type": "latent"}
    eta, stock = 1.3, pipe.scheduler.step

    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        moved = stock(model_output, timestep, sample, *args, **kwargs)[0]
        update, x = (moved - sample).double(), sample.double()
        dims = tuple(range(1, x.ndim))
        unit = x / torch.linalg.vector_norm(x, dim=dims, keepdim=True)
        radial = (update * unit).sum(dims, keepdim=True) * unit
        return ((x + radial + eta * (update - radial)).to(sample.dtype),)

    pipe.scheduler.step = step
    expected = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    del pipe.scheduler.step
    plain = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    with genattn.apply(pipe, TAG(eta)) as handle:
        found = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
        assert handle.report().plugins[0]["amplified_forwards"] >= call["num_inference_steps"]
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 1e-2
    assert torch.equal(pipe(**call, generator=torch.Generator().manual_seed(0))[0], plain)


def test_reference_images_are_no_part_of_the_sample() -> None:
    """FLUX Kontext answers for its reference too, and steps with the image's part."""
    from diffusers import FluxKontextPipeline

    pipe: Any = FluxKontextPipeline(**build_pipeline("flux")[0].components)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(9))
    sizes = {"max_area": 16 * 24, "_auto_resize": False, "max_sequence_length": 16, "num_inference_steps": 2}
    call = {"prompt": "a cat", "image": picture, "guidance_scale": 3.5, "output_type": "latent", **sizes}
    stock = pipe.scheduler.step

    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return stock(amplify_reference(model_output, sample, 1.5).to(sample.dtype), timestep, sample, *args, **kwargs)

    pipe.scheduler.step = step
    expected = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    del pipe.scheduler.step
    with genattn.apply(pipe, TAG(1.5)):
        found = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # stock AnyFlow's own
@pytest.mark.parametrize("family", families())
def test_every_family(family: str) -> None:
    model, inputs = build_model(family), build_inputs(family)
    with torch.no_grad():
        stock = leaves(model(**inputs))
        with genattn.apply(model, TAG(1.0)):
            assert all(torch.equal(a, b) for a, b in zip(leaves(model(**inputs)), stock, strict=True))
        latents = next((inputs[name] for name in ("hidden_states", "sample", "x") if name in inputs), None)
        bases = [latents, inputs.get("audio_hidden_states")][: len(stock)]
        given = [GIVEN.get(family), GIVEN_SOUND.get(family)]
        expected = [by_hand(p, x, part) for p, x, part in zip(stock, bases, given)]
        with genattn.apply(model, TAG(1.2)):
            if any(e is None for e in expected) or len(expected) < len(stock):
                # an answer of another shape than the input is no direction at the latents: told, not guessed
                with pytest.raises(GenAttnError, match="latents"):
                    model(**inputs)
                return
            found = leaves(model(**inputs))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double(), e, atol=1e-5, rtol=1e-4)


# tokens of references and given frames, in the tiny inputs, which the pipeline does not step with
GIVEN = {
    "ltx-condition": slice(0, 48),
    "flux-kontext": slice(96, None),
    "qwen-image-edit": slice(48, None),
    "minimax-h3": slice(0, 48),
    "minimax-h3-reference": slice(0, 56),
    "longcat-image": slice(96, None),
}
GIVEN_SOUND = {"minimax-h3-reference": slice(0, 10)}


def by_hand(p: torch.Tensor, x: Any, given: slice | None = None) -> torch.Tensor | None:
    """The definition on the leading channels, which are the last axis of packed tokens; None where the shapes do not fit."""
    if given is not None:
        kept = torch.ones(p.shape[1], dtype=torch.bool)
        kept[given] = False
        made = by_hand(p[:, kept], x[:, kept])
        return None if made is None else p.double().index_copy(1, kept.nonzero().flatten(), made)
    if (isinstance(x, list) and len({part.shape for part in x}) > 1) or x is None:
        return None
    x = torch.stack(x) if isinstance(x, list) else x
    last = x.ndim == 3
    if p.ndim != x.ndim:
        return None
    p, x = (t.movedim(-1, 1) if last else t for t in (p, x))
    count = min(p.shape[1], x.shape[1])
    if p[:, :count].shape != x[:, :count].shape:
        return None
    whole = torch.cat([amplify_reference(p[:, :count], x[:, :count], 1.2), p[:, count:].double()], 1)
    return whole.movedim(1, -1) if last else whole


def test_window_and_option() -> None:
    pipe, call = build_pipeline("sd3")
    call = {**call, "output_type": "latent"}
    with genattn.apply(pipe, TAG(1.2, start=0.5)) as handle:
        pipe(**call)
        assert handle.report().plugins[0]["amplified_forwards"] == 1
        with pytest.raises(GenAttnError, match="eta must be a finite number"):
            handle.set(tag_eta=float("nan"))
    assert TAG.from_settings(TAG(1.1, stop=0.5).settings()).settings() == {"eta": 1.1, "start": 0.0, "stop": 0.5}


@pytest.mark.parametrize("eta", [-0.1, float("inf"), float("nan"), "1", True])
def test_refuses(eta: Any) -> None:
    with pytest.raises(GenAttnError, match="eta must be a finite number >= 0"):
        TAG(eta)


def test_refuses_other_shapes() -> None:
    with pytest.raises(GenAttnError, match="TAG needs predictions of the latents' shape"):
        amplified(torch.zeros(1, 4, 8, 6), torch.zeros(1, 4, 8, 8), 1.2)
    with pytest.raises(GenAttnError, match="TAG needs predictions of the latents' shape"):
        amplified(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8, 8), 1.2)
    with pytest.raises(GenAttnError, match="TAG needs latents of one shape, got a list of several; run them one at a time"):
        amplified(torch.zeros(2, 4, 8, 8), [torch.zeros(4, 8, 8), torch.zeros(4, 8, 6)], 1.2)


def test_small_latents_have_a_direction_too_and_none_at_all_has_none() -> None:
    prediction = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    latents = torch.tensor([[0.0, 0.25], [0.0, 0.0]])
    expected = torch.tensor([[2.0, 2.0], [6.0, 8.0]], dtype=torch.float64)
    assert torch.allclose(amplify_reference(prediction, latents, 2.0), expected)
    assert torch.allclose(amplify(prediction, latents, 2.0), expected.float())


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_how_large_the_latents_are_does_not_matter(size: float) -> None:
    prediction, latents = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 4, 3, 5).double()
    wanted = amplify_reference(prediction, latents, 1.4)
    torch.testing.assert_close(amplify_reference(prediction, size * latents, 1.4), wanted)
    torch.testing.assert_close(amplified(prediction, size * latents, 1.4), wanted)
