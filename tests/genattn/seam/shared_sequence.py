"""What each process of a gloo group does: a tiny model under context parallelism against the same model on one process."""

from pathlib import Path
from typing import Any

import diffusers.hooks.context_parallel
import torch
import torch.distributed as dist

Case = tuple[str, dict[str, Any]]
CASES: dict[int, list[Case]] = {
    2: [
        ("wan", {"ulysses_degree": 2}),
        ("flux", {"ulysses_degree": 2}),
        ("wan", {"ulysses_degree": 2, "ulysses_anything": True}),
        ("flux", {"ulysses_degree": 2, "ulysses_anything": True}),
        ("minimax-h3", {"ulysses_degree": 2, "ulysses_anything": True}),
        ("wan", {"ring_degree": 2}),
        ("flux", {"ring_degree": 2}),
        ("wan", {"ring_degree": 2, "ring_anything": True}),
        ("flux", {"ring_degree": 2, "ring_anything": True}),
    ],
    3: [
        ("wan", {"ulysses_degree": 3, "ulysses_anything": True}),
        ("flux", {"ulysses_degree": 3, "ulysses_anything": True}),
        ("wan", {"ring_degree": 3, "ring_anything": True}),
        ("flux", {"ring_degree": 3, "ring_anything": True}),
        ("minimax-h3", {"ring_degree": 3, "ring_anything": True}),
    ],
    4: [("wan", {"ulysses_degree": 2, "ring_degree": 2}), ("flux", {"ulysses_degree": 2, "ring_degree": 2})],
}
_UNEVEN = {"wan": (5, 7, 5), "flux": (7, 11)}
_CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def rank_of(rank: int, world: int, folder: str) -> None:
    """All cases of this number of processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.accelerator.device_count = lambda: 1  # it is 0 without an accelerator
    torch._C._get_accelerator = lambda *a: torch.device("cpu")
    diffusers.hooks.context_parallel._all_gather_anything = _gather  # NCCL takes parts of several lengths, gloo does not
    for family, split in CASES[world]:
        _check(family, split)
        if rank == 0:
            print(family, split, "as one process", flush=True)
    Path(folder, f"done{rank}").write_text("ok")
    dist.destroy_process_group()


def _gather(tensor: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    from genattn.distributed.exchange import collect, sizes_of_all

    sizes = [sizes[0] for sizes in sizes_of_all([tensor.shape[dim]], group, tensor.device)]
    return collect(tensor, group, dim, sizes).roll(sum(sizes[: dist.get_rank(group)]), dim)


def _check(family: str, split: dict[str, Any]) -> None:
    from diffusers import ContextParallelConfig

    from genattn import NeighborhoodPattern, RadialPattern
    from genattn.guidance.softpag.softpag import SoftPAG
    from genattn.patterns.combine import PerHead
    from genattn.patterns.dense import DensePattern
    from genattn.pipelines.tiny.random.build import build_inputs, build_model
    from genattn.seam.handle import apply

    uneven = any(name.endswith("anything") for name in split)
    heads = {"num_attention_heads": 5 if uneven else 4} if family in _UNEVEN else {}
    inputs = build_inputs(family, grid=_UNEVEN[family] if uneven and family in _UNEVEN else None)
    if family == "flux" and len(split) == 2:  # ten tokens of text do not divide among four processes
        inputs |= {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :8], "txt_ids": inputs["txt_ids"][:8]}
    single, model = (build_model(family, **heads) for _ in range(2))
    dense = forward(single, inputs)
    model.enable_parallelism(config=ContextParallelConfig(**split))
    for name, module in model.named_modules():
        if "refiner" in name and hasattr(module, "processor"):  # text, before it is split: stock needs LSE or has no gradient
            module.processor._parallel_config = None
    # over one frame Radial shows everything, so an image's tokens need another pattern
    static = NeighborhoodPattern(3) if family == "flux" else RadialPattern(tail=None)
    settings = {"dense_steps": 0, "dense_layers": 0}
    per_head = PerHead((static, DensePattern()), tuple(head % 2 for head in range(heads.get("num_attention_heads", 2))))
    for plugin in (static, NeighborhoodPattern(3, tail="mean"), *([per_head] if heads else [])):
        with apply(single, plugin, **settings):
            wanted, slopes = forward(single, inputs), gradients(single, inputs)
        assert not torch.allclose(wanted, dense, atol=1e-4), (family, split, plugin)
        with apply(model, plugin, **settings) as handle:
            torch.testing.assert_close(forward(model, inputs), wanted, **_CLOSE)
            report = handle.report()
            assert report.sparse_calls == report.calls > 0, report.dense_reasons
            for name, gradient in summed(gradients(model, inputs)).items():
                torch.testing.assert_close(gradient, slopes[name], atol=1e-5, rtol=1e-4, msg=f"{family} {split} {name}")
    # its first layer dense, by the user's own backend
    with apply(single, static, dense_steps=0, dense_layers=1):
        wanted = forward(single, inputs)
    with apply(model, static, dense_steps=0, dense_layers=1):
        torch.testing.assert_close(forward(model, inputs), wanted, **_CLOSE)
    # torch's own attention tells no log-sum-exp, without which stock code has no ring for the layers that guidance leaves alone
    under = [static] if "ring_degree" in split else []
    for target in ("identity", "identity_image", "image_to_image", "uniform"):
        for head in ("L1H0", "L1H1"):
            guided = [SoftPAG(head, u=1.0, scale=2.0, layout="single", target=target) for _ in range(2)]
            with apply(single, *under, guided[0], **(settings if under else {})):
                wanted = forward(single, inputs)
            with apply(model, *under, guided[1], **(settings if under else {})):
                torch.testing.assert_close(forward(model, inputs), wanted, **_CLOSE)
            assert not torch.allclose(wanted, dense, atol=1e-4)

    if family == "wan":
        _check_compiled(single, model, static, inputs)


def _check_compiled(single: Any, model: Any, static: Any, inputs: dict[str, Any]) -> None:
    """Blocks compiled one by one: what is sent between processes is sent inside of our operator."""
    from genattn.seam.handle import apply

    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager")
    with apply(single, static, dense_steps=0, dense_layers=0):
        wanted = forward(single, inputs)
    with apply(model, static, dense_steps=0, dense_layers=0) as handle:
        torch.testing.assert_close(forward(model, inputs), wanted, **_CLOSE)
        report = handle.report()
        assert report.sparse_calls == report.calls > 0, report.dense_reasons


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of the query and output projections."""
    model.zero_grad()
    model(**inputs, return_dict=False)[0].square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and ("to_q." in n or "to_out." in n)}
    assert found
    return {name: gradient.clone() for name, gradient in found.items()}


def summed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each process holds the part of its own tokens."""
    for gradient in found.values():
        dist.all_reduce(gradient)
    return found
