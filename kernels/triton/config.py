"""Tile sizes and launch settings per architecture and head dim, from `configs.json` and what a measurement added to it.

A measured table, written by an autotuning run, lies in the cache folder as `tune-<arch>.json` in the same form and wins.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from genattn.kernels.cpu.native_build import cache_folder


@dataclass(frozen=True)
class Launch:
    """Settings of one kernel: warps, pipeline stages, and in how many steps it takes a full and a partial tile.

    persistent: programs per processor, each of which serves many tiles; 0: one program per tile (forward only).
    """

    warps: int
    stages: int
    split: int
    fine: int
    persistent: int = 0


def arch_of(device: torch.device) -> str:
    """Name of the settings that serve a device: "sm_80" ... "hip", or "cpu"."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    # consumer chips have 99 KiB of shared memory a block, whatever their generation
    return {8: "sm_80" if minor == 0 else "sm_86", 9: "sm_90", 10: "sm_100"}.get(major, "sm_86")


def tile_sizes(device: torch.device, head_dim: int) -> tuple[int, int]:
    """(block_q, block_k) that suit a device; pass them to `Pattern.plan`."""
    arch = arch_of(device)
    if arch == "cpu":
        return 128, 128
    block_q, block_k = settings_of(arch)[table_row(head_dim)]["tile"]
    return block_q, block_k


def launch_of(kernel: str, arch: str, head_dim: int, block: int) -> Launch:
    """Settings for `kernel` ("forward", "dq" or "dkv") walking tiles of `block` lanes."""
    warps, stages, split, fine, *rest = settings_of("sm_90" if arch == "cpu" else arch)[table_row(head_dim)][kernel]
    # a step of a matrix product needs 16 lanes
    return Launch(warps, stages, *(max(1, min(n, block // 16)) for n in (split, fine)), *rest)


def table_row(head_dim: int) -> str:
    """Row of the table that serves a head dim."""
    return "64" if head_dim <= 64 else "128" if head_dim <= 128 else "256"


@lru_cache(maxsize=16)
def settings_of(arch: str) -> dict[str, dict[str, list[int]]]:
    """The table of an architecture, {row: {"tile" or kernel: numbers}}, with what was measured on this machine."""
    table: dict[str, dict[str, list[int]]] = json.loads(Path(__file__).with_name("configs.json").read_text())[arch]
    measured = measured_table(arch)
    if measured.is_file():
        for row, entries in json.loads(measured.read_text()).items():
            table[row] = {**table[row], **entries}
    return table


def measured_table(arch: str) -> Path:
    """Where the settings measured on this machine are kept."""
    return cache_folder() / f"tune-{arch}.json"
