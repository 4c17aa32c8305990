"""NAG on ComfyUI's models, on stand-ins that call attention as ComfyUI's do; `test_live_nag` has the real ones."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_standins import ALWAYS, Block, Patcher, WanModel, X, optimized_attention, sdpa, sparse
from hypothesis import given, settings, strategies as st
from torch import nn

from genattn.apps.comfyui.hosts.call import RawCall
from genattn.apps.comfyui.hosts.texts import WAYS, text_stands_first, text_way_of
from genattn.apps.comfyui.model_nodes import nag as nag_node, report
from genattn.apps.comfyui.patching.nag import KEY, Nag, around_model, guided_rows, lengthened_masks, nag_model, nag_of
from genattn.apps.comfyui.patching.seam import OVERRIDE, chain_of
from genattn.apps.comfyui.patching.two_texts import TwoTexts
from genattn.errors import GenAttnError
from genattn.guidance.nag.formula import Strength, guide_reference
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.seam.sparse_plugin import SparsePlugin

STRENGTH = Strength(3.0, 1.2, 0.6)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None) -> torch.Tensor:
    """float64 attention of [B, H, S, D], one softmax."""
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    return torch.softmax(scores if mask is None else scores + mask.double(), -1) @ v.double()


def expected(plus: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    return guide_reference(plus.transpose(1, 2), minus.transpose(1, 2), STRENGTH).transpose(1, 2)


def shaped(tensor: torch.Tensor, split: bool) -> torch.Tensor:
    """[B, H, S, D] as a caller has it."""
    return tensor if split else tensor.transpose(1, 2).flatten(2)


def ask(raw: RawCall, again: bool) -> torch.Tensor:
    return raw.stock()


SIZES = {
    "own": st.integers(1, 4), "other": st.integers(1, 4), "picture": st.integers(3, 6), "split": st.booleans(),
    "split_out": st.booleans(), "masked": st.booleans(), "guided": st.lists(st.booleans(), min_size=1, max_size=3).filter(any),
}  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(**SIZES, fill=st.integers(0, 2))
def test_cross_attention_over_both_texts(
    own: int, other: int, picture: int, split: bool, split_out: bool, masked: bool, guided: list[bool], fill: int
) -> None:
    keys, batch = own + other + fill, len(guided)
    q, k, v = (torch.randn(batch, 2, n, 4) for n in (picture + 20, keys, keys))
    mask = torch.randn(batch, 1, 1, keys) if masked else None
    texts = TwoTexts(STRENGTH, torch.tensor(guided), False, own, other, keys=keys)
    named = {"mask": mask, "skip_reshape": split, "skip_output_reshape": split_out}
    out = texts.answer(RawCall(sdpa, None, shaped(q, split), shaped(k, split), shaped(v, split), 2, named), ask)
    first, second = slice(0, own), slice(own, own + other)
    plus, minus = (plain(q, k[:, :, p], v[:, :, p], None if mask is None else mask[..., p]) for p in (first, second))
    right = torch.where(torch.tensor(guided)[:, None, None, None], expected(plus, minus), plus)
    torch.testing.assert_close(out, shaped(right, split_out).float(), atol=1e-5, rtol=1e-4)
    assert texts.calls == 1


@settings(deadline=None, max_examples=60)
@given(**SIZES, text_first=st.booleans(), long=st.booleans())
def test_joint_attention_over_both_texts(
    own: int, other: int, picture: int, split: bool, split_out: bool, masked: bool, guided: list[bool], text_first: bool,
    long: bool,
) -> None:  # fmt: skip
    tokens, batch = own + other + picture, len(guided)
    q, k, v = (torch.randn(batch, 2, tokens, 4) for _ in range(3))
    order = torch.arange(tokens)
    cut = [own, other, picture] if text_first else [picture, own, other]
    parts = order.split(cut)
    (one, two, shown) = parts if text_first else (parts[1], parts[2], parts[0])
    mine, theirs = (torch.cat([t, shown] if text_first else [shown, t]) for t in (one, two))
    texts = TwoTexts(STRENGTH, torch.tensor(guided), True, own, other, picture, text_first=text_first)
    whole = torch.randn(batch, 1, 1, tokens)
    masks = (whole[..., mine], whole[..., theirs]) if masked else (None, None)
    told = None if not masked else whole if long else masks[0]
    texts.mask = None if long else masks[1]
    named = {"mask": told, "skip_reshape": split, "skip_output_reshape": split_out}
    out = texts.answer(RawCall(sdpa, None, *(shaped(t, split) for t in (q, k, v)), 2, named), ask)
    assert out is not None
    out = out if split_out else out.unflatten(2, (2, 4)).transpose(1, 2)
    plus, minus = (plain(q[:, :, o], k[:, :, o], v[:, :, o], m) for o, m in zip((mine, theirs), masks))
    in_plus, in_minus = (torch.isin(o, shown) for o in (mine, theirs))
    for row, is_guided in enumerate(guided):
        seen = plus[row : row + 1, :, in_plus]
        right = expected(seen, minus[row : row + 1, :, in_minus]) if is_guided else seen
        torch.testing.assert_close(out[row : row + 1, :, shown], right.float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out[row, :, one], plus[row, :, ~in_plus].float(), atol=1e-5, rtol=1e-4)
        if is_guided:
            torch.testing.assert_close(out[row, :, two], minus[row, :, ~in_minus].float(), atol=1e-5, rtol=1e-4)


def test_a_square_mask_is_cut_on_both_axes() -> None:
    texts = TwoTexts(STRENGTH, torch.tensor([True]), True, 1, 2, 3)
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    mask = torch.randn(1, 1, 6, 6)
    out = texts.answer(RawCall(sdpa, None, q, k, v, 2, {"mask": mask, "skip_reshape": True, "skip_output_reshape": True}), ask)
    assert out is not None
    kept = [0, 3, 4, 5]
    plus = plain(q[:, :, kept], k[:, :, kept], v[:, :, kept], mask[:, :, kept][..., kept])
    torch.testing.assert_close(out[:, :, :1], plus[:, :, :1].float(), atol=1e-5, rtol=1e-4)


def test_other_calls_pass() -> None:
    def call(queries: int, keys: int) -> RawCall:
        return RawCall(sdpa, None, torch.zeros(1, queries, 8), torch.zeros(1, keys, 8), torch.zeros(1, keys, 8), 2, {})

    cross = TwoTexts(STRENGTH, torch.tensor([True]), False, 2, 3, keys=5)
    assert cross.answer(call(9, 4), ask) is None
    assert cross.answer(call(5, 5), ask) is None, "a picture as long as both texts looks at itself"
    cross.announced = False
    assert cross.answer(call(9, 5), ask) is None, "a UNet says which call it is"
    cross.announced = True
    assert cross.answer(call(5, 5), ask) is not None
    assert cross.announced is False
    joint = TwoTexts(STRENGTH, torch.tensor([True]), True)
    assert joint.answer(call(0, 0), ask) is None, "before the first block there are no two texts"
    joint = TwoTexts(STRENGTH, torch.tensor([True]), True, 1, 2, 3)
    assert joint.answer(call(3, 3), ask) is None
    assert joint.answer(call(6, 3), ask) is None


# ---- on a MODEL


class Sampling:
    """ComfyUI's model_sampling of a flow model."""

    def percent_to_sigma(self, percent: float) -> float:
        return 1.0 - percent


