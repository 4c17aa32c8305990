"""flex's BlockMask in a compiled forward: the graph keeps the mask, plugins see the call and may edit stock's answer to it."""

import copy
from typing import Any

import pytest
import torch
from older_diffusers import needs
from torch.nn.attention.flex_attention import create_block_mask

from genattn import DensePattern, GenAttnError, NeighborhoodPattern
from genattn.layouts.site import AttentionSite
from genattn.pipelines.tiny.random.build import build_inputs, build_model
from genattn.seam.handle import apply
from genattn.seam.plugin import AttentionCall, Inner, Plugin

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:flex_attention called"),
]
FAMILY, TOKENS = "anyflow-far", 128  # its tokens are filled up to flex's block


def masked(compiled: bool) -> tuple[Any, dict[str, Any]]:
    """(the model, its blocks compiled or not, inputs of the forward that trains, under a block mask)."""
    needs(FAMILY)
    model, inputs = build_model(FAMILY), build_inputs(FAMILY)
    inputs |= {"kv_cache": None, "kv_cache_flag": None, "chunk_partition": [3]}
    inputs["attention_mask"] = create_block_mask(lambda b, h, q, k: q >= k - 20, None, None, TOKENS, TOKENS, device="cpu")
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="eager")
    return model, inputs


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    mask = inputs["attention_mask"]
    with torch.no_grad():
        out = model(**copy.deepcopy({**inputs, "attention_mask": None}) | {"attention_mask": mask}, return_dict=False)
    while isinstance(out, list | tuple):
        out = out[0]
    return out  # type: ignore[no-any-return]


class Louder(Plugin):
    """Edits what stock answers."""

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        return 1.5 * inner(call)


class OtherKeys(Plugin):
    """Asks what the graph has not answered."""

    def wants(self, site: AttentionSite) -> bool:
        return site.kind == "self"

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        return inner(call.with_tensors(key=2 * call.key))


@pytest.mark.parametrize("pattern", [DensePattern(), NeighborhoodPattern(3)], ids=["dense", "sparse"])
def test_stocks_answer_and_the_reason_is_told(pattern: Any) -> None:
    told = []
    for compiled in (False, True):
        model, inputs = masked(compiled)
        stock = forward(model, inputs)
        with apply(model, pattern, dense_steps=0, dense_layers=0) as handle:
            assert torch.equal(forward(model, inputs), stock)
            report = handle.report()
        told.append((report.calls, report.dense_reasons))
        assert torch.equal(forward(model, inputs), stock)
    assert told[0] == told[1]
    assert told[0][0] == sum(told[0][1].values()) > 0


def test_an_edit_acts_as_it_does_without_compiling() -> None:
    found = []
    for compiled in (False, True):
        model, inputs = masked(compiled)
        stock = forward(model, inputs)
        with apply(model, Louder()):
            found.append(forward(model, inputs))
        assert (found[-1] - stock).abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_what_the_graph_cannot_answer_is_refused() -> None:
    model, inputs = masked(compiled=True)
    with (
        apply(model, OtherKeys()),
        pytest.raises(
            GenAttnError, match="call under a flex BlockMask, which only code inside of the compiled graph can answer"
        ),
    ):
        forward(model, inputs)
