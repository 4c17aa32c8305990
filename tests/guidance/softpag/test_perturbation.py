"""Every target by interpolated outputs equals its explicit map in float64, and no S x S tensor is made on the way."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.guidance.softpag.perturbation import TARGETS, HeadMix, image_rows, key_mask, perturb_heads
from genattn.guidance.softpag.perturbation_maps import perturbed_attention
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.guidance.softpag.tap import _spread
from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import AttentionCall, Run

ATTENTION_TARGETS = [target for target in TARGETS if target != "skip"]


def make_call(
    text: int = 5,
    heads: int = 4,
    kv_heads: int = 4,
    mask: str = "none",
    batch: int = 2,
    kind: str = "joint",
    scale: float | None = None,
) -> AttentionCall:
    layout = TokenLayout.from_grid((3, 4), text_after=text)
    size = layout.seqlen
    shapes = [(batch, size, n, 8) for n in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape) for shape in shapes)
    valid = torch.ones(batch, size, dtype=torch.bool)
    valid[0, size - 2 :] = False
    masks = {
        "none": None,
        "key": valid,
        "broadcast": valid[:, None, None, :],
        "outer": valid[:, None, None, :] & valid[:, None, :, None],
        "additive": torch.zeros(batch, 1, 1, size).masked_fill(~valid[:, None, None, :], -1e4),
    }
    site = AttentionSite("blocks.0.attn", "blocks", 0, 0, kind, heads)
    return AttentionCall(query, key, value, masks[mask], scale, False, kv_heads != heads, site, Run(), layout)


def dense(call: AttentionCall) -> torch.Tensor:
    mask = call.mask[:, None, None, :] if call.mask is not None and call.mask.ndim == 2 else call.mask
    q, k, v = (t.transpose(1, 2) for t in (call.query, call.key, call.value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale, enable_gqa=call.enable_gqa)
    return out.transpose(1, 2)


def mix_of(u: torch.Tensor) -> HeadMix:
    return HeadMix.from_rows(u if u.ndim == 2 else u[None])


@pytest.mark.parametrize("target", ATTENTION_TARGETS)
@pytest.mark.parametrize("mask", ["none", "key", "broadcast", "outer", "additive"])
def test_equals_the_explicit_map(target: str, mask: str) -> None:
    call = make_call(mask=mask)
    u = torch.tensor([0.0, 0.3, 1.0, 0.0])
    found = perturb_heads(call, dense(call), mix_of(u), target)
    expected = perturbed_attention(call, u, target)
    # a padding query of an outer-product mask sees nothing, and nobody sees it
    rows = torch.ones(found.shape[:2], dtype=torch.bool) if mask != "outer" else call.mask[:, 0].any(-1)
    torch.testing.assert_close(found[rows], expected[rows].float(), atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    target=st.sampled_from(ATTENTION_TARGETS),
    text=st.integers(0, 4),
    kv_heads=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, 0.7]),
    per_row=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_explicit_map_for_any_call(
    target: str, text: int, kv_heads: int, scale: float | None, per_row: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    call = make_call(text=text, kv_heads=kv_heads, scale=scale)
    u = torch.rand(2, 4) * torch.tensor([0.0, 1.0, 1.0, 1.0])
    u = u if per_row else u[0]
    found = perturb_heads(call, dense(call), mix_of(u), target)
    torch.testing.assert_close(found, perturbed_attention(call, u, target).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ATTENTION_TARGETS)
def test_other_heads_keep_their_bits(target: str) -> None:
    call = make_call()
    plain = dense(call)
    found = perturb_heads(call, plain.clone(), mix_of(torch.tensor([0.0, 0.5, 0.0, 0.0])), target)
    others = [0, 2, 3]
    assert torch.equal(found[:, :, others], plain[:, :, others])
    assert not torch.equal(found[:, :, 1], plain[:, :, 1])


def test_full_weight_is_the_value_itself() -> None:
    call = make_call()
    found = perturb_heads(call, dense(call), mix_of(torch.tensor([0.0, 0.0, 1.0, 0.0])), "identity")
    assert torch.equal(found[:, :, 2], call.value[:, :, 2])


def test_gradients_reach_the_inputs() -> None:
    call = make_call()
    query, value = call.query.requires_grad_(), call.value.requires_grad_()
    perturb_heads(call, dense(call), mix_of(torch.tensor([0.0, 0.5, 0.0, 0.0])), "identity").square().sum().backward()
    assert query.grad is not None
    assert value.grad is not None


@pytest.mark.parametrize("target", ATTENTION_TARGETS)
def test_never_an_s_by_s_tensor(target: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    size, heads = 1536, 2
    layout = TokenLayout.from_grid((size - 16,), text_after=16)
    tensors = [torch.randn(1, size, heads, 4) for _ in range(3)]
    site = AttentionSite("a", "b", 0, 0, "joint", heads)
    call = AttentionCall(*tensors, None, None, False, False, site, Run(), layout)
    out = torch.randn(1, size, heads, 4)
    with Largest() as largest:
        perturb_heads(call, out, mix_of(torch.tensor([1.0, 0.5])), target)
    # the text columns of image rows are the widest: 17 entries a row, in chunks
    assert largest.elements <= heads * size * 17


def test_image_rows() -> None:
    assert image_rows(make_call(text=0)) is None
    assert image_rows(make_call(text=3)).tolist() == list(range(12))
    with pytest.raises(GenAttnError, match="must cover the sequence"):
        image_rows(make_call().with_tensors(layout=TokenLayout.from_grid((2, 2))))
    with pytest.raises(GenAttnError, match="got no layout for the joint sequence"):
        image_rows(make_call().with_tensors(layout=None))
    assert image_rows(make_call(kind="self").with_tensors(layout=None)) is None


def test_refusals() -> None:
    call = make_call()
    mix = mix_of(torch.tensor([0.0, 0.5, 0.0, 0.0]))
    with pytest.raises(GenAttnError, match="target must be one of"):
        perturb_heads(call, dense(call), mix, "blur")
    with pytest.raises(GenAttnError, match="must leave out whole blocks"):
        perturb_heads(call, dense(call), mix, "skip")
    with pytest.raises(GenAttnError, match="got a call of 2 for 3 samples"):
        perturb_heads(call, dense(call), mix_of(torch.rand(3, 4)), "identity")
    short = call.with_tensors(key=call.key[:, :5], value=call.value[:, :5])
    with pytest.raises(GenAttnError, match="as many keys as queries, got 5 and 17"):
        perturb_heads(short, dense(short), mix, "identity")
    with pytest.raises(GenAttnError, match="got causal"):
        key_mask(call.with_tensors(is_causal=True))
    triangle = torch.ones(17, 17, dtype=torch.bool).tril()[None, None]
    with pytest.raises(GenAttnError, match="differing rows"):
        key_mask(call.with_tensors(mask=triangle))
    with pytest.raises(GenAttnError, match="must be of one attention call"):
        perturbed_attention(call, torch.rand(4), "skip")


def test_a_selection_for_each_conditional_sample_or_one_for_all() -> None:
    rows = torch.tensor([2, 3])
    assert _spread(torch.rand(1, 4), 4, rows).shape == (4, 4)
    with pytest.raises(GenAttnError, match="per_sample must hold one selection per conditional sample, got 3 for 2"):
        _spread(torch.rand(3, 4), 4, rows)


def test_heads_of_a_model_that_it_was_not_applied_to() -> None:
    plugin = SoftPAG("L0H0")
    with pytest.raises(GenAttnError, match="SoftPAG must be applied to the denoiser first, got Module"):
        plugin.model(torch.nn.Module())
    with pytest.raises(GenAttnError, match="SoftPAG must be applied to the denoiser first, got NoneType"):
        plugin.model(None)
    site = AttentionSite("blocks.0.attn2", "blocks", 0, 0, "cross", 2)
    with pytest.raises(GenAttnError, match="head guidance needs self- or joint attention in blocks, got none in Module"):
        plugin.attach(torch.nn.Module(), [site])