class Cond:
    def __init__(self, cond: torch.Tensor) -> None:
        self.cond = cond

    def process_cond(self, batch_size: int, **rest: Any) -> "Cond":
        return Cond(self.cond.expand(batch_size, *self.cond.shape[1:]))


class Guided(Patcher):
    """A patcher whose sampler encodes prompts as ComfyUI's guider does."""

    def get_model_object(self, name: str) -> Sampling:
        assert name == "model_sampling"
        return Sampling()

    def clone(self) -> "Guided":
        other = Guided(self.model)
        plain = super().clone()
        other.text, other.model_options, other.wrappers, other.callbacks = (
            80,
            plain.model_options,
            plain.wrappers,
            plain.callbacks,
        )
        return other

    def sample(self, x: torch.Tensor, steps: int = 2, **more: Any) -> torch.Tensor:
        guider = SimpleNamespace(model_options=self.model_options, conds={})
        call: Callable[..., Any] = super().sample

        class Executor:
            class_obj = guider

            def __call__(self, *args: Any, **named: Any) -> Any:
                for text in guider.conds.get(KEY, ()):
                    text["model_conds"] = {"c_crossattn": Cond(text["cross_attn"])}
                return call(*args, **named)

        for wrapper in self.wrappers.get("outer_sample", []):
            return wrapper(Executor(), x, steps, **more)
        return call(x, steps, **more)


