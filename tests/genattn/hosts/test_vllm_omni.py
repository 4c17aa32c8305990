"""vLLM-Omni's callable, through a dispatcher written from the description of theirs, and through theirs where it is there."""

import json
import logging
import sys
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import genattn
from genattn import GenAttnError, NeighborhoodPattern, RadialPattern
from genattn.hosts.vllm_omni import OmniAttention, attention

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[3]
GROUP = "vllm_omni.sparse_attn"
WINDOWS = {"type": "NeighborhoodPattern", "window_size": [3, 3, 3]}
GRID = (4, 4, 6)
CLIP = {"latent_shape": torch.tensor([[4, 8, 12]] * 2), "patch_size": torch.tensor([[1, 2, 2]] * 2)}


class Dispatcher:
    """What stands between a layer and the callable: settings, then the step's state, then the layer's extras, one flat dict."""

    def __init__(self, settings: dict[str, Any], scale: float, causal: bool = False) -> None:
        found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
        self.call = EntryPoint("genattn", found["genattn"], GROUP).load()
        self.settings, self.scale, self.causal = settings, scale, causal
        told = getattr(self.call, "capabilities", None)
        self.can = {name for name, yes in dict(told or {}).items() if yes}

    def forward(self, q: Any, k: Any, v: Any, state: dict[str, Any], extra: dict[str, Any], **inputs: Any) -> torch.Tensor:
        merged = {**self.settings, **state, **extra}
        params = {name: value for name, value in merged.items() if value is not None}
        params.update({n: x for n, x in (self.call.geometry_fn(q.shape, params) or {}).items() if x is not None})
        for name, needed in (("attn_mask", "supports_attention_mask"), ("full_attn_spans", "supports_full_attn_spans")):
            if inputs.get(name) is not None:
                assert needed in self.can, f"{name} is refused before the callable sees it"
                params[name] = inputs[name]
        return self.call(q, k, v, params, is_causal=self.causal, softmax_scale=self.scale)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _counts() -> None:
    attention.__init__()  # type: ignore[misc]


def tensors(tokens: int, keys: int | None = None, shared: int = 4) -> list[torch.Tensor]:
    return [torch.randn(2, n, h, 16) for n, h in ((tokens, 4), (keys or tokens, shared), (keys or tokens, shared))]


