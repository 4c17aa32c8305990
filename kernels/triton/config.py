"""Tile sizes and launch settings per architecture, head dim and type, from `configs.json` and what a measurement added to it.

A measured table, written by an autotuning run, lies in the cache folder as `tune-<chip>.json` in the same form and wins. It is
named by the chip's own capability: chips that share a shipped row need not share what was measured on one of them.
"""

import json
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

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
    return {8: "sm_80" if minor == 0 else "sm_86", 9: "sm_90", 10: "sm_100"}.get(major, "sm_86" if major < 12 else "sm_120")


def chip_of(device: torch.device) -> str:
    """Name of the chip itself, under which measured settings are kept: "sm_89", "gfx942", "cpu"."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tile_sizes(device: torch.device, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """(block_q, block_k) that suit a device; pass them to `Pattern.plan`."""
    arch = arch_of(device)
    if arch == "cpu":
        return 128, 128
    block_q, block_k = settings_of(arch)[table_row(head_dim, dtype)]["tile"]
    return block_q, block_k


def most_lanes(arch: str, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """(block_q, block_k) of the largest tiles that a chip can launch; rows without "most" take any up to 128."""
    if arch == "cpu":
        return 1024, 1024
    most_q, most_k = settings_of(arch)[table_row(head_dim, dtype)].get("most", (128, 128))
    return most_q, most_k


def launch_of(
    kernel: str,
    arch: str,
    head_dim: int,
    block_q: int,
    block_k: int,
    dtype: torch.dtype = torch.bfloat16,
    masked: bool = False,
) -> Launch:
    """Settings for `kernel` ("forward", "dq", "dkv" or "tail dkv") on a plan with tiles of block_q x block_k tokens.

    What is walked is taken in steps of as many lanes as in the tuned tile, however large the plan's tiles are; with fewer lanes
    to hold than tuned for, fewer warps. masked: a mask per sample, packed bits or a tail take registers; steps half as long, or
    as the row says for "forward masked", also where "forward" was measured on this machine: that was without a mask. "tail dkv"
    is as "dkv" where the row has none of its own.
    """
    row = settings_of("sm_90" if arch == "cpu" else arch)[table_row(head_dim, dtype)]
    warps, stages, split, fine, *rest = row.get(kernel) or row[kernel.removeprefix("tail ")]
    if masked and f"{kernel} masked" in row:
        warps, stages, split, fine = row[f"{kernel} masked"]
        masked = False
    walked, held = (0, 1) if kernel.endswith("dkv") else (1, 0)
    block, tuned = (block_q, block_k)[walked], row["tile"][walked]
    # a step of a matrix product needs 16 lanes
    steps = (max(1, min(block // 16, n * block // tuned)) for n in (split << masked, fine << masked))
    lanes = (block_q, block_k)[held]
    return Launch(warps if lanes >= row["tile"][held] else min(warps, max(4, lanes // 16)), stages, *steps, *rest)


def table_row(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """Row of the table that serves a head dim and type."""
    row = "64" if head_dim <= 64 else "128" if head_dim <= 128 else "256"
    return f"{row} float32" if dtype == torch.float32 else row


@lru_cache(maxsize=16)
def settings_of(arch: str) -> dict[str, dict[str, list[int]]]:
    """The table of an architecture, {row: {"tile" or kernel: numbers}}, with what was measured on this machine."""
    table: dict[str, dict[str, list[int]]] = shipped_settings(arch)
    for row, entries in measured_settings(arch).items():
        table[row] = {**table[row], **entries}
    return table


def measured_settings(arch: str) -> dict[str, dict[str, list[int]]]:
    """What was measured on this machine, {row: {kernel: numbers}}; nothing, with a warning, where the file is damaged."""
    path = measured_table(arch)
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wrong = None if _is_table(found, shipped_settings(arch)) else "it holds no settings of these kernels"
    except (OSError, ValueError, RecursionError) as error:
        wrong = str(error)
    if wrong is None:
        return found  # type: ignore[no-any-return]
    told = f"{path} cannot be used ({wrong}), and the shipped settings are; run `genattn bench autotune`, or delete it"
    warnings.warn(told, stacklevel=2)
    return {}


def _is_table(found: Any, shipped: Any) -> bool:
    if not isinstance(found, dict) or not found.keys() <= shipped.keys():
        return False
    return all(
        isinstance(entries, dict)
        and entries.keys() <= {"forward", "dq", "dkv"}
        and all(_is_setting(numbers, 5 if kernel == "forward" else 4) for kernel, numbers in entries.items())
        for entries in found.values()
    )


def _is_setting(numbers: Any, most: int) -> bool:
    """Warps and steps are powers of two; stages and programs small counts."""
    if not isinstance(numbers, list) or not 4 <= len(numbers) <= most:
        return False
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= 64 for n in numbers):
        return False
    return all(n in (1, 2, 4, 8, 16, 32) for n in (numbers[0], *numbers[2:4])) and 1 <= numbers[1] <= 16


def shipped_settings(arch: str) -> Any:
    """The table of an architecture as shipped."""
    return json.loads(Path(__file__).with_name("configs.json").read_text())[arch]


def measured_table(arch: str) -> Path:
    """Where the settings measured on this machine's chip are kept; `arch` names them where no GPU is."""
    chip = chip_of(torch.device("cuda")) if torch.cuda.is_available() else arch
    return cache_folder() / f"tune-{chip}.json"
