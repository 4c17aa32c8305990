"""Other packages' kernels: the arguments they get, on stand-ins or NATTEN itself, and every reason why not."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import genattn
from genattn.errors import GenAttnError
from genattn.functional.planned import planned_attention
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.peers import optional as optional_peers
from genattn.kernels.peers.optional import GridWindows, natten_attention, peer_attention, why_not_natten, why_not_peer
from genattn.kernels.plan.block_plan import dense_plan
from genattn.kernels.plan.random_plan import plan_from_states, random_plan
from genattn.kernels.reference.attention import reference_attention, visible_mask
from genattn.patterns.natten_windows import natten_windows


def _install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


def _on_gpu(dim: int = 64, dtype: torch.dtype = torch.bfloat16, tokens: int = 256) -> Any:
    return SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype, shape=(1, tokens, 2, dim))


def _plan(block_q: int = 64, block_k: int = 64):
    tiles = dense_plan(256, 256, block_q, block_k)
    states = torch.ones(1, len(tiles.query_tiles), len(tiles.key_tiles), dtype=torch.int) * 2
    states[0, 0, 1:] = 0
    return plan_from_states(states, tiles.query_tiles, tiles.key_tiles, None, 256, 256)


class _Wrapper:
    """FlashInfer's wrapper, on plain attention: it believes nothing but what it was told."""

    planned = 0

    def __init__(self, workspace: torch.Tensor) -> None:
        assert workspace.dtype == torch.uint8

    def plan(
        self, indptr, indices, M, N, R, C, num_qo_heads, num_kv_heads, head_dim, *, q_data_type, sm_scale, mask=None
    ) -> None:
        _Wrapper.planned += 1
        rows, columns, block_q, block_k = M, N, R, C
        assert (rows, columns, num_qo_heads, num_kv_heads, head_dim, q_data_type) == (256, 256, 4, 2, 16, torch.float32)
        assert mask is None
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        for row in range(rows // block_q):
            for column in indices[indptr[row] : indptr[row + 1]].tolist():
                mask[row * block_q : (row + 1) * block_q, column * block_k : (column + 1) * block_k] = True
        self.mask, self.scale = mask, sm_scale

    def run(self, query, key, value) -> torch.Tensor:
        parts = [x.transpose(0, 1)[None] for x in (query, key, value)]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(*parts, attn_mask=self.mask, scale=self.scale, enable_gqa=True)[0].transpose(0, 1)


def test_flashinfer_gets_the_lists_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "flashinfer", sparse=SimpleNamespace(BlockSparseAttentionWrapper=_Wrapper))
    plan, query = _plan(), torch.randn(2, 256, 4, 16)
    key, value = torch.randn(2, 2, 256, 2, 16)
    for _ in range(2):
        out = peer_attention("flashinfer", query, key, value, plan, 0.3)
    assert _Wrapper.planned == 1, "planned once for a plan"
    torch.testing.assert_close(out, reference_attention(query, key, value, plan, scale=0.3)[0], atol=1e-5, rtol=1e-4)


def test_spargeattn_gets_one_number_per_tile_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def call(query, key, value, *, mask_id, scale) -> torch.Tensor:
        seen.update(mask=mask_id, scale=scale)
        return query

    _install(monkeypatch, "spas_sage_attn", block_sparse_sage2_attn_cuda=call)
    plan, query = _plan(128, 64), torch.randn(2, 256, 3, 64)
    assert torch.equal(peer_attention("spargeattn", query, query, query, plan), query), "heads first and back"
    assert seen["mask"].shape == (2, 3, 2, 4)
    assert seen["mask"][1, 2].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert seen["mask"].dtype == torch.int8
    assert seen["scale"] == 0.125


def test_natten_gets_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def na3d(query, key, value, **settings) -> torch.Tensor:
        seen.update(settings, shape=query.shape, contiguous=key.is_contiguous())
        return value

    _install(monkeypatch, "natten", na3d=na3d)
    layout = genattn.TokenLayout.from_grid((4, 6, 8))
    pattern = genattn.NeighborhoodPattern((2, 3, 4), stride=(1, 3, 2), dilation=(2, 1, 1), is_causal=(True, False, False))
    windows = natten_windows(pattern, layout)
    value = torch.randn(2, 3, 192, 16).transpose(1, 2)
    assert torch.equal(natten_attention(value, value, value, windows), value)
    assert seen == {"kernel_size": (2, 3, 4), "stride": (1, 3, 2), "dilation": (2, 1, 1), "is_causal": (True, False, False),
                    "scale": 0.25, "shape": (2, 4, 6, 8, 3, 16), "contiguous": True}  # fmt: skip
    assert windows.density == 24 / 192
    assert torch.equal(genattn.attention(value, value, value, pattern, layout, impl="natten"), value)
    assert why_not_natten(_on_gpu(tokens=192), windows) is None
    assert "float16 or bfloat16" in str(why_not_natten(_on_gpu(tokens=192, dtype=torch.float32), windows))


