"""Three processes hand round parts of several lengths; values and gradients are those of one process."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from genattn.distributed import exchange
from genattn.distributed.exchange import collect, shares, sizes_of_all, swap

TOKENS, HEADS = [5, 1, 4], [2, 2, 1]


@pytest.mark.parametrize(("total", "parts"), [(10, 3), (3, 3), (2, 3), (7, 1)])
def test_shares_are_those_of_tensor_split(total: int, parts: int) -> None:
    assert shares(total, parts) == [len(part) for part in torch.arange(total).tensor_split(parts)]


def _check(rank: int, group: Any) -> None:
    whole = torch.randn(2, sum(TOKENS), sum(HEADS), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_tokens, by_heads = whole.split(TOKENS, 1), whole.split(HEADS, 2)
    assert sizes_of_all([TOKENS[rank], 7], group, whole.device) == [[n, 7] for n in TOKENS]

    mine = by_tokens[rank].clone().requires_grad_()
    swapped = swap(mine, group, 2, HEADS, 1, TOKENS)
    assert torch.equal(swapped, by_heads[rank])
    assert torch.equal(swap(swapped, group, 1, TOKENS, 2, HEADS), by_tokens[rank])
    # every head has a weight of its own
    weight = torch.arange(1.0, 1 + sum(HEADS), dtype=torch.float64).split(HEADS)[rank]
    (swapped * weight[:, None]).sum().backward()
    wanted = torch.arange(1.0, 1 + sum(HEADS), dtype=torch.float64)[:, None].expand_as(mine)
    assert torch.equal(mine.grad, wanted)

    mine.grad = None
    joined = collect(mine, group, 1, TOKENS)
    order = [*range(rank, 3), *range(rank)]
    assert torch.equal(joined, torch.cat([by_tokens[r] for r in order], 1))
    (joined * (rank + 1.0)).sum().backward()
    assert torch.equal(mine.grad, torch.full_like(mine, 1.0 + 2.0 + 3.0))


class _Room:
    """torch.distributed's three collectives among threads: everyone lays down what they send, then takes theirs."""

    def __init__(self, size: int) -> None:
        self.table: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def _pass(self, rank: int, sent: Any) -> list[Any]:
        self.table[rank] = sent
        self.barrier.wait()
        found = list(self.table)
        self.barrier.wait()
        return found

    def get_rank(self, group: int) -> int:
        return group

    def get_world_size(self, group: int) -> int:
        return len(self.table)

    def get_backend(self, group: int) -> str:
        return "threads"

    def all_gather(self, into: list[torch.Tensor], sent: torch.Tensor, group: int) -> None:
        for place, part in zip(into, self._pass(group, sent)):
            place.copy_(part)

    def all_to_all_single(
        self, into: torch.Tensor, sent: torch.Tensor, into_sizes: list[int], sent_sizes: list[int], group: int
    ) -> None:
        torch.cat([parts[group] for parts in self._pass(group, sent.split(sent_sizes))], out=into)


def test_three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "dist", _Room(3))
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda rank: _check(rank, rank), range(3))) == [None] * 3


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    _check(rank, dist.group.WORLD)
    Path(folder, f"done{rank}").write_text("ok")
    dist.destroy_process_group()


@pytest.mark.slow
def test_three_processes(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=3, join=True)
    assert len(list(tmp_path.glob("done*"))) == 3
