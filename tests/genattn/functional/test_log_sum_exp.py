"""The log-sum-exp that is told is that of the scores, and merging by it is attention over all keys."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from genattn.functional import log_sum_exp
from genattn.functional.log_sum_exp import attention_with_lse, dense_with_lse, is_native, merged


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float | None):  # type: ignore
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2).double() for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).nan_to_num(0.0), v), scores.logsumexp(-1).transpose(1, 2)


MASKS = {
    "none": lambda: None,
    "keys": lambda: torch.rand(2, 9) > 0.4,
    "broadcast": lambda: torch.rand(2, 1, 1, 9) > 0.4,
    "rows": lambda: torch.rand(2, 1, 7, 9) > 0.4,
    "additive": lambda: torch.randn(2, 4, 7, 9, dtype=torch.float64),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("kind", MASKS)
def test_tells_the_log_sum_exp(
    kind: str, scale: float | None, heads: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr("genattn.functional.log_sum_exp._fused", lambda *_: None)
        monkeypatch.setattr("genattn.functional.log_sum_exp._ROWS", 2 * 4 * 9 * 3)
    q, k, v = (torch.randn(2, n, h, 8, dtype=torch.float64) for n, h in ((7, 4), (9, heads), (9, heads)))
    mask = MASKS[kind]()
    whole = mask if mask is None or mask.ndim == 4 else mask[:, None, None, :]
    bias = whole
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros(whole.shape, dtype=torch.float64).masked_fill(~whole, -torch.inf)
    out, lse = attention_with_lse(q, k, v, mask, scale)
    expected, sums = explicit(q, k, v, bias, scale)
    seen = sums.isfinite()
    torch.testing.assert_close(lse[seen], sums[seen])
    torch.testing.assert_close(out[seen], expected[seen])
    assert (dense_with_lse(q, k, v, mask, scale) is not None) == fused


def test_merging_is_attention_over_all_keys() -> None:
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.float64) for n in (7, 11, 11))
    parts = [attention_with_lse(q, k[:, part], v[:, part], None, None) for part in (slice(0, 4), slice(4, 11))]
    torch.testing.assert_close(merged(*parts), explicit(q, k, v, None, None)[0])
    nothing = (torch.full_like(parts[0][0], torch.nan), torch.full_like(parts[0][1], -torch.inf))
    torch.testing.assert_close(merged(nothing, parts[1]), parts[1][0])
    assert torch.equal(merged(nothing, nothing), torch.zeros_like(q))


def test_no_gradient_is_lost() -> None:
    q = torch.randn(1, 3, 1, 8, requires_grad=True)
    assert dense_with_lse(q, q, q, None, None) is None
    attention_with_lse(q, q, q, None, None)[0].sum().backward()
    assert q.grad is not None


def test_only_pytorchs_own_backend_counts() -> None:
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    assert is_native(dispatch.dispatch_attention_fn, None)
    assert is_native(dispatch.dispatch_attention_fn, "native")
    assert not is_native(dispatch.dispatch_attention_fn, "flash")
    assert not is_native(lambda: None, None)


@pytest.mark.parametrize("learning", [False, True])
def test_autocast_casts_as_stock_does(learning: bool) -> None:
    query, key = (torch.randn(1, 20, 2, 8, requires_grad=learning) for _ in range(2))
    value = torch.randn(1, 20, 2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention_with_lse(query, key, value, None, None)
        stock = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    assert out.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(out, stock, atol=2e-2, rtol=0)
    want = attention_with_lse(query.bfloat16(), key.bfloat16(), value, None, None)
    torch.testing.assert_close(lse, want[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "dim", "capability", "expected"),
    [
        (torch.float16, 64, 8, "flash"),
        (torch.bfloat16, 256, 9, "flash"),
        (torch.float16, 8, 8, "flash"),
        (torch.float16, 264, 9, "efficient"),  # wider than flash takes
        (torch.float16, 100, 8, "efficient"),  # flash wants whole groups of eight channels
        (torch.float32, 64, 9, "efficient"),
        (torch.float16, 64, 7, None),  # torch's flash needs Ampere
    ],
)
def test_a_gpu_takes_the_operator_that_serves_its_inputs(dtype, dim, capability, expected, monkeypatch):
    """Which of torch's operators is asked on CUDA; what they answer cannot run here."""

    def operator(name):
        return lambda q, *_, **__: (name, torch.zeros(1, 1, q.shape[2] + 7))  # efficient pads its sums

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", operator("flash"), raising=False)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", operator("efficient"), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    heads_first = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype, shape=(1, 1, 5, dim))
    found = log_sum_exp._fused(heads_first, heads_first, heads_first, None, None)
    assert (None if found is None else found[0]) == expected
    if expected == "efficient":
        assert found[1].shape == (1, 1, 5)
    assert log_sum_exp._fused(heads_first, heads_first, heads_first, torch.zeros(1), None) is None, "a mask"
