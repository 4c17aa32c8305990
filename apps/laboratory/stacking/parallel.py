"""Context parallelism, which takes processes: two of gloo's on the CPU give what one gives."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from genattn.apps.laboratory.stacking.cells import Cell
from genattn.apps.laboratory.stacking.neighbours import Neighbour
from genattn.guidance.nag import NAG
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.patterns.dense import DensePattern
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model
from genattn.seam.handle import apply

PARALLEL = {name: Neighbour(name, "execution", close=1e-5) for name in ("context parallel, Ulysses", "context parallel, ring")}
_WORLD = 2
_NOW = {"dense_steps": 0, "dense_layers": 0}


def measure_parallel(neighbour: Neighbour) -> list[Cell]:
    """The four cells of one kind of split: a forward of a tiny Wan on two processes against the same on one."""
    kind = neighbour.name.rsplit(" ", 1)[1].lower()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, args=(kind, folder), nprocs=_WORLD, join=True)
        errors = torch.load(Path(folder, "errors.pt"), weights_only=True)
    cells = []
    for method, (error, acts) in errors.items():
        good = error <= neighbour.close and acts
        result = "equal" if error == 0 and acts else "within" if good else "differs"
        cells.append(Cell(neighbour.name, method, result, error, "" if acts else "the method has no effect beside it"))
    return cells


def _rank(rank: int, kind: str, folder: str) -> None:
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=_WORLD)
    torch.accelerator.device_count = lambda: 1  # it is 0 without an accelerator
    torch._C._get_accelerator = lambda *a: torch.device("cpu")
    heads = {"num_attention_heads": 4}
    single: Any = build_model("wan", **heads)
    model: Any = build_model("wan", **heads)
    inputs = build_inputs("wan")
    model.enable_parallelism(config=ContextParallelConfig(**{f"{kind}_degree": _WORLD}))
    errors: dict[str, tuple[float, bool]] = {}
    stock = _forward(single, inputs)
    for name, plugins, settings in _methods():
        found = []
        for one, plugin in zip((single, model), plugins):
            with apply(one, plugin, **settings):
                found.append(_forward(one, inputs))
        errors[name] = _error(found[1], found[0]), name == "dense pattern" or _error(found[0], stock) > 1e-4
    if rank == 0:
        torch.save(errors, Path(folder, "errors.pt"))
    dist.destroy_process_group()


def _methods() -> list[tuple[str, list[Any], dict[str, Any]]]:
    """By the names of `cells.METHODS`, two of each: a plugin belongs to one model."""
    embeds = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(5))
    return [
        ("dense pattern", [DensePattern() for _ in range(2)], {}),
        ("pattern", [NeighborhoodPattern((2, 2, 2)) for _ in range(2)], _NOW),
        ("SoftPAG", [SoftPAG("L1H0", u=1.0, scale=2.0, layout="single") for _ in range(2)], {}),
        ("NAG", [NAG(negative_embeds=embeds, layout="single", alpha=0.5, scale=4.0) for _ in range(2)], {}),
    ]


def _forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())
