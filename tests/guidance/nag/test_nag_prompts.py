"""What a pipeline may be told of its texts: strings, lists, embeddings, several images each; NAG follows, or refuses first."""

from typing import Any

import pytest
import torch
from test_nag_pipelines import denoiser, nag, sampled, unguided

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.nag import NAG

FAMILIES = ("wan", "flux", "ltx", "sd3", "qwen-image")
PROMPTS, NEGATIVES = ["a cat", "two cats that sleep"], ["red dog", "blue sky and a good deal more"]


def embedded(family: str, pipe: Any, texts: list[str]) -> dict[str, Any]:
    """What the call takes in place of `prompt`, by the pipeline's own encode_prompt."""
    if family == "sd3":
        found = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False, max_sequence_length=16)
        return {"prompt_embeds": found[0], "pooled_prompt_embeds": found[2]}
    if family == "flux":
        found = pipe.encode_prompt(texts, None, max_sequence_length=16)
        return {"prompt_embeds": found[0], "pooled_prompt_embeds": found[1]}
    if family == "qwen-image":
        found = pipe.encode_prompt(texts, max_sequence_length=256)
        return {"prompt_embeds": found[0], "prompt_embeds_mask": found[1]}
    found = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=16)
    return {"prompt_embeds": found[0], **({"prompt_attention_mask": found[1]} if family == "ltx" else {})}


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_for_a_prompt_are_guided_as_the_prompt_is(family: str) -> None:
    pipe, call = unguided(family)
    with genattn.apply(pipe, nag(family)):
        expected = sampled(pipe, call)
    texts = {"prompt": None, **embedded(family, pipe, ["a cat"])}
    with genattn.apply(pipe, nag(family)) as handle:
        found = sampled(pipe, call, **texts)
        assert handle.report().plugins[0]["counts"]["encoded"] == 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["ltx", "qwen-image"])
def test_a_negative_per_prompt_and_several_images(family: str) -> None:
    """Each sample is guided as if it were alone, texts of other lengths beside it or not."""
    pipe, call = unguided(family)
    count = {"num_videos_per_prompt" if family == "ltx" else "num_images_per_prompt": 2}
    with genattn.apply(pipe, nag(family, NEGATIVES)):
        together = sampled(pipe, call, prompt=PROMPTS, seeds=[1, 2, 3, 4], **count)
    for index in (0, 3):
        with genattn.apply(pipe, nag(family, NEGATIVES[index // 2])):
            alone = sampled(pipe, call, prompt=PROMPTS[index // 2], seeds=[index + 1])
        torch.testing.assert_close(together[index], alone[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_negative_of_another_length(family: str) -> None:
    """A far longer text than the prompt, as one string for two prompts; scale 1 is stock to the bit."""
    pipe, call = unguided(family)
    stock = sampled(pipe, call, prompt=PROMPTS, seeds=[1, 2])
    with genattn.apply(pipe, nag(family, "a text that is a good deal longer")) as handle:
        guided = sampled(pipe, call, prompt=PROMPTS, seeds=[1, 2])
        with handle.options(nag_scale=1.0):
            assert torch.equal(sampled(pipe, call, prompt=PROMPTS, seeds=[1, 2]), stock)
    assert torch.isfinite(guided).all()
    assert (guided - stock).abs().amax(dim=tuple(range(1, stock.ndim))).min() > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_number_of_negatives_is_refused_before_anything_runs(family: str) -> None:
    pipe, call = unguided(family)
    model = denoiser(pipe)
    calls: list[str] = []
    stack = model.transformer_blocks if hasattr(model, "transformer_blocks") else model.blocks
    hook = stack[0].register_forward_pre_hook(lambda *_: calls.append("block"))
    with genattn.apply(pipe, NAG(["a", "b", "c"])), pytest.raises(GenAttnError, match="one text or one per prompt"):
        sampled(pipe, call, prompt=PROMPTS)
    hook.remove()
    assert not calls