@pytest.fixture(autouse=True)
def core(monkeypatch: pytest.MonkeyPatch) -> None:
    helpers = ModuleType("comfy.sampler_helpers")
    helpers.convert_cond = lambda cond: [{**told, "cross_attn": text, "model_conds": {}} for text, told in cond]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.sampler_helpers", helpers)


@pytest.fixture
def wan() -> Guided:
    patcher = Guided(SimpleNamespace(diffusion_model=WanModel()))
    patcher.text = 80
    return patcher


def text(seed: int, tokens: int = 7, width: int = 32) -> list[Any]:
    return [[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), {}]]


def by_hand(model: Any, negative: torch.Tensor, strength: Strength) -> torch.Tensor:
    """The stand-in's forward with its cross-attention over two texts."""
    tokens = torch.randn(1, 96, 32, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 80, 32, generator=torch.Generator().manual_seed(1))
    for block in model.blocks:
        tokens = block.attend(tokens, {})
        query, (plus, minus) = tokens @ block.weights[0], (c @ block.weights[1] for c in (context, negative))
        told = [sdpa(query, k, k, 4).unflatten(2, (4, 8)) for k in (plus, minus)]
        tokens = tokens + guide_reference(*told, strength).flatten(2).float()
    return tokens


def test_cross_attention_is_guided_and_nothing_else(wan: Guided) -> None:
    stock = wan.sample(X)
    patched = nag_model(wan, text(3), 4.0, 2.0, 0.5)
    out = patched.sample(X)
    torch.testing.assert_close(
        out, by_hand(wan.model.diffusion_model, text(3)[0][0], Strength(4.0, 2.0, 0.5)), atol=1e-5, rtol=1e-4
    )
    assert torch.equal(wan.sample(X), stock), "the model that came in stays as it was"
    found = nag_of(patched)
    assert found is not None
    assert found.describe()["counts"] == {"forwards": 2, "guided": 2, "calls": 6}
    patched.sample(X, steps=1)
    assert found.describe()["counts"] == {"forwards": 1, "guided": 1, "calls": 3}, "a new run starts at zero"


def test_where_it_is_off_the_model_is_stock_to_the_bit(wan: Guided) -> None:
    stock = wan.sample(X)
    assert torch.equal(nag_model(wan, text(3), scale=1.0).sample(X), stock)
    assert torch.equal(nag_model(wan, text(3), start_percent=0.9).sample(X), stock)
    late = nag_model(wan, text(3), start_percent=0.4)
    late.sample(X, steps=4)
    found = nag_of(late)
    assert found is not None
    assert (found.forwards, found.guided) == (4, 2), "noise levels 1, 0.75, 0.5 and 0.25 of which two are at most 0.6"
    early = nag_model(wan, text(3), end_percent=0.4)
    early.sample(X, steps=4)
    found = nag_of(early)
    assert found is not None
    assert found.guided == 2
    assert torch.equal(nag_model(wan, text(3)).sample(X, cond_or_uncond=[1]), stock), "an unconditional pass"


def test_sparse_attention_and_other_overrides_beside_it(wan: Guided) -> None:
    from genattn.apps.comfyui.patching.seam import patch_model

    alone = nag_model(wan, text(3)).sample(X)
    full = SparsePlugin(NeighborhoodPattern(-1, tail=None), ALWAYS)
    for both in (patch_model(nag_model(wan, text(3)), full), nag_model(patch_model(wan, full), text(3))):
        torch.testing.assert_close(both.sample(X), alone, atol=1e-5, rtol=1e-4)
        assert {stat.sparse for stat in chain_of(both).tally.stats.values()} == {2}
        told = report(both, {}).text or ""
        assert "NAG (scale 9, tau 2.5, alpha 0.25): 2 of 2 forwards guided, 6 attention calls over both texts" in told
    windowed = nag_model(patch_model(wan, sparse()), text(3)).sample(X)
    assert not torch.allclose(windowed, alone)
    seen: list[int] = []
    under = wan.clone()
    under.model_options["transformer_options"][OVERRIDE] = lambda func, *a, **o: (seen.append(1), func(*a, **o))[1]
    torch.testing.assert_close(nag_model(under, text(3)).sample(X), alone)
    assert len(seen) == 2 * 3 * (1 + 2), "self-attention, and one call for each text"


