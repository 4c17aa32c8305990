"""The table of longer fine-tuning for docs/finetuning.md, from assets/bench/finetune.csv, beside the paper's."""

import csv
from collections.abc import Sequence
from pathlib import Path

from genattn.apps.pages.tables import Row, markdown_table
from genattn.errors import GenAttnError

ARMS = ("untuned", "dense LoRA", "radial LoRA")
SHOWN = (("accuracy", 2), ("colour", 2), ("shape", 2), ("motion", 2), ("consistency", 3), ("drift", 2))
# Radial Attention, arXiv 2506.19852, longer videos with LoRA of rank 128: VisionReward; training hours on 8 H100; seconds a
# video; VBench's subject consistency
PAPER = (
    ("Wan2.1-14B, 2x", ("untuned", ".109", "-", "5735", ".946"), ("dense LoRA", ".150", "28.0", "5735", ".966"),
     ("radial LoRA", ".145", "14.5", "2847", ".981")),
    ("HunyuanVideo, 2x", ("untuned", ".122", "-", "797", ".953"), ("dense LoRA", ".124", "45.0", "797", ".955"),
     ("radial LoRA", ".126", "16.2", "339", ".968")),
    ("HunyuanVideo, 4x", ("untuned", ".054", "-", "2895", ".988"), ("dense LoRA", ".133", "93.6", "2895", ".977"),
     ("radial LoRA", ".134", "21.4", "781", ".973")),
)  # fmt: skip


def finetune_table(file: Path) -> str:
    """The newest study of each length in `file` as Markdown, then the paper's.

    Raises:
        GenAttnError: if there is none, or one is not whole.
    """
    if not file.is_file():
        raise GenAttnError(f"{file} is not there; run: python -m genattn.pipelines.tiny.studies.finetune --table {file}")
    with file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    studies = [_newest(rows, factor) for factor in dict.fromkeys(row["factor"] for row in rows)]
    head = ["tiny-wan, length", "arm", *(name for name, _ in SHOWN), "s per training step", "s per clip"]
    first = studies[0][0]
    steps = ", ".join(f"{study[-1]['train_steps']} at {study[0]['factor']}x" for study in studies)
    note = (
        f"{first['clips']} captions that training never saw, {first['sampling_steps']} denoising steps, rank {first['rank']}, "
        f"batch {first['batch']}, training steps: {steps}; same clips, same noise; mean and bootstrap interval of 95 %. "
        f"Accuracy is the share of colour, shape and motion that the oracle finds as asked; drift is of brightness per 100 "
        f"frames. Processor seconds, {first['device']}, torch {first['torch']}, diffusers {first['diffusers']}, "
        f"{first['date']}, commit {first['commit']}."
    )
    body = markdown_table(head, [_line(row) for study in studies for row in study])
    paper_head = ["the paper", "arm", "VisionReward", "training h", "s per video", "subject consistency"]
    paper = markdown_table(paper_head, [[name, *arm] for name, *arms in PAPER for arm in arms])
    return f"{body}\n\n<sub>{note}</sub>\n\n{paper}"


def _newest(rows: Sequence[Row], factor: str) -> list[Row]:
    """The last run's row of each arm at one length."""
    same = [row for row in rows if row["factor"] == factor]
    found = {row["arm"]: row for row in same if row["run"] == same[-1]["run"]}
    missing = [arm for arm in ARMS if arm not in found]
    if missing:
        raise GenAttnError(f"the study at {factor}x must have {', '.join(ARMS)}, it lacks {', '.join(missing)}; run it again")
    return [found[arm] for arm in ARMS]


def _line(row: Row) -> list[str]:
    cells = [
        f"{float(row[name]):.{digits}f} [{float(row[f'{name}_low']):.{digits}f}, {float(row[f'{name}_high']):.{digits}f}]"
        for name, digits in SHOWN
    ]
    step = f"{float(row['train_step_seconds']):.2f}" if row["train_step_seconds"] else "-"
    return [f"{row['factor']}x, {row['frames']} frames", row["arm"], *cells, step, f"{float(row['sample_seconds']):.2f}"]
