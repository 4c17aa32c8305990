"""What people do to models besides sampling: copy, pickle, shard, patch, share, checkpoint, train after validating."""

import copy
import functools
import gc
import io
import pickle
import weakref
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers import transformer_wan
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

import genattn
from genattn import DensePattern, GenAttnError, NeighborhoodPattern, RadialPattern, apply
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam import processors
from genattn.seam.cores import _under, is_ours
from genattn.seam.denoiser import INJECTION
from genattn.seam.plugin import AttentionCall, Inner, Plugin, Run
from genattn.seam.report import GenAttnWarning


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


class Counts(Plugin):
    """How often each call comes by."""

    def __init__(self) -> None:
        self.calls = 0

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        self.calls += 1
        return inner(call)


class Whole(Plugin):
    """Around the whole forward only."""

    def forward(self, run: Run, args: Any, kwargs: Any, inner: Any) -> Any:
        return inner(*args, **kwargs)


# ---- the class of the root


@pytest.mark.parametrize("family", ["wan", "unet", "z-image"])
def test_the_class_is_stock_while_applied(family: str) -> None:
    model = build_model(family)
    stock, before = type(model), dict(model.__dict__)
    with apply(model, DensePattern()):
        assert type(model) is stock
    assert type(model) is stock
    assert model.__dict__.keys() == before.keys()


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy", "copy"])
def test_copies_are_plain_stock(how: str) -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    stock = forward(model, inputs)
    handle = apply(model, RadialPattern(decay=0.2, floor=0), dense_steps=0, dense_layers=0)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = getattr(copy, how)(model)
    assert not {"_call_impl", "__getstate__", INJECTION} & twin.__dict__.keys()
    if how != "copy":  # a shallow copy has the same blocks
        assert not any("genattn" in name for module in twin.modules() for name in module.__dict__)
        assert torch.equal(forward(twin, inputs), stock)
    assert not torch.equal(forward(model, inputs), stock)
    handle.remove()
    assert torch.equal(forward(twin, inputs), stock)


def test_a_block_that_is_copied_alone_is_stock() -> None:
    model = build_model("wan")
    with apply(model, DensePattern()):
        twin = pickle.loads(pickle.dumps(model.blocks[0]))
    assert not any("genattn" in name or name == "__getstate__" for module in twin.modules() for name in module.__dict__)


def test_classes_may_be_assigned_and_parametrized_while_applied() -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    stock = forward(model, inputs)
    handle = apply(model, DensePattern())
    other = type("Sharded", (type(model),), {})
    model.__class__ = other
    assert torch.equal(forward(model, inputs), stock)
    register_parametrization(model.proj_out, "weight", torch.nn.Identity())
    register_parametrization(model, "scale_shift_table", torch.nn.Identity())
    assert torch.equal(forward(model, inputs), stock)
    handle.remove()
    assert torch.equal(forward(model, inputs), stock)
    assert INJECTION not in model.__dict__


@pytest.mark.parametrize(
    ("family", "name"), [("unet", "StableDiffusionImg2ImgPipeline"), ("wan", "WanPipeline"), ("flux", "FluxImg2ImgPipeline")]
)
def test_from_pipe_hands_over_the_denoiser(family: str, name: str) -> None:
    pipe, _ = build_pipeline(family)
    part = "unet" if family == "unet" else "transformer"
    with apply(pipe, DensePattern()):
        assert getattr(getattr(diffusers, name).from_pipe(pipe), part) is getattr(pipe, part)


def test_a_data_parallel_replica_calls_itself() -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    with apply(model, Whole()):
        replica = model._replicate_for_data_parallel()
        replica.forward = lambda **_: ("the replica",)
        assert replica(**inputs) == ("the replica",)


# ---- whose attention