def test_an_attention_that_somebody_else_answers_is_an_error(wan: Guided) -> None:
    stolen = nag_model(wan, text(3))
    stolen.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **options: func(*args, **options)
    with pytest.raises(GenAttnError, match="another node answered it: put the NAG node after"):
        stolen.sample(X)
    stock = wan.sample(X)
    skipping = nag_model(wan, text(3)).clone()
    skipped = skipping.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault("dit", {})
    skipped["double_block", 1] = lambda args, extra: {"img": args["img"]}
    assert not torch.equal(skipping.sample(X), stock), "a block that a node leaves out is no error"
    for place in range(3):
        skipped["double_block", place] = lambda args, extra: {"img": args["img"]}
    with pytest.raises(GenAttnError, match="no call of it came by"):
        skipping.sample(X)


def test_refused_before_anything_is_done(wan: Guided) -> None:
    class NextDiT(nn.Module):
        pass

    class Unknown(nn.Module):
        pass

    for model, why in ((NextDiT(), "lets no node replace its blocks"), (Unknown(), "serves Wan, LTX")):
        with pytest.raises(GenAttnError, match=why):
            nag_model(Guided(SimpleNamespace(diffusion_model=model)), text(3))
    with pytest.raises(GenAttnError, match="scale must be a finite number of at least 1"):
        nag_model(wan, text(3), scale=0.5)
    with pytest.raises(GenAttnError, match="start_percent must not be above"):
        nag_model(wan, text(3), start_percent=0.6, end_percent=0.5)
    with pytest.raises(GenAttnError, match="one text, got 2 combined"):
        nag_model(wan, [*text(3), *text(4)])
    with pytest.raises(GenAttnError, match="has NAG already"):
        nag_model(nag_model(wan, text(3)), text(4))
    with pytest.raises(GenAttnError, match="got a bare call"):
        Patcher.sample(nag_model(wan, text(3)), X)
    with pytest.raises(GenAttnError, match="carries no GenAttn node"):
        report(wan, {})


def test_one_of_the_two_nodes_is_enough_for_a_report(wan: Guided) -> None:
    from genattn.apps.comfyui.patching.seam import patch_model

    alone = nag_model(wan, text(3))
    alone.sample(X)
    assert (report(alone, {}).text or "").startswith("NAG (scale 9")
    windowed = patch_model(wan, sparse())
    windowed.sample(X)
    told = report(windowed, {}).text or ""
    assert told.startswith("6 of 6 attention calls ran sparse")
    assert "NAG" not in told


def test_the_node_takes_0_for_the_familys_own(wan: Guided) -> None:
    (patched,) = nag_node(wan, text(3), 0.0, 0.0, 0.0, 0.0, 1.0)
    found = nag_of(patched)
    assert found is not None
    assert found.strength == Strength(9.0, 2.5, 0.25)
    (patched,) = nag_node(wan, text(3), 4.0, 1.5, 0.5, 0.0, 1.0)
    found = nag_of(patched)
    assert found is not None
    assert found.strength == Strength(4.0, 1.5, 0.5)


def test_the_rows_of_a_batch() -> None:
    assert guided_rows({"cond_or_uncond": [0, 1, 0]}, 6).tolist() == [True, True, False, False, True, True]
    assert guided_rows({}, 2).tolist() == [True, True]
    assert not Nag(None, STRENGTH, 1.0, 0.0).acts({"cond_or_uncond": [1]})


def test_every_way_names_a_family_and_its_order() -> None:
    for name, way in WAYS.items():
        assert text_way_of(type(name, (nn.Module,), {})()) is way
    older = SimpleNamespace(double_blocks=[SimpleNamespace(flipped_img_txt=True)])
    assert not text_stands_first(older)
    assert text_stands_first(SimpleNamespace())