def dense(q: Any, k: Any, v: Any, scale: float, mask: Any = None, causal: bool = False) -> torch.Tensor:
    parts = [x.transpose(1, 2) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def steps(step: int, total: int = 8) -> dict[str, torch.Tensor]:
    return {"denoise_step_idx": torch.tensor([step] * 2), "total_denoise_steps": torch.tensor([total] * 2)}


@pytest.mark.parametrize("shared", [4, 2])
def test_a_clip_runs_sparse_under_the_settings(shared: int) -> None:
    q, k, v = tensors(96, shared=shared)
    layer = Dispatcher({"pattern": WINDOWS, "tail": "mean", "topk": 3}, 0.3)
    out = layer.forward(q, k, v, {**CLIP, **steps(2)}, {"kv_cache_dtype": None})
    want = genattn.attention(q, k, v, NeighborhoodPattern((3, 3, 3), tail="mean"), grid=GRID, scale=0.3)
    assert torch.equal(out, want)
    assert attention.report() == {"sparse_calls": 1, "dense_reasons": {}}
    as_text = Dispatcher({"pattern": json.dumps(WINDOWS), "tail": "mean"}, 0.3)
    assert torch.equal(as_text.forward(q, k, v, {**CLIP, **steps(2)}, {}), want)


def test_a_name_and_the_measured_tail_by_default() -> None:
    q, k, v = tensors(96)
    out = Dispatcher({"pattern": "adaptive"}, 0.25).forward(q, k, v, CLIP, {})
    assert torch.equal(out, genattn.attention(q, k, v, "adaptive", grid=GRID, scale=0.25, tail="measured"))
    # by default "auto", which is dense at this length
    torch.testing.assert_close(Dispatcher({}, 0.25).forward(q, k, v, CLIP, {}), dense(q, k, v, 0.25))
    assert attention.report()["sparse_calls"] == 2


@pytest.mark.parametrize(
    ("given", "sparse"),
    [
        ({}, [False, False, True]),
        ({"dense_steps": 0.5}, [False, False, False]),
        ({"dense_steps": 1}, [False, True, True]),
        ({"dense_steps": 0}, [True, True, True]),
    ],
)
def test_first_steps_stay_dense(given: dict[str, Any], sparse: list[bool]) -> None:
    q, k, v = tensors(96)
    layer = Dispatcher({"pattern": WINDOWS, **given}, 0.25)
    whole = dense(q, k, v, 0.25)
    ran = [not torch.equal(layer.forward(q, k, v, {**CLIP, **steps(step)}, {}), whole) for step in range(3)]
    assert ran == sparse
    mixed = {"denoise_step_idx": torch.tensor([0, 7]), "total_denoise_steps": torch.tensor([8, 8])}
    late = not torch.equal(layer.forward(q, k, v, {**CLIP, **mixed}, {}), whole)
    assert late == sparse[0], "a batch waits for its last sample"


def test_tokens_outside_of_the_clip() -> None:
    q, k, v = tensors(96 + 7)
    pattern = NeighborhoodPattern((3, 3, 3))
    for outside in ("before", "after"):
        out = Dispatcher({"pattern": WINDOWS, "outside": outside}, 0.25).forward(q, k, v, CLIP, {})
        want = genattn.attention(q, k, v, pattern, grid=GRID, scale=0.25, tail="measured", **{f"text_{outside}": 7})
        assert torch.equal(out, want)
    out = Dispatcher({"pattern": WINDOWS}, 0.25).forward(q, k, v, CLIP, {})
    assert torch.equal(out, dense(q, k, v, 0.25)), "nobody says where they stand"
    own = Dispatcher({"pattern": WINDOWS, "grid": [103]}, 0.25)
    with pytest.raises(GenAttnError, match="window_size"):
        own.forward(q, k, v, CLIP, {})  # the settings' grid wins, and has one axis


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_a_mask_of_keys_and_filling_that_it_hides(kind: torch.dtype) -> None:
    q, k, v = tensors(100)
    keys = torch.ones(2, 100, dtype=torch.bool)
    keys[:, 96:] = False
    keys[1, 90:] = False
    mask = torch.where(keys, 0.0, -1e9)[:, None, None] if kind is torch.float32 else keys.to(kind)
    out = Dispatcher({"pattern": WINDOWS}, 0.25).forward(q, k, v, CLIP, {}, attn_mask=mask)
    short = genattn.attention(*(x[:, :96] for x in (q, k, v)), NeighborhoodPattern((3, 3, 3)), grid=GRID, scale=0.25,
                              key_mask=keys[:, :96], tail="measured")  # fmt: skip
    torch.testing.assert_close(out[:, :96], short, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": {}}, "`outside` does not say"),
        ({"state": {**CLIP, "latent_shape": torch.tensor([[4, 8, 12], [2, 16, 12]])}}, "`outside` does not say"),
        ({"state": {**CLIP, "patch_size": [0, 2, 2]}}, "`outside` does not say"),
        ({"state": {**CLIP, "latent_shape": (8, 8, 12), "patch_size": (1, 2, 2)}}, "`outside` does not say"),
        ({"keys": 12}, "96 queries look at 12 keys"),
        ({"causal": True}, "the call is causal"),
        ({"mask": torch.ones(2, 1, 96, 96).tril().bool()}, "not the outer product"),
        ({"settings": {"min_tokens": 97}}, r"short sequence \(min_tokens=97\)"),
        ({"settings": {"dense_steps": 0.5}}, "the sampling step is not told"),
    ],
)
def test_what_stays_dense_is_told_once_and_counted(
    changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v = tensors(96, changes.get("keys"))
    mask, causal, settings = changes.get("mask"), changes.get("causal", False), changes.get("settings", {})
    layer = Dispatcher({"pattern": WINDOWS, **settings}, 0.25, causal)
    with caplog.at_level(logging.WARNING, "genattn"):
        for _ in range(2):
            out = layer.forward(q, k, v, changes.get("state", CLIP), {}, attn_mask=mask)
    torch.testing.assert_close(out, dense(q, k, v, 0.25, mask, causal))
    assert len([record for record in caplog.records if "stays dense" in record.message]) == 1
    assert attention.report()["sparse_calls"] == 0
    assert list(attention.report()["dense_reasons"].values()) == [2]
    strict = Dispatcher({**layer.settings, "strict": True}, 0.25, causal)
    if "min_tokens" in settings:  # what the settings ask for is no failure
        strict.forward(q, k, v, changes.get("state", CLIP), {}, attn_mask=mask)
        return
    with pytest.raises(GenAttnError, match="strict: .*" + reason):
        strict.forward(q, k, v, changes.get("state", CLIP), {}, attn_mask=mask)


def test_three_axis_masks_in_dense_calls() -> None:
    q, k, v = tensors(6)
    mask = torch.ones(2, 6, 6).tril().bool()
    out = Dispatcher({"min_tokens": 7}, 0.25).forward(q, k, v, {}, {}, attn_mask=mask)
    torch.testing.assert_close(out, dense(q, k, v, 0.25, mask[:, None]))
    keys = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    out = Dispatcher({"min_tokens": 7}, 0.25).forward(q, k, v, {}, {}, attn_mask=keys)
    torch.testing.assert_close(out, dense(q, k, v, 0.25, keys.bool()[:, None, None]))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"pattern": "sparse"}, "a pattern's name must be one of"),
        ({"pattern": "{window"}, "a name or a description in JSON"),
        ({"tail": "median"}, "tail must be None or one of"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"outside": "left"}, "outside must be one of before, after"),
        ({"dense_steps": 1.5}, "dense_steps must be a share"),
        ({"dense_steps": True}, "dense_steps must be a share"),
        ({"dense_steps": float("nan")}, "dense_steps must be a share"),
        ({"dense_steps": -1}, "dense_steps must be a share"),
        ({"min_tokens": 1.5}, "min_tokens must be a whole number"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    q, k, v = tensors(96)
    with pytest.raises(GenAttnError, match=match):
        Dispatcher({"pattern": WINDOWS, **settings}, 0.25).forward(q, k, v, CLIP, {})


def test_spans_are_not_claimed() -> None:
    assert dict(OmniAttention.capabilities) == {"supports_attention_mask": True}
    assert isinstance(OmniAttention.capabilities, dict), "the dispatcher looks for a dict"


def test_numbers_may_come_plain() -> None:
    q, k, v = tensors(96)
    told = {"latent_shape": (4, 8, 12), "patch_size": [1, 2, 2], "denoise_step_idx": 5, "total_denoise_steps": [8, 8]}
    out = Dispatcher({"pattern": {"type": "RadialPattern", "decay": 0.2}}, 0.25).forward(q, k, v, told, {})
    assert torch.equal(out, genattn.attention(q, k, v, RadialPattern(decay=0.2), grid=GRID, scale=0.25, tail="measured"))


def test_in_their_own_dispatcher() -> None:
    """Where a vLLM-Omni is installed that has one."""
    pytest.importorskip("vllm_omni", reason="vLLM-Omni needs vLLM, whose wheels are for CUDA")
    theirs = pytest.importorskip("vllm_omni.diffusion.attention.backends.sparse_attn", reason="this one has no SPARSE_ATTN yet")
    abstract = import_module("vllm_omni.diffusion.attention.backends.abstract")
    impl = theirs._SparseAttentionImpl(4, 16, 0.25, backend_kwargs={"backend": "genattn", "params": {"pattern": WINDOWS}})
    q, k, v = tensors(96)
    told = abstract.AttentionMetadata(per_forward=abstract.PerForwardState(**CLIP))
    want = genattn.attention(q, k, v, NeighborhoodPattern((3, 3, 3)), grid=GRID, scale=0.25)
    assert torch.equal(impl.forward(q, k, v, told), want)
