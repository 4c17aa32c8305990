"""NAG under diffusers' context parallelism: two gloo processes on the CPU give what one gives."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp


def _rank(rank: int, folder: str, family: str) -> None:
    """One of two processes: dense and under a pattern against the results of one process."""
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    from genattn.guidance.nag import NAG
    from genattn.patterns.neighborhood import NeighborhoodPattern
    from genattn.pipelines.tiny.random.build import build_inputs, build_model
    from genattn.seam.handle import apply

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 1  # it is 0 without an accelerator
    torch._C._get_accelerator = lambda *a: torch.device("cpu")
    inputs = build_inputs(family)
    single, model = build_model(family), build_model(family)
    text = torch.randn(1, 14, 32, generator=torch.Generator().manual_seed(4))

    def forward(of: Any) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = of(**inputs, return_dict=False)[0]
        return out

    def nag(**settings: Any) -> NAG:
        return NAG(negative_embeds=text, scale=4.0, tau=1.3, alpha=0.6, layout="single", **settings)

    cases: list[tuple[Any, ...]] = [(nag,), (lambda: nag(heads="L1H1"),), (nag, lambda: NeighborhoodPattern(3))]
    stock = forward(single)
    wanted = []
    for case in cases:
        with apply(single, *(make() for make in case)):
            wanted.append(forward(single))
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    for case, expected in zip(cases, wanted, strict=True):
        with apply(model, *(make() for make in case)):
            torch.testing.assert_close(forward(model), expected, atol=2e-5, rtol=1e-4)
        assert (expected - stock).abs().max() > 1e-4
    torch.testing.assert_close(forward(model), stock, atol=1e-5, rtol=1e-5)
    Path(folder, f"done{rank}").write_text("ok")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan", "flux"])
def test_two_processes(family: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", minversion="0.37", reason="context parallelism came later")
    sys.path.insert(0, str(Path(__file__).parent))
    mp.spawn(_rank, args=(str(tmp_path), family), nprocs=2, join=True)
    assert sorted(p.name for p in tmp_path.glob("done*")) == ["done0", "done1"]