class Flux(nn.Module):
    """Text and picture in one attention, as ComfyUI's FLUX calls its blocks; text is embedded with its own mean, so that a text
    refined beside another would be another."""

    patch_size, num_heads = 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks, self.single_blocks = nn.ModuleList([Block(0), Block(1)]), nn.ModuleList([Block(2)])

    def forward(self, picture: Any, context: Any, options: dict[str, Any], mask: Any = None) -> torch.Tensor:
        text, replaced = context + context.mean(1, keepdim=True), options.get("patches_replace", {}).get("dit", {})
        steps = text.shape[1] + picture.shape[1]
        pe = torch.cat([torch.arange(text.shape[1]) / 9, torch.arange(picture.shape[1]) / 5]).reshape(1, 1, steps, 1)

        def attend(block: Block, x: torch.Tensor, args: dict[str, Any]) -> torch.Tensor:
            q, k, v = ((x @ w).reshape(*x.shape[:2], 4, -1).transpose(1, 2) for w in block.weights)
            turn = args["pe"]
            told = {"mask": args["attn_mask"], "transformer_options": args["transformer_options"]}
            return x + optimized_attention(q + turn, k * (1 + turn), v, 4, skip_reshape=True, **told)

        def double(args: dict[str, Any], block: Block) -> dict[str, Any]:
            both = attend(block, torch.cat([args["txt"], args["img"]], 1), args)
            return {"txt": both[:, : args["txt"].shape[1]], "img": both[:, args["txt"].shape[1] :]}

        more = {"pe": pe, "attn_mask": mask, "transformer_options": options}
        for i, block in enumerate(self.double_blocks):
            args = {"img": picture, "txt": text, **more}
            run: Any = lambda args, block=block: double(args, block)  # noqa: E731
            out = replaced["double_block", i](args, {"original_block": run}) if replaced else run(args)
            text, picture = out["txt"], out["img"]
        whole = torch.cat([text, picture], 1)
        for i, block in enumerate(self.single_blocks):
            run = lambda args, block=block: {"img": attend(block, args["img"], args)}  # noqa: E731
            args = {"img": whole, **more}
            whole = (replaced["single_block", i](args, {"original_block": run}) if replaced else run(args))["img"]
        return whole[:, text.shape[1] :]


def test_joint_attention_takes_the_second_text_as_the_model_would() -> None:
    flux = Guided(SimpleNamespace(diffusion_model=Flux()))
    flux.text = 5
    x = torch.zeros(1, 16, 16, 24)  # 8 x 12 = 96 tokens
    patched = nag_model(flux, text(3, 9), *vars(STRENGTH).values())
    patched.text = 5
    out = patched.sample(x)

    model = flux.model.diffusion_model
    picture = torch.randn(1, 96, 32, generator=torch.Generator().manual_seed(0))
    contexts = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1)), text(3, 9)[0][0]
    texts = [c + c.mean(1, keepdim=True) for c in contexts]
    for block in (*model.double_blocks, *model.single_blocks):
        told = []
        for words in texts:
            whole = torch.cat([words, picture], 1)
            turn = torch.cat([torch.arange(words.shape[1]) / 9, torch.arange(96) / 5]).reshape(1, 1, -1, 1)
            q, k, v = ((whole @ w).reshape(1, whole.shape[1], 4, -1).transpose(1, 2) for w in block.weights)
            told.append(sdpa(q + turn, k * (1 + turn), v, 4, skip_reshape=True))
        seen = [t[:, w.shape[1] :].unflatten(2, (4, 8)) for t, w in zip(told, texts)]
        picture = picture + guide_reference(*seen, STRENGTH).flatten(2).float()
        texts = [w + t[:, : w.shape[1]] for t, w in zip(told, texts)]
    torch.testing.assert_close(out, picture, atol=1e-4, rtol=1e-4)
    found = nag_of(patched)
    assert found is not None
    assert found.calls == 2 * 3


def test_both_texts_together_never_look_like_the_picture(wan: Guided) -> None:
    negative = text(3, 16)  # 80 + 16 tokens of text, 6 x 4 x 4 = 96 of the clip
    out = nag_model(wan, negative, 4.0, 2.0, 0.5).sample(X)
    torch.testing.assert_close(
        out, by_hand(wan.model.diffusion_model, negative[0][0], Strength(4.0, 2.0, 0.5)), atol=1e-5, rtol=1e-4
    )


