"""S2-Guidance and TAG on `tiny-sd3`, beside hunted heads: what each is worth at its cost, judged by the oracle.

Same captions, same noise, no classifier-free guidance. Hunted heads and S2-Guidance cost one further pass each, TAG none. The
score is the share of what a caption asks for that is there; differences to the unguided and to hunted heads are paired by
caption, with 95 % bootstrap intervals.

    python -m genattn.pipelines.tiny.studies.small_guidance --model assets/tiny-sd3 --heads assets/heads/tiny-sd3.json \\
        --csv assets/bench/small_guidance.csv
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genattn.guidance.headhunter.search import bootstrap_interval
from genattn.guidance.s2 import S2Guidance
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.guidance.tag import TAG
from genattn.pipelines.tiny.evaluate import append_rows, provenance
from genattn.pipelines.tiny.studies.sd3 import StudySettings, on_one_core, short_study
from genattn.seam.plugin import Plugin


def conditions(heads: Path) -> Mapping[str, Plugin | None]:
    """What is compared; the S2 scales span the paper's small ones up to the scale of the hunted heads."""
    return {
        "unguided": None,
        "hunted heads": SoftPAG.from_head_set(heads),
        "S2 w 0.25": S2Guidance(scale=0.25),
        "S2 w 1": S2Guidance(scale=1.0),
        "S2 w 3": S2Guidance(scale=3.0),
        "TAG 1.05": TAG(1.05),
        "TAG 1.15": TAG(1.15),
        "TAG 1.25": TAG(1.25),
    }


def rows_of(table: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row per condition: mean, gain over the unguided, and over hunted heads, with intervals.

    Args:
        table: {condition: scores [N]}, with "unguided" and "hunted heads".
    """
    rows = []
    for name, scores in table.items():
        row: dict[str, Any] = {"condition": name, "captions": len(scores), "score": round(float(scores.mean()), 4)}
        for label, base in (("unguided", "unguided"), ("hunted", "hunted heads")):
            gain = scores - table[base]
            low, high = bootstrap_interval(gain)
            row |= {
                f"minus_{label}": round(float(gain.mean()), 4),
                f"{label}_low": round(low, 4),
                f"{label}_high": round(high, 4),
            }
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = short_study(__doc__)
    parser.add_argument("--heads", type=Path, required=True, help="hunted head set")
    parser.add_argument("--count", type=int, default=200, help="captions")
    given = parser.parse_args(arguments)
    settings = StudySettings(count=given.count, hunting=40, steps=given.steps, max_sequence_length=16)
    study = on_one_core(given.model, settings, given.csv.parent)
    table = {name: study.scores(study.judging, 1.0, plugin)[:, 0] for name, plugin in conditions(given.heads).items()}
    rows = [{**provenance(cpu=True), "steps": given.steps, **row} for row in rows_of(table)]
    append_rows(given.csv, rows)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
