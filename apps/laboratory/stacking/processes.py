"""A cell whose neighbour shares one model among processes: gloo on the CPU, every process measures, the worst counts."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

Rows = list[dict[str, Any]]
Measure = Callable[[str, Sequence[str]], Rows]


def measure_together(measure: Measure, neighbour: str, methods: Sequence[str], processes: int) -> list[Rows]:
    """What `measure(neighbour, methods)` gives in each of `processes` processes of one group.

    `measure` must be a function of a module and its result must fit into JSON. An error in one process is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_one_of_them, args=(measure, neighbour, methods, processes, folder), nprocs=processes, join=True)
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(processes)]


def _one_of_them(rank: int, measure: Measure, neighbour: str, methods: Sequence[str], processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    # diffusers asks which accelerator there is, and a CPU is none
    torch.accelerator.device_count = lambda: 1
    torch._C._get_accelerator = lambda *_: torch.device("cpu")
    try:
        Path(folder, str(rank)).write_text(json.dumps(measure(neighbour, methods)))
    finally:
        dist.destroy_process_group()
