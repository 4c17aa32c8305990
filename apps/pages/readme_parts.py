"""Generated parts of README.md and docs/: tables from the files under assets/, commands from the command line itself.

    <!-- begin generated: quality -->     everything between the marks is replaced,
    <!-- end generated: quality -->       the rest of the page is left alone

`python -m genattn.apps.pages.readme_parts [--check]` rewrites the pages, or fails when one is not what the files say.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from genattn.apps.pages import rooms
from genattn.apps.pages.adaptive_table import (
    adaptive_table,
    break_even_table,
    end_to_end_table,
    first_screen_table,
    selection_table,
    tail_gain_table,
)
from genattn.apps.pages.tables import Row, markdown_table, read_rows
from genattn.errors import GenAttnError

ROOT = Path(__file__).resolve().parents[2]


def fill(page: str, parts: dict[str, str]) -> str:
    """`page` with each marked part replaced.

    Raises GenAttnError when a part has no marks in the page, or marks have no part.
    """
    marked = re.findall(r"<!-- begin generated: (\S+) -->", page)
    if sorted(marked) != sorted(parts):
        raise GenAttnError(f"the page marks {sorted(marked)}, the parts are {sorted(parts)}; they must be the same")
    for name, text in parts.items():
        form = re.compile(rf"(<!-- begin generated: {name} -->\n).*?(<!-- end generated: {name} -->)", re.DOTALL)
        page, count = form.subn(lambda m, text=text: m.group(1) + text.strip() + "\n" + m.group(2), page)  # type: ignore[misc]
        if count != 1:
            raise GenAttnError(f"part {name} must have one begin and one end mark, found {count} pairs")
    return page


def quality_table(file: Path) -> str:
    """Dense against sparse on the shipped model: the newest comparison in `file`."""
    rows = _newest(read_rows(file))
    names = {
        "attention": "attention",
        "density": "scores computed",
        "seconds": "seconds per clip",
        "speedup": "speed-up",
        "peak_memory_gb": "peak GB",
        "psnr": "PSNR dB",
        "ssim": "SSIM",
        "colour": "colour",
        "shape": "shape",
        "motion": "motion",
    }
    shown = [n for n in names if any(r.get(n) for r in rows)]
    body = [[_label(r["attention"])] + [_cell(r, n) for n in shown[1:]] for r in rows]
    first = rows[0]
    note = (
        f"tiny-wan, {first['height']} x {first['width']} x {first['num_frames']}, {first['num_inference_steps']} steps, "
        f"{first['n']} held-out prompts, same seeds; colour, shape, motion: share of clips in which the oracle finds what was "
        f"asked. {first['device']}, torch {first['torch_version']}, diffusers {first['diffusers_version']}, {first['date']}, "
        f"commit {first['commit']}. At {_tokens(first)} tokens attention is a small part of a step: this table is about "
        "quality; for speed see [kernels](kernels.md#measured)."
    )
    return f"{markdown_table([names[n] for n in shown], body)}\n\n<sub>{note}</sub>"


def _label(name: str) -> str:
    base, _, steps = name.partition("@")
    return f"{base}, dense steps {steps}" if steps else base


def _cell(row: Row, name: str) -> str:
    if not row.get(name):
        return "-"
    value = f"{float(row[name]):.3g}"
    spread = f"{name}_low"
    return f"{value} [{float(row[spread]):.3g}, {float(row[f'{name}_high']):.3g}]" if row.get(spread) else value


def _tokens(row: Row) -> int:
    frames = (int(row["num_frames"]) - 1) // 4 + 1
    return frames * (int(row["height"]) // 8) * (int(row["width"]) // 8)


def _newest(rows: Sequence[Row]) -> list[Row]:
    """The last block of rows that begins with the dense one."""
    start = max(i for i, r in enumerate(rows) if r["attention"] == "dense")
    return list(rows[start:])


def speed_table(file: Path) -> str:
    """Block-sparse attention against the fastest dense backend of the same machine: the newest measurement in `file`."""
    rows = read_rows(file)
    newest = [r for r in rows if (r["date"], r["commit"]) == (rows[-1]["date"], rows[-1]["commit"])]
    kept = [r for r in newest if r["correct"] == "True"]
    body = [
        [
            f"{r['case']}, {r['dtype']}, D {r['head_dim']}",
            r["impl"],
            f"{float(r['density']):.3f}",
            f"{float(r['seconds']) * 1e3:.0f}",
            f"{float(r['speedup']):.2f}x",
            f"{float(r['ratio']):.2f}",
        ]
        for r in kept
    ]
    header = ["pattern and grid", "backend", "density", "ms", "over dense", "time / (density x dense)"]
    first = kept[0]
    load = f"load average {float(first['loadavg']):.1f}"
    note = (
        "One attention call, batch 1, compared with the float64 definition before timing; dense is the fastest backend here "
        f"({first['dense']}). {first['device']}, {load}, torch {first['torch_version']}, {first['date']}, "
        f"commit {first['commit']}."
    )
    return f"{markdown_table(header, body)}\n\n<sub>{note}</sub>"


def families_table() -> str:
    """How many of diffusers' attention models have a layout, in one sentence."""
    from genattn.apps.pages.family_table import claim

    return f"{claim()} [docs/families.md](docs/families.md) shows what works with each."


def study_table(file: str, model: str) -> str:
    """BroadWay's study of a model in a file of assets/bench."""
    from genattn.apps.pages.broadway_table import broadway_table

    return broadway_table(ROOT / "assets" / "bench" / file, model)


