"""How long calls take, taking turns: host clock on a CPU, events on a GPU."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

_LEAST_SECONDS = 2e-3  # of work in a round, so that what Python does between two launches is not what is measured
_LONG_SECONDS = 0.2
Call = Callable[[], Any]


def interleaved(calls: dict[str, Call], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds per round of each call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    first = {name: timed(call, device) for name, call in calls.items()}
    on_gpu = device.startswith("cuda")
    if on_gpu:
        # the first call may have compiled something; where calls are long that does not matter
        first = {name: timed(call, device) if first[name] < _LONG_SECONDS else first[name] for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, device, math.ceil(_LEAST_SECONDS / max(first[name], 1e-5)) if on_gpu else 1))
    return times


def timed(call: Call, device: str, repeats: int = 1) -> float:
    """Seconds of one call: the mean of `repeats` that follow each other."""
    if not device.startswith("cuda"):
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - started) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats
