"""Diffusers' own context parallelism: two gloo processes on the CPU give what one gives, with the pattern on."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from genattn import GenAttnError, TokenLayout
from genattn.geometry.token_layout import Segment
from genattn.seam.context_parallel import enable_ulysses, gathered, why_not_enable, why_not_ulysses


def test_gathered_order() -> None:
    assert gathered(TokenLayout.from_grid((3, 4, 2)), 2) == TokenLayout.from_grid((3, 4, 2))
    joint = gathered(TokenLayout.from_grid((4, 6), text_before=10), 2)
    assert joint is not None
    assert joint.segments == (
        Segment("text", (5,)),
        Segment("grid", (4, 6), 0, 12),
        Segment("text", (5,)),
        Segment("grid", (4, 6), 12, 24),
    )
    assert joint.grid_positions.tolist() == [*range(5, 17), *range(22, 34)]
    with_reference = TokenLayout((Segment("text", (4,)), Segment("grid", (2, 6)), Segment("reference", (2, 2))))
    cut = gathered(with_reference, 2)
    assert cut is not None
    assert [(s.kind, s.length) for s in cut.segments] == [
        *[("text", 2), ("grid", 8)],
        *[("text", 2), ("grid", 4), ("reference", 4)],
    ]
    assert gathered(TokenLayout.from_grid((4, 6), text_before=9), 2) is None


def test_what_is_refused() -> None:
    config = SimpleNamespace(ring_degree=2, ulysses_degree=1, ulysses_anything=False)
    assert "LSE" in why_not_ulysses(SimpleNamespace(context_parallel_config=config))
    config = SimpleNamespace(ring_degree=1, ulysses_degree=2, ulysses_anything=True)
    assert "unevenly" in why_not_ulysses(SimpleNamespace(context_parallel_config=config))
    assert "not diffusers'" in why_not_ulysses(object())


def test_sharing_a_clip_is_refused_with_the_reason() -> None:
    from genattn.pipelines.tiny.random.build import build_model

    model = build_model("wan")
    enable_ulysses(model, 1, 7)  # nothing to do
    with pytest.raises(GenAttnError, match="context_parallel=2 cannot be served"):
        enable_ulysses(model, 2, 48)
    if torch.cuda.device_count() < 2:
        assert "2 CUDA GPUs, this machine has" in why_not_enable(model, 2, 48)
    assert "heads and 49 tokens" in why_not_enable(model, 2, 49)
    assert "no context-parallel plan" in why_not_enable(build_model("animatediff"), 2, 48)


def _gradients(model: Any, inputs: dict[str, Any], world: int) -> dict[str, torch.Tensor]:
    """Of the query and output projections; each rank holds the part of its own tokens."""
    import torch.distributed as dist

    model.zero_grad()
    model(**inputs, return_dict=False)[0].square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and ("to_q." in n or "to_out.0." in n)}
    assert found
    if world > 1:
        for gradient in found.values():
            dist.all_reduce(gradient)
    return {name: gradient.clone() for name, gradient in found.items()}


def _rank(rank: int, folder: str, family: str) -> None:
    """One of two processes: dense and sparse under Ulysses against the results of one process."""
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    from genattn import DensePattern, NeighborhoodPattern, RadialPattern
    from genattn.guidance.softpag.softpag import SoftPAG
    from genattn.patterns.combine import PerHead
    from genattn.pipelines.tiny.random.build import build_inputs, build_model
    from genattn.seam.handle import apply

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 1  # it is 0 without an accelerator
    torch._C._get_accelerator = lambda *a: torch.device("cpu")
    inputs = build_inputs(family)
    single, model = build_model(family), build_model(family)

    def forward(of: Any) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = of(**inputs, return_dict=False)[0]
        return out

    settings = {"dense_steps": 0, "dense_layers": 0}
    # over one frame Radial shows everything, so the joint order of an image's tokens needs another pattern
    pattern = RadialPattern() if family == "wan" else NeighborhoodPattern(3)
    with apply(single, pattern, **settings):
        sparse = forward(single)
        wanted = _gradients(single, inputs, 1)
    dense = forward(single)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    stock = forward(model)
    torch.testing.assert_close(stock, dense, atol=1e-5, rtol=1e-5)
    with apply(model, DensePattern()):
        assert torch.equal(forward(model), stock)
    assert not torch.allclose(sparse, dense, atol=1e-4)
    with apply(model, pattern, **settings) as handle:
        torch.testing.assert_close(forward(model), sparse, atol=1e-5, rtol=1e-5)
        report = handle.report()
        assert report.sparse_calls == report.calls > 0, report.dense_reasons
        for name, gradient in _gradients(model, inputs, 2).items():
            torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)
    assert torch.equal(forward(model), stock)
    # what differs by head: each rank must take its own heads' part
    for plugin in (PerHead((pattern, DensePattern()), (0, 1)), PerHead((pattern, DensePattern()), (1, 0))):
        with apply(single, plugin, **settings):
            wanted_here = forward(single)
        with apply(model, plugin, **settings) as handle:
            torch.testing.assert_close(forward(model), wanted_here, atol=1e-5, rtol=1e-5)
            assert handle.report().sparse_calls == handle.report().calls > 0
        assert not torch.allclose(wanted_here, dense, atol=1e-4)
    for head in ("L1H0", "L1H1"):
        with apply(single, SoftPAG(head, u=1.0, scale=2.0, layout="single")):
            wanted_here = forward(single)
        with apply(model, SoftPAG(head, u=1.0, scale=2.0, layout="single")):
            torch.testing.assert_close(forward(model), wanted_here, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(wanted_here, dense, atol=1e-4)
    Path(folder, f"done{rank}").write_text("ok")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan", "flux"])
def test_two_processes(family: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", minversion="0.37", reason="context parallelism came later")
    sys.path.insert(0, str(Path(__file__).parent))
    mp.spawn(_rank, args=(str(tmp_path), family), nprocs=2, join=True)
    assert sorted(p.name for p in tmp_path.glob("done*")) == ["done0", "done1"]