def commands_table() -> str:
    """Every command with its first sentence and its example, from the help that `--help` shows."""
    import typer

    from genattn.apps.cli.root import app

    rows: list[str] = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        for full, each in {f"{name} {n}": c for n, c in inner.items()}.items() if inner else ((name, command),):
            said, _, example = (each.help or "").partition("Example: ")
            rows.append(f"**{full}**: {' '.join(said.split())}\n\n    {' '.join(example.split())}")
    return "\n\n".join(rows)


def _long_video_bases() -> str:
    from genattn.pipelines.long_video.bases.frame_denoisers import capability_markdown

    return capability_markdown()


def _long_video_ablation() -> str:
    from genattn.apps.laboratory.long_video import TABLE, ablation_markdown

    return ablation_markdown(ROOT / TABLE)


def _fifo_motion(lora: bool = False) -> str:
    from genattn.apps.laboratory.fifo_motion import TABLE, motion_markdown

    return motion_markdown(ROOT / TABLE, lora)


def _motion_by_caption() -> str:
    from genattn.apps.laboratory.fifo_motion import by_caption_markdown
    from genattn.apps.laboratory.long_video import TABLE as FILMS

    return by_caption_markdown(ROOT / FILMS)


def _endless() -> str:
    from genattn.pipelines.tiny.studies.endless_scores import scores_markdown

    return scores_markdown(ROOT / "assets" / "bench" / "endless.csv")


def _long_clip() -> str:
    from genattn.pipelines.tiny.studies.long_clip import markdown

    return markdown(ROOT / "assets" / "bench" / "long_clip.csv")


def _logit_decay() -> str:
    from genattn.apps.laboratory.plans.logit_decay import tables

    return tables(ROOT / "assets" / "bench" / "logit_decay.csv")


def _tail(part: str) -> str:
    from genattn.apps.laboratory.tail import cost_table, error_table

    return {"error": error_table, "cost": cost_table}[part](ROOT / "assets" / "bench" / "tail.csv")


def _longer_finetuning() -> str:
    from genattn.apps.pages.finetune_table import finetune_table

    return finetune_table(ROOT / "assets" / "bench" / "finetune.csv")


def _nag(held_out: bool) -> str:
    from genattn.pipelines.tiny.studies.nag import markdown

    return markdown(ROOT / "assets" / "bench" / "nag.csv", held_out)


def _clip_heads() -> str:
    from genattn.pipelines.tiny.studies.clip_heads import markdown

    return markdown(ROOT / "assets" / "bench" / "clip_heads.csv")


def _nag_cost() -> str:
    from genattn.apps.laboratory.nag import TABLE, markdown

    return markdown(TABLE)


def _stacking() -> str:
    from genattn.apps.laboratory.stacking.table import stacking_table

    return stacking_table(ROOT / "assets" / "bench" / "stacking.csv")


def _rooms(show: Callable[[dict[str, rooms.Room]], str]) -> Callable[[], str]:
    return lambda: show(rooms.read_rooms(ROOT))


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "families": families_table,
        "first": lambda: first_screen_table(ROOT / "assets" / "bench" / "end_to_end.csv"),
    },
    "docs/radial.md": {"quality": lambda: quality_table(ROOT / "assets" / "bench" / "compare.csv")},
    "docs/kernels.md": {"speed": lambda: speed_table(ROOT / "assets" / "bench" / "attention.csv")},
    "docs/adaptive.md": {
        "shares": lambda: adaptive_table(ROOT / "assets" / "bench" / "adaptive.csv"),
        "whole": lambda: end_to_end_table(ROOT / "assets" / "bench" / "end_to_end.csv"),
        "selection": lambda: selection_table(ROOT / "assets" / "bench" / "selection.csv"),
        "break-even": lambda: break_even_table(ROOT / "assets" / "bench" / "break_even.csv"),
    },
    "docs/architecture.md": {"picture": _rooms(rooms.picture), "rooms": _rooms(rooms.table)},
    "docs/command-line.md": {"commands": commands_table},
    "docs/long-video.md": {
        "bases": _long_video_bases,
        "ablation": _long_video_ablation,
        "motion": _fifo_motion,
        "motion-goes-on": lambda: _fifo_motion(lora=True),
        "motion-by-caption": _motion_by_caption,
        "endless": _endless,
    },
    "docs/works-with.md": {"stacking": _stacking},
    "docs/long-clip.md": {"long-clip": _long_clip, "logit-decay": _logit_decay},
    "docs/tail.md": {
        "error": lambda: _tail("error"),
        "gain": lambda: tail_gain_table(ROOT / "assets" / "bench" / "adaptive.csv"),
        "cost": lambda: _tail("cost"),
    },
    "docs/nag.md": {"held-out": lambda: _nag(True), "tried": lambda: _nag(False), "cost": _nag_cost},
    "docs/headhunter.md": {"clips": _clip_heads},
    "docs/finetuning.md": {"longer": _longer_finetuning},
    "docs/broadway.md": {
        "motion-modules": lambda: study_table("broadway.csv", "tiny-animatediff"),
        "transformer": lambda: study_table("broadway_dit.csv", "tiny-wan"),
        "transformer-long": lambda: study_table("broadway_dit.csv", "tiny-wan-long"),
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the pages, or with --check tell whether all are up to date (exit code 1 if not, naming them)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true")
    options: Any = parser.parse_args(arguments)
    stale = 0
    for name, parts in PAGES.items():
        page = (ROOT / name).read_text()
        wanted = fill(page, {part: make() for part, make in parts.items()})
        if not options.check:
            (ROOT / name).write_text(wanted)
        elif wanted != page:
            print(f"{name} is not what the files say; run: make tables", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