class UNetModel(nn.Module):
    """One cross-attention, with ComfyUI's patches of it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.answered_by_others, self.asks_a_picture = Block(0), False, False

    def forward(self, tokens: torch.Tensor, context: torch.Tensor, options: dict[str, Any], mask: Any = None) -> torch.Tensor:
        for _ in range(2):
            context = context[:, :3] if self.asks_a_picture else context
            n, keys, values = tokens, context, context
            for patch in options.get("patches", {}).get("attn2_patch", ()):
                n, keys, values = patch(n, keys, values, options)
            q, k, v = (t @ w for t, w in zip((n, keys, values), self.block.weights))
            ask_ = sdpa if self.answered_by_others else optimized_attention
            tokens = tokens + ask_(q, k, v, heads=4, transformer_options=options)
        return tokens


def test_a_unet_is_guided_at_each_cross_attention_and_nowhere_else() -> None:
    unet = Guided(SimpleNamespace(diffusion_model=UNetModel()))
    unet.text = 80
    other: list[int] = []
    unet.model_options["transformer_options"]["patches"] = {
        "attn2_patch": [lambda n, k, v, told: (other.append(1), (n, k, v))[1]]
    }
    out, model = nag_model(unet, text(3), *vars(STRENGTH).values()).sample(X), unet.model.diffusion_model
    assert len(other) == 2 * 2, "patches of other nodes stay"
    tokens = torch.randn(1, 96, 32, generator=torch.Generator().manual_seed(0))
    contexts = torch.randn(1, 80, 32, generator=torch.Generator().manual_seed(1)), text(3)[0][0]
    wq, wk, wv = model.block.weights
    for _ in range(2):
        told = [sdpa(tokens @ wq, c @ wk, c @ wv, 4).unflatten(2, (4, 8)) for c in contexts]
        tokens = tokens + guide_reference(*told, STRENGTH).flatten(2).float()
    torch.testing.assert_close(out, tokens, atol=1e-5, rtol=1e-4)
    model.answered_by_others = True
    with pytest.raises(GenAttnError, match="IP-Adapter"):
        nag_model(unet, text(3)).sample(X)
    model.answered_by_others, model.asks_a_picture = False, True
    with pytest.raises(GenAttnError, match="1 x 80 tokens, got 1 x 3"):
        nag_model(unet, text(3)).sample(X)


def test_passes_that_cannot_be_guided_say_so(wan: Guided) -> None:
    executor, options = SimpleNamespace(class_obj=wan.model), {KEY: nag_of(nag_model(wan, text(3)))}
    with pytest.raises(GenAttnError, match="needs a positive prompt"):
        around_model(executor, X, torch.ones(1), None, None, None, options)
    with pytest.raises(GenAttnError, match="first frame by its place"):
        around_model(executor, X, torch.ones(1), None, torch.ones(1, 2, 3), None, options, guiding_frame_index=torch.ones(1))


@pytest.mark.parametrize("added", [False, True], ids=["kept and hidden", "added"])
def test_masks_cover_both_texts_where_one_has_one(added: bool) -> None:
    def mask(*kept: int) -> torch.Tensor:
        found = torch.tensor([kept])
        return (1.0 - found) * -9.0 if added else found

    way, theirs = WAYS["LTXVModel"], {"c_crossattn": torch.zeros(1, 2, 4)}
    both = lengthened_masks(way, {"attention_mask": mask(1, 0, 1)}, {**theirs, "attention_mask": mask(0, 1)}, 3)
    assert torch.equal(both["attention_mask"], mask(1, 0, 1, 0, 1))
    assert torch.equal(
        lengthened_masks(way, {"attention_mask": mask(1, 0, 1)}, theirs, 3)["attention_mask"], mask(1, 0, 1, 1, 1)
    )
    assert torch.equal(
        lengthened_masks(way, {}, {**theirs, "attention_mask": mask(0, 1)}, 3)["attention_mask"], mask(1, 1, 1, 0, 1)
    )
    assert lengthened_masks(way, {}, theirs, 3) == {}
    # one other text for all samples, and an axis between, as masks that are added have
    mine = torch.stack([mask(1, 0, 1), mask(1, 1, 0)])
    both = lengthened_masks(way, {"attention_mask": mine}, {**theirs, "attention_mask": mask(0, 1)[None]}, 3)
    assert torch.equal(both["attention_mask"], torch.stack([mask(1, 0, 1, 0, 1), mask(1, 1, 0, 0, 1)]))
