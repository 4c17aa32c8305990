"""Memory and time of one attention of LTX-2.5's decoder, stock's Flex against ours.

    python -m genattn.apps.laboratory.decoder

Each route runs in a process of its own, so that one's memory does not hide in the other's. Rows go to
assets/bench/neighborhood_decoder.csv.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from genattn.apps.bench.attention import peak_memory
from genattn.apps.sampling.measured_rows import append_rows, provenance

TABLE = Path("assets/bench/neighborhood_decoder.csv")
CASES = (((4, 34, 60), (3, 7, 7)), ((11, 24, 32), (11, 11, 11)), ((19, 34, 60), (3, 7, 7)))
MOST_FLEX_TOKENS = 8200


def measure(route: str, grid: tuple[int, int, int], kernel: tuple[int, int, int], heads: int = 4) -> dict[str, Any]:
    """Seconds and peak bytes of one attention module, head dim 64; route "flex" is stock's, else an impl of ours."""
    from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoVaeNeighborhoodAttention

    from genattn.decoding.neighborhood_decoder import NeighborhoodProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    attention = LTX2VideoVaeNeighborhoodAttention(64 * heads, kernel).to(device, dtype)
    hidden = torch.randn(1, *grid, 64 * heads, device=device, dtype=dtype)
    if route != "flex":
        attention.set_processor(NeighborhoodProcessor(route))
    with torch.no_grad():
        attention(hidden[:, : kernel[0], : kernel[1], : kernel[2]])  # what is loaded once is nobody's memory
        projections = peak_memory(lambda: attention.project_qkv(hidden)[0], device) or 0
        started = time.perf_counter()
        peak = peak_memory(lambda: attention(hidden, attention.build_block_mask(hidden)), device) or 0
        seconds = time.perf_counter() - started
    tokens = hidden[0, ..., 0].numel()
    shape = {"grid": "x".join(map(str, grid)), "kernel": "x".join(map(str, kernel)), "tokens": tokens, "heads": heads}
    return {
        **shape,
        **{"route": route, "seconds": seconds, "peak_bytes": peak, "projection_bytes": projections},
        "mask_bytes": tokens**2 if route == "flex" else 0,
    }


def main() -> int:
    """Entry point."""
    if len(sys.argv) > 1:
        route, grid, kernel = json.loads(sys.argv[1])
        print(json.dumps(measure(route, tuple(grid), tuple(kernel))))
        return 0
    facts = provenance("cuda" if torch.cuda.is_available() else "cpu")
    for grid, kernel in CASES:
        for route in ("flex", "halo"):
            if route == "flex" and grid[0] * grid[1] * grid[2] > MOST_FLEX_TOKENS:
                continue
            call = [sys.executable, "-m", "genattn.apps.laboratory.decoder", json.dumps([route, grid, kernel])]
            row = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            append_rows(TABLE, [{**row, **facts}])
            print(
                f"{row['grid']:10} {row['kernel']:9} {route:5} {row['seconds']:.2f} s, peak {row['peak_bytes'] / 2**20:.0f} MiB"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