def test_a_patched_processor_class_keeps_its_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    plain = forward(model, inputs)
    apply(model, DensePattern()).remove()  # an earlier use
    original = transformer_wan.WanAttnProcessor.__call__

    def doubled(self: Any, *args: Any, **named: Any) -> Any:
        return 2 * original(self, *args, **named)

    with apply(model, DensePattern()) as handle:
        assert torch.equal(forward(model, inputs), plain)
        monkeypatch.setattr(transformer_wan.WanAttnProcessor, "__call__", doubled)
        applied = forward(model, inputs)
        assert handle.report().calls > 0
    assert torch.equal(forward(model, inputs), applied)
    assert not torch.equal(applied, plain)
    monkeypatch.undo()
    with apply(model, DensePattern()):
        assert torch.equal(forward(model, inputs), plain)


def test_a_patch_over_ours_does_not_hide_the_next_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls what its owner kept from before, so a plugin that stood under it would see no call."""
    first, second, inputs = build_model("wan"), build_model("wan"), build_inputs("wan")
    stock = _under(transformer_wan.dispatch_attention_fn)
    earlier = apply(first, Counts())

    def patched(*args: Any, **named: Any) -> torch.Tensor:
        return 2 * stock(*args, **named)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", patched)
    twice, counts = forward(second, inputs), Counts()
    later = apply(second, counts)
    assert torch.equal(forward(second, inputs), twice)
    assert counts.calls == len([name for name in second.attn_processors if "attn1" in name])
    later.remove()
    assert torch.equal(forward(second, inputs), twice)
    earlier.remove()
    assert transformer_wan.dispatch_attention_fn is patched
    monkeypatch.undo()  # which puts ours back
    assert _under(transformer_wan.dispatch_attention_fn) is stock


def test_a_patch_that_has_gone_while_ours_stands_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = _under(transformer_wan.dispatch_attention_fn)
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", lambda *args, **named: stock(*args, **named))
    with apply(build_model("wan"), DensePattern()):
        monkeypatch.undo()
    assert _under(transformer_wan.dispatch_attention_fn) is stock


def test_a_patch_over_ours_stays_after_remove_and_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    stock = transformer_wan.dispatch_attention_fn
    handle = apply(model, DensePattern())
    ours = transformer_wan.dispatch_attention_fn

    def patched(*args: Any, **named: Any) -> torch.Tensor:
        return 2 * ours(*args, **named)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", patched)
    handle.remove()
    assert transformer_wan.dispatch_attention_fn is patched
    twice = forward(model, inputs)
    counts = Counts()
    with apply(model, counts):
        assert torch.equal(forward(model, inputs), twice)
    assert counts.calls == len([name for name in model.attn_processors if "attn1" in name])
    monkeypatch.undo()  # which puts ours back
    with apply(model, DensePattern()):
        forward(model, inputs)
    assert transformer_wan.dispatch_attention_fn is stock


def test_a_patch_of_the_functional_module_through_a_processors_module() -> None:
    from diffusers.models import attention_processor

    model, inputs = build_model("sd3"), build_inputs("sd3")
    plain, builtin = forward(model, inputs), F.scaled_dot_product_attention
    with apply(model, DensePattern()):
        inner = attention_processor.F.scaled_dot_product_attention
        attention_processor.F.scaled_dot_product_attention = lambda *a, **k: 2 * inner(*a, **k)
        try:
            applied = forward(model, inputs)
        finally:
            patched, F.scaled_dot_product_attention = F.scaled_dot_product_attention, builtin
    assert attention_processor.F is F
    F.scaled_dot_product_attention = patched
    try:
        assert torch.equal(forward(model, inputs), applied)
    finally:
        F.scaled_dot_product_attention = builtin
    assert not torch.equal(applied, plain)


def attend(
    attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None, temb: Any = None
) -> Any:
    batch, heads = hidden_states.shape[0], attn.heads
    q, k, v = (
        x.view(batch, -1, heads, x.shape[-1] // heads).transpose(1, 2)
        for x in (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
    )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return attn.to_out[1](attn.to_out[0](out))


class Slotted:
    """A processor whose instances have no dict."""

    __slots__ = ()

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None) -> Any:
        return attend(attn, hidden_states)


@pytest.mark.parametrize("processor", [attend, functools.partial(attend, temb=None), Slotted(), Slotted().__call__])
def test_any_callable_may_be_a_processor(processor: Any) -> None:
    model, inputs = build_model("unet"), build_inputs("unet")
    site = model.mid_block.attentions[0].transformer_blocks[0].attn1
    site.processor = processor
    stock = forward(model, inputs)
    counts = Counts()
    with apply(model, counts, DensePattern()) as handle:
        assert torch.equal(forward(model, inputs), stock)
        rows = {row["site"]: row["calls"] for row in handle.report().sites}
        assert rows["mid_block.attentions.0.transformer_blocks.0.attn1"] == 1
        assert pickle.loads(pickle.dumps(site)).processor.__class__ is processor.__class__
    assert site.processor is processor
    assert torch.equal(forward(model, inputs), stock)


def test_a_refused_apply_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = build_pipeline("wan-experts")
    before = [dict(model.__dict__) for model in (pipe.transformer, pipe.transformer_2)]
    from genattn.seam import injection

    wanted = pipe.transformer_2.blocks[0].attn1.processor
    acquire = injection.acquire_processor

    def refuse(processor: Any) -> Any:
        if processor is wanted:
            raise RuntimeError("on purpose")
        return acquire(processor)

    monkeypatch.setattr(injection, "acquire_processor", refuse)
    with pytest.raises(RuntimeError, match="on purpose"):
        apply(pipe, RadialPattern())
    assert [model.__dict__ for model in (pipe.transformer, pipe.transformer_2)] == before
    assert "_genattn_stock" not in type(pipe.transformer.blocks[0].attn1.processor).__dict__


# ---- what holds memory


class Big:
    """Stands for a model that a user's code holds."""


