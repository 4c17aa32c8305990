"""How well the cheap probe of HeadHunter orders heads, by when and how often it looks, on `tiny-sd3`.

The full search's first round scores every head by whole pictures; the probe scores them by what single guided steps foresee.
Their rank correlation is the probe's worth. Variants look once, twice or three times, early or late; each is given as many
captions as make its cost that of one look at all captions, and stands beside the same looks at all captions.

    python -m genattn.pipelines.tiny.studies.probe --model assets/tiny-sd3 --run-dir runs/probe --csv assets/bench/probe.csv
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genattn.guidance.headhunter.search import rank_correlation
from genattn.pipelines.tiny.evaluate import append_rows, provenance
from genattn.pipelines.tiny.studies.sd3 import HeadStudy, StudySettings, on_one_core, short_study

LOOKS: tuple[tuple[float, ...], ...] = ((0.3,), (0.6,), (0.8,), (0.3, 0.6), (0.6, 0.8), (0.3, 0.6, 0.8), (0.5, 0.65, 0.8))


def variants(captions: int) -> list[tuple[tuple[float, ...], int]]:
    """(moments, captions): every set of looks at all captions, and at as many as cost what one look at all does.

    Args:
        captions: of the hunt, at least 6.
    """
    every = [(moments, captions) for moments in LOOKS]
    return every + [(moments, captions // len(moments)) for moments in LOOKS if len(moments) > 1]


def probe_row(
    study: HeadStudy, full: dict[Any, float], spent: float, moments: tuple[float, ...], captions: int
) -> dict[str, Any]:
    """Rank correlation of one variant with the full search, and what it cost.

    Args:
        study: the hunting captions and the pipeline.
        full: the full search's score of each head.
        spent: the full search's forwards.
        moments: when the probe looks, fractions of the run.
        captions: how many hunting captions it sees.
    """
    texts, study.hunting = study.hunting, study.hunting[:captions]
    name = f"probe-{'-'.join(map(str, moments))}-{captions}.jsonl"
    hunt = study.hunter(name, rounds=1, u_grid=(), probe_keep=0, probe_moments=moments)
    found = hunt.run().scores
    study.hunting = texts
    heads = sorted(set(full) & set(found))
    cost = hunt.forwards + (hunt.probe.passes if hunt.probe is not None else 0.0)
    return {
        "moments": " ".join(map(str, moments)),
        "captions": captions,
        "heads": len(heads),
        "rank_correlation": round(rank_correlation([full[h] for h in heads], [found[h] for h in heads]), 4),
        "forwards": round(cost),
        "full_over_this": round(spent / cost, 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny.studies.probe`."""
    parser = short_study(__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="where the hunts' logs go; they resume there")
    parser.add_argument("--captions", type=int, default=40, help="hunting captions")
    given = parser.parse_args(arguments)
    settings = StudySettings(count=2, hunting=given.captions, steps=given.steps, batch=24, max_sequence_length=16)
    study = on_one_core(given.model, settings, given.run_dir)
    whole = study.hunter("full.jsonl", rounds=1, u_grid=())
    full = dict(whole.run().scores)
    for moments, captions in variants(given.captions):
        row = probe_row(study, full, whole.forwards, moments, captions)
        append_rows(given.csv, [{**provenance(cpu=True), "steps": given.steps, **row}])
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
