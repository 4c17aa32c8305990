"""Plugins for one clip beyond its trained length: each against its definition, exact removal, and what cannot be is refused."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from long_clips import Watch, answer, longer, reference

import genattn
from genattn.errors import GenAttnError
from genattn.pipelines.long_clip.logit_decay import LogitDecay, windows
from genattn.pipelines.long_clip.riflex import FrameStretch, RIFLEx, intrinsic
from genattn.pipelines.long_clip.rotary_tables import changed, temporal_frequencies
from genattn.pipelines.tiny.random.build import build_model
from genattn.seam.plugin import Plugin
from genattn.seam.plugin_config import PluginConfig

MODULES = ("wan", "wan-vace", "skyreels", "hunyuan-video", "hunyuan-video-1.5")


def rotary(frames, places, size=12, base=10000.0, positions=None):
    frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    positions = torch.arange(frames, dtype=torch.float64) if positions is None else positions
    angles = torch.outer(positions, frequencies).repeat_interleave(2, 1).repeat_interleave(places, 0)
    rest = torch.randn(frames * places, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return frequencies, tuple(torch.cat([f(angles), rest], 1)[None, :, None].float() for f in (torch.cos, torch.sin))


# ---- rotary tables


def test_only_the_frequency_asked_for_changes_and_only_its_columns():
    frequencies, tables = rotary(20, 6)
    plugin = RIFLEx(8)
    new = changed(tables, 20, frequencies, [plugin.change], "M")
    wanted = frequencies.clone()
    assert intrinsic(frequencies, 8) == 1  # periods 6.3, 29.2, 135, ...
    wanted[1] = 0.9 * 2 * math.pi / 40
    long_frequencies, long_tables = rotary(40, 6)
    new = changed(long_tables, 40, long_frequencies, [plugin.change], "M")
    angles = torch.outer(torch.arange(40, dtype=torch.float64), wanted).repeat_interleave(2, 1).repeat_interleave(6, 0)
    for before, after, function in zip(long_tables, new, (torch.cos, torch.sin)):
        assert after.shape == before.shape
        torch.testing.assert_close(after[0, :, 0, :12], function(angles).float())
        same = [i for i in range(32) if i not in (2, 3)]
        torch.testing.assert_close(after[..., same], before[..., same])
        assert not torch.allclose(after[..., 2:4], before[..., 2:4], atol=1e-2)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(2, 80), st.integers(4, 44), st.sampled_from([256.0, 10000.0]))
def test_a_frequency_is_lowered_never_raised_and_then_covers_the_clip(trained, frames, half, base):
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    k = intrinsic(frequencies, trained)
    new, positions = RIFLEx(trained).change(frequencies, torch.arange(frames, dtype=torch.float64))
    assert bool((new <= frequencies).all())
    assert (new != frequencies).sum() <= 1
    assert 2 * math.pi / float(new[k]) >= frames or float(new[k]) == float(frequencies[k])
    assert k == 0 or 2 * math.pi / float(frequencies[k - 1]) < trained
    assert positions.tolist() == list(range(frames))


def test_the_frequencies_that_the_authors_found():
    hunyuan, cog = (base ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16) for base in (256.0, 10000.0))
    assert intrinsic(hunyuan, 33) == 3
    assert intrinsic(cog, 13) == 1
    assert intrinsic(torch.ones(3, dtype=torch.float64), 13) == 2


def test_stretched_frames_stand_where_the_trained_clip_had_some():
    positions = torch.arange(29, dtype=torch.float64)
    _, whole = FrameStretch(8).change(torch.ones(2), positions)
    assert (float(whole[0]), float(whole[-1])) == (0, pytest.approx(7))
    _, half = FrameStretch(8, 0.5).change(torch.ones(2), positions)
    assert float(half[-1]) == pytest.approx(28 * (7 / 28) ** 0.5)
    _, none = FrameStretch(8, 0).change(torch.ones(2), positions)
    torch.testing.assert_close(none, positions)


def test_unknown_columns_are_refused():
    frequencies, tables = rotary(20, 6, positions=torch.arange(20, dtype=torch.float64) * 0.5)
    with pytest.raises(GenAttnError, match="the rotary tables of M do not hold the frames' angles"):
        changed(tables, 20, frequencies, [RIFLEx(8).change], "M")
    with pytest.raises(GenAttnError, match="do not hold"):
        changed(rotary(20, 6)[1], 19, frequencies, [RIFLEx(8).change], "M")


@pytest.mark.parametrize("family", [*MODULES, "cogvideox-1.5"])
@pytest.mark.parametrize("make", [lambda: RIFLEx(2, k=0), lambda: FrameStretch(2)], ids=["riflex", "stretch"])
def test_stock_models_change_while_it_is_on_and_are_as_before_after(family, make):
    model, inputs = build_model(family), longer(family, 14)
    if family.startswith("cogvideox"):
        inputs["image_rotary_emb"] = cog_tables(model, inputs)
    before = answer(model, inputs)
    classes = {name: (type(module), dict(module.__dict__).keys()) for name, module in model.named_modules()}
    with genattn.apply(model, make()) as handle:
        under = answer(model, inputs)
        assert handle.plugins[0].describe()["forwards_changed"] == 1
        torch.testing.assert_close(answer(model, inputs), under)
    assert not torch.allclose(under, before, atol=1e-5)
    assert torch.equal(answer(model, inputs), before)
    assert {name: (type(m), dict(m.__dict__).keys()) for name, m in model.named_modules()} == classes


def cog_tables(model, inputs):
    frames, height, width = inputs["hidden_states"].shape[1], *inputs["hidden_states"].shape[-2:]
    frames, size = frames // (model.config.patch_size_t or 1), model.config.attention_head_dim
    places = height * width // model.config.patch_size**2
    frequencies = temporal_frequencies(model)
    angles = torch.outer(torch.arange(frames, dtype=torch.float64), frequencies).repeat_interleave(2, 1)
    angles = torch.cat([angles.repeat_interleave(places, 0), torch.zeros(frames * places, size - angles.shape[1])], 1)
    return angles.cos().float(), angles.sin().float()


def test_the_change_is_that_of_other_buffers():
    model, inputs = build_model("wan"), longer("wan", 9)
    with genattn.apply(model, FrameStretch(3)):
        under = answer(model, inputs)
    rope, size = model.rope, model.rope.t_dim
    positions = torch.arange(rope.freqs_cos.shape[0], dtype=torch.float64) * 2 / 8
    angles = torch.outer(positions, temporal_frequencies(model)).repeat_interleave(2, 1)
    rope.freqs_cos[:, :size], rope.freqs_sin[:, :size] = angles.cos(), angles.sin()
    torch.testing.assert_close(answer(model, inputs), under, atol=2e-5, rtol=1e-4)


def test_two_at_once_and_a_failing_forward_leave_nothing_behind():
    model, inputs = build_model("wan"), longer("wan", 6)
    before = answer(model, inputs)

    class Fails(Plugin):
        def forward(self, run, args, kwargs, inner):
            inner(*args, **kwargs)
            raise RuntimeError("after the model")

    with genattn.apply(model, RIFLEx(2, k=0), FrameStretch(2)):
        together = answer(model, inputs)
    with genattn.apply(model, FrameStretch(2)):
        assert not torch.allclose(answer(model, inputs), together, atol=1e-5)
    with genattn.apply(model, RIFLEx(2, k=0)), genattn.apply(model, FrameStretch(2), Fails()) as second:
        with pytest.raises(RuntimeError, match="after the model"):
            answer(model, inputs)
        second.remove()
        assert not torch.allclose(answer(model, inputs), before, atol=1e-5)
    assert torch.equal(answer(model, inputs), before)


def test_a_clip_of_the_trained_length_is_untouched():
    model, inputs = build_model("wan"), longer("wan", 3)
    before = answer(model, inputs)
    with genattn.apply(model, RIFLEx(3), FrameStretch(3), LogitDecay(3)):
        assert torch.equal(answer(model, inputs), before)


@pytest.mark.parametrize("family", ["mochi", "ltx", "flux", "cogvideox"])
def test_models_without_known_tables_are_refused_before_anything_changes(family):
    model = build_model(family)
    with pytest.raises(GenAttnError, match=r"are not known here|has learned positions"):
        genattn.apply(model, RIFLEx(8))


def test_a_forward_without_tables_or_layout_is_refused():
    model, inputs = build_model("cogvideox-1.5"), longer("cogvideox-1.5", 6)
    inputs.pop("image_rotary_emb", None)
    with genattn.apply(model, RIFLEx(2)), pytest.raises(GenAttnError, match="must be given image_rotary_emb by keyword"):
        answer(model, inputs)
    run = type("Run", (), {"layout": None, "why_no_layout": "", "model": model})()
    with pytest.raises(GenAttnError, match="needs the clip's frames, but no layout is known"):
        RIFLEx(2).forward(run, (), {}, lambda: None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RIFLEx(1), "trained_frames must be >= 2"),
        (lambda: RIFLEx(8, k=-1), "k must be >= 0"),
        (lambda: genattn.apply(build_model("wan"), RIFLEx(8, k=99)), "k must be below"),
        (lambda: FrameStretch(8, 1.5), "share must be 0"),
        (lambda: LogitDecay(1), "trained_frames must be >= 2"),
        (lambda: LogitDecay(8, 1.5), "decay must be 0 to 1"),
        (lambda: LogitDecay(8, 0.9, -1), "penalty must be >= 0"),
        (lambda: LogitDecay(8, 1.0), "change nothing"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(GenAttnError, match=message):
        make()


# ---- decayed logits


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 12), st.integers(1, 20))
def test_windows_cover_every_frame_once_with_the_nearest_frames(trained, more):
    frames = trained + more
    groups = windows(frames, trained)
    assert [f for _, group in groups for f in group] == list(range(frames))
    for first, group in groups:
        assert 0 <= first <= frames - trained
        for f in group:
            assert first <= f < first + trained
            middle = first + trained // 2
            assert f == middle or first in (0, frames - trained)


@pytest.mark.parametrize("family", ["wan", "hunyuan-video", "cogvideox"])
@pytest.mark.parametrize("plugin", [LogitDecay(2, 0.5), LogitDecay(2, 1.0, 1.5), LogitDecay(2, 0.8, float("inf"))])
def test_the_answer_is_that_of_the_definition_in_stock_models(family, plugin):
    model, inputs = build_model(family), longer(family, 6)
    watch = Watch()
    with genattn.apply(model, watch, plugin):
        answer(model, inputs)
    assert watch.calls
    for call, out in watch.calls:
        wanted = reference(call.query, call.key, call.value, call.layout, call.scale, plugin, call.mask)
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["keys", "rows", "bool rows"])
def test_masks_of_the_call_stay_on(form):
    layout = genattn.TokenLayout.from_grid((5, 2, 2), text_after=3)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, layout.seqlen, 3, 8)
    keep = torch.rand(2, layout.seqlen) > 0.3
    keep[:, 0] = True
    rows = keep[:, None, None].expand(-1, 1, layout.seqlen, -1)
    mask = {"keys": keep, "rows": torch.zeros(rows.shape).masked_fill(~rows, -1e9), "bool rows": rows}[form]
    plugin = LogitDecay(2, 0.5, 0.7)
    run = genattn.seam.plugin.Run(layout=layout)
    site = type("Site", (), {"name": "a"})()
    call = genattn.seam.plugin.AttentionCall(query, key, value, mask, None, False, False, site, run, layout)

    def sdpa(call):
        told = call.mask[:, None, None] if call.mask is not None and call.mask.ndim == 2 else call.mask
        q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, told, scale=call.scale).transpose(1, 2)

    wanted = reference(query, key, value, layout, None, plugin, rows)
    torch.testing.assert_close(plugin.attention(call, sdpa), wanted, atol=1e-5, rtol=1e-4)
    for changes, reason in (
        ({"is_causal": True}, "causal"),
        ({"mask": object()}, "cannot be cut"),
        ({"layout": None}, "no grid is known"),
        ({"layout": genattn.TokenLayout.from_grid((2, 2, 2))}, "no longer than trained"),
    ):
        assert reason in plugin.why_not(call.with_tensors(**changes))
    sent = call.with_tensors(is_causal=True)
    assert plugin.attention(sent, lambda _: query) is query
    assert "causal" in sent.record.reason


def test_plugins_are_saved_and_come_back(tmp_path):
    for plugin in (RIFLEx(21, 5), FrameStretch(21, 0.5), LogitDecay(21, 0.9, 0.1)):
        again = type(plugin).from_settings(plugin.settings())
        assert again.settings() == plugin.settings()
        assert again.describe()["trained_frames"] == 21
    assert PluginConfig
