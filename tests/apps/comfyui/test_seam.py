"""The seam on ComfyUI's models, on stand-ins that call attention as ComfyUI's do; `test_comfy_live` has the real ones."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_standins import ALWAYS, Block, Patcher, WanModel, X, sdpa, sparse
from torch import nn

import genattn
from genattn.apps.comfyui.hosts.families import host_of
from genattn.apps.comfyui.hosts.host import Entry
from genattn.apps.comfyui.patching.forward import Forward
from genattn.apps.comfyui.patching.seam import KEY, OVERRIDE, Override, around_model, chain_of, patch_model, run_of
from genattn.apps.comfyui.pictures import layout_for, mask_picture, sparse_of
from genattn.errors import GenAttnError
from genattn.functional.dispatch import attention
from genattn.geometry.token_layout import TokenLayout
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.patterns.dense import DensePattern
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model
from genattn.seam.plugin import Plugin
from genattn.seam.schedule import Schedule
from genattn.seam.sparse_plugin import SparsePlugin


@pytest.fixture
def wan() -> Patcher:
    return Patcher(SimpleNamespace(diffusion_model=WanModel()))


@pytest.mark.parametrize("split", [False, True])
def test_dense_is_the_stock_model_to_the_bit_and_sparse_is_the_core(wan: Patcher, split: bool) -> None:
    model = wan.model.diffusion_model
    model.split = split
    stock = wan.sample(X)
    assert torch.equal(patch_model(wan, SparsePlugin(DensePattern(), ALWAYS)).sample(X), stock)
    torch.testing.assert_close(patch_model(wan, sparse(-1)).sample(X), stock, atol=1e-5, rtol=1e-5)
    patched = patch_model(wan, sparse())
    out = patched.sample(X)
    assert not torch.allclose(out, stock)
    assert torch.equal(wan.sample(X), stock), "the model that came in stays as it was"
    tokens = torch.randn(1, 96, 32, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 96, 32, generator=torch.Generator().manual_seed(1))
    layout = TokenLayout.from_grid((6, 4, 4))
    for block in model.blocks:  # the same by hand, with the core's own call
        q, k, v = ((tokens @ w).reshape(1, 96, 4, 8) for w in block.weights)
        tokens = tokens + attention(q, k, v, NeighborhoodPattern((3, 2, 2)), layout).flatten(2)  # type: ignore[union-attr]
        tokens = tokens + sdpa(tokens @ block.weights[0], context @ block.weights[1], context @ block.weights[1], 4)
    torch.testing.assert_close(out, tokens, atol=1e-4, rtol=1e-4)


def test_the_report_counts_self_attention_alone(wan: Patcher) -> None:
    patched = patch_model(wan, sparse(schedule=Schedule(dense_steps=1, dense_layers=(0,))))
    patched.sample(X, steps=3)
    chain = chain_of(patched)
    report = chain.tally.report(chain.plugins, host_of(wan.model.diffusion_model).sites(wan.model.diffusion_model))
    assert (report.forwards, report.calls, report.sparse_calls) == (3, 9, 4)
    assert chain.tally.removed == ""
    patched.sample(X, steps=2)
    assert chain.tally.forwards == 2, "a new run starts at zero"


def test_a_plugin_without_a_step_to_act_at_is_told(wan: Patcher, caplog: pytest.LogCaptureFixture) -> None:
    patched = patch_model(wan, sparse(schedule=Schedule(dense_steps=9, dense_layers=0)))
    chain, sites = chain_of(patched), host_of(wan.model.diffusion_model).sites(wan.model.diffusion_model)
    note = "NeighborhoodPattern acts at no step of a run of 3: first dense steps (dense_steps=9)"
    with caplog.at_level(logging.WARNING, "genattn"):
        patched.sample(X, steps=3)
    assert caplog.messages == [note]
    assert chain.tally.report(chain.plugins, sites).notes == [note]
    caplog.clear()
    patched.sample(X, steps=12)
    assert caplog.messages == chain.tally.report(chain.plugins, sites).notes == []


def test_a_noise_window_that_no_step_meets_is_told(wan: Patcher) -> None:
    patched = patch_model(wan, SoftPAG("L0H0", sigma_start=9e9, sigma_stop=8e9))
    patched.sample(X, steps=3)
    (note,) = chain_of(patched).tally.notes
    assert note.startswith(
        "SoftPAG acts at no step of a run of 3: its window is steps 0 to 1 of the run and sigma 9000000000.0"
    )


def test_masks_of_three_axes_and_inference_mode(wan: Patcher) -> None:
    mask = torch.zeros(1, 1, 96)
    mask[..., -7:] = -1e9
    wan.mask = mask
    with torch.inference_mode():
        wan.mask = mask.clone()
        stock = wan.sample(X)
        patched = patch_model(wan, sparse(-1))
        patched.mask = wan.mask
        torch.testing.assert_close(patched.sample(X), stock, atol=1e-5, rtol=1e-5)
    assert chain_of(patched).tally.stats["blocks.0"].sparse == 2


def test_overrides_before_and_after_ours(wan: Patcher, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def theirs(before: Any) -> Any:
        def override(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append("theirs")
            return before(func, *args, **kwargs) if before else func(*args, **kwargs)

        return override

    ours = patch_model(wan, sparse()).sample(X)
    under = wan.clone()
    under.model_options["transformer_options"][OVERRIDE] = theirs(None)
    assert torch.equal(patch_model(under, sparse()).sample(X), ours)
    assert len(seen) == 2 * 3, "the cross-attention that is not ours"
    above = patch_model(wan, sparse())
    before = above.model_options["transformer_options"][OVERRIDE]
    above.model_options["transformer_options"][OVERRIDE] = theirs(before)
    assert torch.equal(above.sample(X), ours)
    again = patch_model(above, SparsePlugin(DensePattern(), ALWAYS))
    assert isinstance(again.model_options["transformer_options"][OVERRIDE], Override)
    assert torch.equal(again.sample(X), ours), "theirs in between hands on to ours, which then stays out"
    stolen = patch_model(wan, sparse())
    stolen.model_options["transformer_options"][OVERRIDE] = theirs(None)
    with caplog.at_level(logging.WARNING, "genattn"):
        stolen.sample(X)
    assert "NOT APPLIED in 1 of 1 forwards" in caplog.text
    assert "theirs.<locals>.override" in chain_of(stolen).tally.removed
    emptied = patch_model(wan, sparse())
    emptied.model_options["transformer_options"].pop(OVERRIDE)
    emptied.sample(X)
    assert "nothing" in chain_of(emptied).tally.removed


def test_replacements_of_blocks_stay(wan: Patcher) -> None:
    seen: list[int] = []

    def replacement(args: Any, extra: Any) -> Any:
        seen.append(1)
        return extra["original_block"](args)

    wan.model_options["transformer_options"]["patches_replace"] = {"dit": {("double_block", 1): replacement}}
    patched = patch_model(wan, sparse())
    patched.sample(X)
    assert len(seen) == 2
    assert chain_of(patched).tally.stats["blocks.1"].sparse == 2


def test_refused_before_anything_is_done(wan: Patcher) -> None:
    other = Patcher(SimpleNamespace(diffusion_model=nn.Linear(1, 1)))
    with pytest.raises(GenAttnError, match="serve Wan, HunyuanVideo, FLUX, Chroma"):
        patch_model(other, sparse())
    with pytest.raises(GenAttnError, match="layer must be one of"):
        patch_model(wan, sparse(), SoftPAG("L7"))
    assert KEY not in wan.model_options["transformer_options"]
    with pytest.raises(GenAttnError, match="carries no sparse attention"):
        sparse_of(wan)


def test_preview_needs_no_run(wan: Patcher) -> None:
    image, density, told = mask_picture(patch_model(wan, sparse()), X, 256)
    assert image.shape[0] == 1
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    assert 0 < density < 1
    assert "grid 6x4x4" in told


def test_without_plugins_a_forward_is_stock(wan: Patcher) -> None:
    wan.add_wrapper_with_key("apply_model", KEY, around_model)
    assert torch.equal(wan.sample(X), Patcher(wan.model).sample(X))


# ---- step, pass, token order


@pytest.mark.parametrize(("sigma", "step"), [(1.0, 0), (0.75, 1), (0.6, 1), (0.25, 3)])
def test_the_step_is_read_from_the_schedule(sigma: float, step: int) -> None:
    options = {"sigmas": torch.tensor([sigma]), "sample_sigmas": torch.linspace(1, 0, 5), "cond_or_uncond": [1, 0]}
    run = run_of(None, options)
    assert (run.step, run.num_steps, run.pass_name) == (step, 4, "cond_uncond")
    extra = run_of(None, {**options, "cond_or_uncond": [0], "genattn_pass": "softpag"})
    assert (extra.pass_name, extra.extra) == ("cond+softpag", "softpag")
    assert run_of(None, {}).step == -1


@pytest.mark.parametrize(
    ("chunks", "batch", "samples"), [([1, 0], 6, 3), ([0], 2, 2), ([1, 0, 0], 3, 1), ([1, 0], 3, None), ([], 4, None)]
)
def test_samples_are_the_entries_of_one_chunk(chunks: list[int], batch: int, samples: int | None) -> None:
    assert run_of(None, {"cond_or_uncond": chunks}, batch).samples == samples


class HunyuanVideo(nn.Module):
    patch_size, num_heads = [1, 2, 2], 4

    def __init__(self, flipped: bool) -> None:
        super().__init__()
        self.double_blocks, self.single_blocks = nn.ModuleList([Block(0)]), nn.ModuleList([Block(1), Block(2)])
        self.double_blocks[0].flipped_img_txt = flipped


class Flux(nn.Module):
    patch_size, num_heads = 2, 4


class MMDiT(nn.Module):
    num_heads, register_length = 4, 0

    def __init__(self) -> None:
        super().__init__()
        self.joint_blocks = nn.ModuleList([Block(0), Block(1)])
        self.joint_blocks[0].x_block.x_block_self_attn = True
        self.x_embedder = SimpleNamespace(patch_size=(2, 2))


def layout(model: Any, shape: tuple[int, ...], tokens: int, text: int | None = None, **extras: Any) -> str:
    return host_of(model).layout(model, Entry(shape, text, extras), tokens).describe()


def test_token_orders() -> None:
    video, picture = (1, 16, 3, 8, 8), (1, 16, 8, 7)
    assert layout(WanModel(), video, 48) == "grid 3x4x4"
    assert layout(WanModel(), video, 64, reference_latent=torch.zeros(1, 16, 1, 8, 8)) == "reference 16 + grid 3x4x4"
    assert layout(WanModel(), video, 64, time_dim_concat=torch.zeros(1, 16, 1, 8, 8)) == "grid 4x4x4"
    assert layout(HunyuanVideo(True), video, 53) == "grid 3x4x4 + text 5"
    assert layout(HunyuanVideo(False), video, 53) == "text 5 + grid 3x4x4"
    reference = torch.zeros(1, 16, 1, 8, 8)
    assert layout(HunyuanVideo(True), video, 69, ref_latent=reference) == "reference 1x4x4 + grid 3x4x4 + text 5"
    flux, kontext = Flux(), [torch.zeros(1, 16, 4, 4)]
    assert layout(flux, picture, 21, text=5) == "text 5 + grid 4x4"
    assert layout(flux, picture, 25, text=5, ref_latents=kontext) == "text 5 + grid 4x4 + reference 2x2"
    assert layout(MMDiT(), picture, 21, text=5) == "text 5 + grid 4x4"
    assert layout(MMDiT(), picture, 16, text=5) == "grid 4x4"


@pytest.mark.parametrize(
    ("model", "shape", "tokens", "text"),
    [(WanModel(), (1, 16, 3, 8, 8), 50, None), (Flux(), (1, 16, 8, 8), 22, 5), (MMDiT(), (1, 16, 8, 8), 10, 5)],
)
def test_tokens_of_unknown_order_are_told(model: Any, shape: tuple[int, ...], tokens: int, text: int | None) -> None:
    with pytest.raises(GenAttnError, match="tokens are not"):
        layout(model, shape, tokens, text)


def test_sites_count_over_all_stacks() -> None:
    hunyuan = HunyuanVideo(True)
    assert [(s.name, s.depth) for s in host_of(hunyuan).sites(hunyuan)] == [
        ("double_blocks.0", 0),
        ("single_blocks.0", 1),
        ("single_blocks.1", 2),
    ]
    names = [(s.name, s.depth, s.kind) for s in host_of(MMDiT()).sites(MMDiT())]
    assert names == [
        ("joint_blocks.0", 0, "joint"),
        ("joint_blocks.0.x_block.attn2", 0, "self"),
        ("joint_blocks.1", 1, "joint"),
    ]
    model = Patcher(SimpleNamespace(diffusion_model=MMDiT()))
    assert layout_for(model, torch.zeros(1, 16, 8, 8), 5).describe() == "text 5 + grid 4x4"


@pytest.mark.parametrize("family", ["wan", "flux", "hunyuan-video"])
def test_the_diffusers_seam_in_the_inference_mode_of_comfyui(family: str) -> None:
    model, inputs = build_model(family), build_inputs(family)
    with torch.no_grad():
        stock = model(**inputs, return_dict=False)[0]
    with torch.inference_mode(), genattn.apply(model, NeighborhoodPattern(-1), schedule=ALWAYS) as handle:
        fresh = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        for _ in range(2):
            out = model(**fresh, return_dict=False)[0]
    torch.testing.assert_close(out, stock, atol=1e-4, rtol=1e-4)
    assert handle.report().sparse_calls


class Counting(Plugin):
    """Counts attachments; refuses the model where told."""

    def __init__(self, refusing: bool = False) -> None:
        self.refusing, self.attached = refusing, 0

    def attach(self, model: Any, sites: Any) -> None:
        if self.refusing:
            raise GenAttnError("not this model")
        self.attached += 1

    def detach(self, model: Any) -> None:
        self.attached -= 1


def test_a_refused_plugin_leaves_none_attached(wan: Patcher) -> None:
    first = Counting()
    patched = patch_model(wan, first)
    with pytest.raises(GenAttnError, match="not this model"):
        patch_model(patched, Counting(refusing=True)).sample(X)
    assert first.attached == 0


def test_a_call_through_somebodys_override_above_ours_is_counted_once(wan: Patcher, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []  # a block with two attentions would give the second's place to a call that comes by twice
    stock = Forward.site_of

    def site_of(self: Forward, queries: int, *call: Any) -> Any:
        asked.append(queries)
        return stock(self, queries, *call)

    monkeypatch.setattr(Forward, "site_of", site_of)
    once = patch_model(wan, SparsePlugin(DensePattern(), ALWAYS))
    once.sample(X)
    wanted = asked.copy()
    above = patch_model(wan, SparsePlugin(DensePattern(), ALWAYS))
    before = above.model_options["transformer_options"][OVERRIDE]
    above.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: before(func, *args, **kwargs)
    again = patch_model(above, SparsePlugin(DensePattern(), ALWAYS))
    asked.clear()
    again.sample(X)
    assert asked == wanted

    def calls(patcher: Patcher) -> dict[str, tuple[int, int]]:
        return {name: (stats.calls, stats.sparse) for name, stats in chain_of(patcher).tally.stats.items()}

    assert calls(again) == calls(once)