def holds_by_class(big: Big, monkeypatch: pytest.MonkeyPatch) -> None:
    class Processor(AttnProcessor2_0):
        def __call__(self, *args: Any, **named: Any) -> Any:
            assert big
            return super().__call__(*args, **named)

    model = build_model("unet")
    model.set_attn_processor(Processor())
    apply_and_remove(model, "unet")


def patch(owner: Any, name: str, big: Big, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = getattr(owner, name)

    def patched(*args: Any, **named: Any) -> Any:
        assert big
        return stock(*args, **named)

    monkeypatch.setattr(owner, name, patched)


def holds_by_patch(big: Big, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(F, "scaled_dot_product_attention", big, monkeypatch)
    apply_and_remove(build_model("unet"), "unet")


def holds_by_dispatch(big: Big, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(transformer_wan, "dispatch_attention_fn", big, monkeypatch)
    apply_and_remove(build_model("wan"), "wan")


def holds_by_method(big: Big, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(transformer_wan.WanAttnProcessor, "__call__", big, monkeypatch)
    apply_and_remove(build_model("wan"), "wan")


def holds_by_model(big: Big, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build_model("wan")

    class Model(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **named: Any) -> Any:
            assert big
            return super().forward(*args, **named)

    model.__class__ = Model
    apply_and_remove(model, "wan")


def holds_by_pipeline(big: Big, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = build_pipeline("wan")

    class Pipeline(type(pipe)):  # type: ignore[misc]
        held = big

    pipe.__class__ = Pipeline
    apply(pipe, DensePattern()).remove()


def apply_and_remove(model: Any, family: str) -> None:
    handle = apply(model, RadialPattern(decay=0.2, floor=0), dense_steps=0, dense_layers=0)
    forward(model, build_inputs(family))
    handle.remove()


@pytest.mark.parametrize(
    "holds", [holds_by_class, holds_by_patch, holds_by_dispatch, holds_by_method, holds_by_model, holds_by_pipeline]
)
def test_what_a_users_code_holds_is_freed_with_it(holds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    big = Big()
    held = weakref.ref(big)
    holds(big, monkeypatch)
    monkeypatch.undo()
    del big
    gc.collect()
    assert held() is None


def test_a_patch_that_wears_our_attributes_is_no_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    stock = forward(model, inputs)
    with apply(model, DensePattern()):
        ours = transformer_wan.dispatch_attention_fn

        @functools.wraps(ours)
        def patched(*args: Any, **named: Any) -> Any:
            return 2 * ours(*args, **named)

        monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", patched)
        doubled = forward(model, inputs)
    assert transformer_wan.dispatch_attention_fn is patched
    assert torch.equal(forward(model, inputs), doubled)
    assert not torch.equal(doubled, stock)


@pytest.mark.parametrize("swap", [True, False])
def test_processors_are_freed(swap: bool) -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    handle: Any = apply(model, DensePattern())
    forward(model, inputs)
    old = weakref.ref(model.blocks[0].attn1.processor)
    if swap:
        model.set_attn_processor(transformer_wan.WanAttnProcessor())
        forward(model, inputs)
        handle.remove()
    else:
        del model, handle
    gc.collect()
    assert old() is None
    assert transformer_wan.dispatch_attention_fn.__module__.startswith("diffusers")


def test_a_removed_handle_lets_go_of_the_model_and_keeps_its_report() -> None:
    pipe, call = build_pipeline("sd3")
    handle = apply(pipe, RadialPattern(), dense_steps=0)
    pipe(**{**call, "output_type": "latent"})
    before = handle.report().to_dict()
    handle.remove()
    held = weakref.ref(pipe), weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    assert handle.report().to_dict() == before
    assert repr(handle) == "<genattn RadialPattern on SD3Transformer2DModel: removed>"


# ---- the backward pass, and modes


def gradients(how: str, forwards: int = 1) -> dict[str, torch.Tensor]:
    model, inputs = build_model("wan").train(), build_inputs("wan")
    if how == "whole":
        inputs["hidden_states"] = inputs["hidden_states"].clone().requires_grad_()
    elif how != "plain":
        inputs["hidden_states"] = inputs["hidden_states"].clone().requires_grad_()
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=how == "reentrant")

    def run(t: int) -> torch.Tensor:
        given = {**inputs, "timestep": torch.tensor([t])}
        if how == "whole":
            return checkpoint(
                lambda x: model(**{**given, "hidden_states": x}, return_dict=False)[0],
                given["hidden_states"],
                use_reentrant=False,
            )
        return model(**given, return_dict=False)[0]

    with apply(model, RadialPattern(decay=0.2, floor=0), dense_steps=1, dense_layers=0):
        # two forwards, the first dense and the second sparse, before one backward pass
        sum(run(t).square().sum() for t in (900, 500)[: forwards + 1]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant", "whole"])
def test_recomputed_blocks_take_the_path_of_their_forward(how: str) -> None:
    wanted = gradients("plain")
    for name, found in gradients(how).items():  # up to 1,800; stock's own reentrant ones are 1e-4 off, for they add up in turn
        torch.testing.assert_close(found, wanted[name], atol=1e-4, rtol=1e-4)


def test_recomputation_of_an_unknown_forward_is_refused() -> None:
    model, inputs = build_model("wan").train(), build_inputs("wan")
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    loss = model(**inputs, return_dict=False)[0].sum()
    with apply(model, DensePattern(), Counts()), pytest.raises(GenAttnError, match="its forward is not among the last 512"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch, of stock too
@pytest.mark.parametrize("family", ["hunyuan-video", "qwen-image", "wan"])
def test_autocast_casts_as_stock_does(family: str) -> None:
    model, inputs = build_model(family), build_inputs(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = forward(model, inputs)
        with apply(model, RadialPattern(decay=100.0), dense_steps=0, dense_layers=0) as handle:
            found = forward(model, inputs)
            assert handle.report().sparse_calls
    assert float((found - stock).abs().max()) <= 0.03 * float(stock.abs().max())


@pytest.mark.parametrize("impl", ["cpu", "grouped", "sdpa", "reference", "halo"])
def test_plans_of_inference_mode_train(impl: str) -> None:
    layout = genattn.TokenLayout.from_grid((4, 8, 8), text_after=3 + len(impl))
    pattern = NeighborhoodPattern((2, 4, 4))
    with torch.inference_mode(), torch.device("meta"):
        pass
    tensors = [torch.randn(1, layout.seqlen, 2, 16) for _ in range(3)]
    with torch.inference_mode():
        expected = genattn.attention(*tensors, pattern, layout, impl=impl)
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    out = genattn.attention(q, k, v, pattern, layout, impl=impl)
    out.square().sum().backward()  # type: ignore[union-attr]
    torch.testing.assert_close(out, expected.clone(), atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]
    assert q.grad is not None


def test_plans_are_built_on_the_cpu_under_another_default_device() -> None:
    layout = genattn.TokenLayout.from_grid((4, 8, 9), text_after=2)
    with torch.device("meta"):
        plan = RadialPattern().plan(layout, 16, 16)
    assert plan.device.type == "cpu"
    assert plan.density == RadialPattern().plan(layout, 16, 16).density


# ---- several sizes in a batch


@pytest.mark.parametrize("sizes", [((16, 12), (12, 16)), ((16, 12), (8, 12)), ((8, 8), (16, 12))])
def test_every_image_of_a_batch_has_its_own_grid(sizes: Any) -> None:
    model, inputs = build_model("z-image"), build_inputs("z-image")
    captions = [torch.randn(20, 16), torch.randn(9, 16)]
    images = [torch.randn(16, 1, *size) for size in sizes]

    def run(which: list[int]) -> list[torch.Tensor]:
        given = {"x": [images[n] for n in which], "cap_feats": [captions[n] for n in which]}
        with torch.no_grad():
            return model(**{**inputs, **given, "t": inputs["t"].repeat(len(which))}, return_dict=False)[0]

    stock = run([0, 1])
    with apply(model, NeighborhoodPattern((-1, 2, 2)), dense_steps=0, dense_layers=0) as handle:
        both = run([0, 1])
        assert handle.report().sparse_calls == handle.report().calls > 0
        for n in (0, 1):
            torch.testing.assert_close(both[n], run([n])[0], atol=1e-4, rtol=1e-4)
            assert not torch.allclose(both[n], stock[n], atol=1e-4)


# ---- handles


def test_a_second_pattern_replaces_the_first() -> None:
    model = build_model("wan")
    first = apply(model, RadialPattern())
    with pytest.warns(GenAttnWarning, match="RadialPattern was on this model already and is replaced"):
        second = apply(model, NeighborhoodPattern((-1, 2, 2)))
    assert not first.active
    assert repr(first) == f"<genattn RadialPattern on {type(model).__name__}: removed>"
    assert "NeighborhoodPattern on WanTransformer3DModel: NOT APPLIED YET" in repr(second)
    assert genattn.remove(model) == 1
    assert not second.active
    assert genattn.remove(model) == 0


def test_a_pattern_beside_other_plugins_is_not_replaced() -> None:
    model = build_model("wan")
    with apply(model, RadialPattern(), Counts()), pytest.raises(GenAttnError, match=r"RadialPattern \+ Counts is on this one"):
        apply(model, RadialPattern())
    assert INJECTION not in model.__dict__


def test_a_backend_that_cannot_serve_is_told_at_the_first_forward() -> None:
    pipe, call = build_pipeline("wan")
    with (
        apply(pipe, RadialPattern(), impl="triton", dense_steps=0.5),
        pytest.raises(GenAttnError, match="impl='triton' cannot serve"),
    ):
        pipe(**{**call, "num_inference_steps": 4})


def test_what_ended_under_a_compiler_is_undone_by_the_next_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    assert not is_ours(transformer_wan.dispatch_attention_fn), "a test before this one has left a plugin applied"
    model = build_model("wan")
    apply(model, DensePattern())
    with monkeypatch.context() as compiling:
        compiling.setattr(processors.CompileContext, "current_compile_id", lambda: 1)
        del model
        gc.collect()
    assert is_ours(transformer_wan.dispatch_attention_fn), "nothing changes while a compiler looks names up"
    other = apply(build_model("sd3"), DensePattern())
    assert not is_ours(transformer_wan.dispatch_attention_fn)
    other.remove()
