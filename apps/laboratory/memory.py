"""Peak memory of endless video against the film's length: one process per film, random weights, the file written as it goes.

    python -m genattn.apps.laboratory.memory --frames 61 --frames 157 --frames 605

Adds rows to assets/bench/long_video_memory.csv. Queue, streaming autoencoder and encoder are those of real films.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.errors import GenAttnError

TABLE = Path("assets/bench/long_video_memory.csv")
_FILM = """
import resource, sys
import torch
from genattn.pipelines.long_video import long_video
from genattn.pipelines.tiny.random.build import build_pipeline
torch.set_num_threads(1)
pipe = build_pipeline("wan")[0]
call = dict(height=32, width=32, window=3, num_inference_steps=3, guidance_scale=1.0, progress=False)
film = long_video(pipe, "a cat", num_frames=int(sys.argv[1]), output=sys.argv[2], stream=True, **call)
print(sum(1 for _ in film), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak(frames: int) -> float:
    """Peak resident MiB of a process that makes a film of so many frames.

    Raises GenAttnError when the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-c", _FILM, str(frames), f"{folder}/film.mp4"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GenAttnError(f"a film of {frames} frames failed: {done.stderr.strip().splitlines()[-1]}")
    count, found = done.stdout.split()[-2:]
    if int(count) != frames:
        raise GenAttnError(f"the film must have {frames} frames, got {count}")
    return float(found)


def main(
    frames: Annotated[list[int] | None, typer.Option(help="Length of a film; several times for several.")] = None,
    table: Annotated[Path, typer.Option(help="The file to add to.")] = TABLE,
) -> None:
    """Measure and append the rows."""
    facts = provenance("cpu")
    rows = [{"frames": count, "peak_mb": round(peak(count), 2)} for count in frames or (61, 157, 605)]
    append_rows(table, [row | facts for row in rows])
    for row in rows:
        print(row)


if __name__ == "__main__":
    typer.run(main)