@pytest.mark.skipif(importlib.util.find_spec("natten") is None, reason="NATTEN is not installed (pip install natten)")
@pytest.mark.filterwarnings("ignore")  # its own, and those of what it compiles
@pytest.mark.parametrize(
    ("grid", "window", "settings"),
    [
        ((6, 8, 8), (3, 4, 4), {}),
        ((6, 8, 8), (3, 4, 4), {"stride": (2, 2, 2)}),
        ((6, 8, 8), (3, 3, 3), {"dilation": (2, 2, 2), "is_causal": (True, False, False)}),
        ((16, 16), (6, 6), {"stride": (2, 3), "dilation": (1, 2), "is_causal": (False, True)}),
        ((40,), (7,), {"stride": (2,), "dilation": (3,)}),
    ],
)
def test_the_real_natten_agrees(grid: tuple[int, ...], window: tuple[int, ...], settings: dict[str, Any]) -> None:
    layout, pattern = genattn.TokenLayout.from_grid(grid), genattn.NeighborhoodPattern(window, **settings)
    inputs = [torch.randn(2, layout.seqlen, 2, 32) for _ in range(3)]
    theirs = genattn.attention(*inputs, pattern, layout, impl="natten")
    torch.testing.assert_close(theirs, genattn.attention(*inputs, pattern, layout, impl="reference"), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(theirs, genattn.attention(*inputs, genattn.NeighborhoodPattern(grid), layout), atol=1e-2)


@pytest.mark.parametrize(
    ("name", "query", "options", "reason"),
    [
        ("flashinfer", torch.zeros(1, 256, 2, 16), {}, "needs a GPU"),
        ("flashinfer", _on_gpu(dtype=torch.float32), {}, "float16 or bfloat16"),
        ("flashinfer", _on_gpu(), {"masked": True}, "key masks"),
        ("spargeattn", _on_gpu(dim=96), {}, "head dim must be 64 or 128"),
        ("nonsense", _on_gpu(), {}, "peers are"),
    ],
)
def test_reasons(monkeypatch: pytest.MonkeyPatch, name: str, query: Any, options: dict[str, bool], reason: str) -> None:
    for module in ("flashinfer", "spas_sage_attn"):
        _install(monkeypatch, module)
    monkeypatch.setattr(optional_peers, "arch_of", lambda device: "sm_80")
    assert reason in (why_not_peer(name, query, _plan(128, 64), **options) or "")


def test_reasons_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flashinfer", "spas_sage_attn"):
        _install(monkeypatch, module)
    monkeypatch.setattr(optional_peers, "arch_of", lambda device: "sm_90")
    assert why_not_peer("flashinfer", _on_gpu(), _plan()) is None
    assert why_not_peer("spargeattn", _on_gpu(), _plan(64, 128)) is None
    assert "64 x 128 here" in str(why_not_peer("spargeattn", _on_gpu(), _plan(128, 64)))
    assert "need the element rule" in str(why_not_peer("flashinfer", _on_gpu(), random_plan(1)))
    assert "one per head" in str(why_not_peer("flashinfer", _on_gpu(), random_plan(1, heads=2)))
    assert "must divide the sequence" in str(why_not_peer("flashinfer", _on_gpu(), dense_plan(250, 250, 64, 64)))
    gathered = dense_plan(256, 256, 64, 64)
    shuffled = plan_from_states(
        torch.full((1, 4, 4), 2), gathered.query_tiles.flip(0).contiguous(), gathered.key_tiles, None, 256, 256
    )
    assert visible_mask(shuffled).all()
    assert "runs of the sequence" in str(why_not_peer("flashinfer", _on_gpu(), shuffled))


def test_named_and_not_installed_is_told_and_auto_never_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional_peers.importlib.util, "find_spec", lambda name: None)
    tensor = torch.randn(1, 256, 1, 64)
    for name in ("flashinfer", "spargeattn"):
        with pytest.raises(ValueError, match=r"not installed \(pip install"):
            block_sparse_attention(tensor, tensor, tensor, _plan(), impl=name)
    layout = genattn.TokenLayout.from_grid((16, 16))
    with pytest.raises(GenAttnError, match="not installed"):
        genattn.attention(tensor, tensor, tensor, genattn.NeighborhoodPattern(4), layout, impl="natten")


def test_natten_says_why_not() -> None:
    assert "must be >= 2" in str(why_not_natten_installed())


def why_not_natten_installed() -> str | None:
    with pytest.MonkeyPatch.context() as patch:
        _install(patch, "natten")
        assert "without text" in str(
            why_not_natten(_on_gpu(tokens=9), GridWindows((2, 4), (2, 2), (1, 1), (1, 1), (False, False)))
        )
        return why_not_natten(_on_gpu(tokens=4), GridWindows((1, 4), (1, 2), (1, 1), (1, 1), (False, False)))


def test_natten_windows_refuse_what_it_lacks() -> None:
    pattern = genattn.NeighborhoodPattern(3)
    with pytest.raises(GenAttnError, match="without text"):
        natten_windows(pattern, genattn.TokenLayout.from_grid((4, 4), text_after=2))
    with pytest.raises(GenAttnError, match="serves NeighborhoodPattern"):
        natten_windows(genattn.RadialPattern(), genattn.TokenLayout.from_grid((4, 4)))
    with pytest.raises(GenAttnError, match="wrap around"):
        natten_windows(genattn.NeighborhoodPattern(3, circular=True), genattn.TokenLayout.from_grid((4, 4)))


def test_natten_has_no_log_sum_exp_to_give():
    windows = GridWindows((2, 4), (2, 2), (1, 1), (1, 1), (False, False))
    query = torch.zeros(1, 8, 2, 16)
    with pytest.raises(GenAttnError, match="impl='natten' returns no log-sum-exp; use return_lse=False or another impl"):
        planned_attention(query, query, query, windows, "natten", return_lse=True)
