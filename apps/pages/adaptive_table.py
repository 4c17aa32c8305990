"""The tables of docs/adaptive.md and docs/profile.md, from assets/bench/adaptive.csv and its neighbours."""

from collections.abc import Sequence
from pathlib import Path

from genattn.apps.pages.tables import Row, markdown_table, read_rows
from genattn.apps.sampling.first_run import FIRST_MODEL

_NAMES = {
    "window": "window (static)",
    "radial": "radial (static, the released mask)",
    "top-k": "top-k",
    "top-p": "top-p",
    "error-aware": "error-aware",
    "clusters": "clusters",
    "profiled": "profiled map",
}


def adaptive_table(file: Path) -> str:
    """A block per model and share: every pattern without and with a tail."""
    rows = read_rows(file)
    header = ["pattern", "tail", "visited", "error", "PSNR dB", "against static", "SSIM", "oracle", "s per clip", "captions"]
    blocks = []
    for model in dict.fromkeys(r["model"] for r in rows):
        for share in sorted({float(r["share"]) for r in rows if r["model"] == model}):
            mine = [r for r in rows if r["model"] == model and float(r["share"]) == share]
            order = sorted(mine, key=lambda r: (list(_NAMES).index(r["pattern"]), r["tail"]))
            body = [_line(row) for row in order]
            blocks.append(f"**{model}, share {share:g}**\n\n{markdown_table(header, body)}")
    first = rows[0]
    note = (
        "Every step and layer sparse, 12 steps (tiny-wan-long: 8), held-out captions, the same noise in all rows of a "
        "caption. Error: root of the mean squared relative error of the attention output in three steps of the dense run, "
        "early, middle and late. Square brackets: 95 % bootstrap intervals over captions; against static: PSNR minus that of "
        "radial (tiny-wan) or the window (the others) without a tail, paired by caption. Oracle: the share of colour, shape "
        "and motion that it finds as asked. "
        f"{first['device']}, torch "
        f"{first['torch_version']}, {first['date']}; seconds by the clock of a busy machine, at a length where attention is "
        "a small part."
    )
    return "\n\n".join([*blocks, f"<sub>{note}</sub>"])


def _line(row: Row) -> list[str]:
    error = f"{float(row['error']):.3f}" if row["error"] else "-"
    return [
        _NAMES[row["pattern"]],
        row["tail"] or "none",
        f"{float(row['density']):.3f}",
        error,
        _spread(row, "psnr", 1),
        _spread(row, "psnr_gain", 1, sign="+") if row.get("psnr_gain") else "-",
        f"{float(row['ssim']):.3f}",
        f"{float(row['oracle']):.2f}",
        f"{float(row['seconds']):.1f}",
        row["captions"],
    ]


def tail_gain_table(file: Path) -> str:
    """A block per model and share: nearness to the dense clip without a tail and with each, and what two means change."""
    rows = read_rows(file)
    header = ["pattern", "none", "mean", "mean2", "mean2 against none", "captions"]
    blocks = []
    for model, share in dict.fromkeys((r["model"], r["share"]) for r in rows if r["tail"] == "mean2"):
        mine = {(r["pattern"], r["tail"]): r for r in rows if (r["model"], r["share"]) == (model, share)}
        body = []
        for name in sorted({name for name, tail in mine if tail == "mean2"}, key=list(_NAMES).index):
            means = [f"{float(mine[name, tail]['psnr']):.1f} dB" for tail in ("", "mean", "mean2")]
            best = mine[name, "mean2"]
            body.append([_NAMES[name], *means, f"{_spread(best, 'tail_gain', 1, sign='+')} dB", best["captions"]])
        blocks.append(f"**{model}, share {float(share):g}**\n\n{markdown_table(header, body)}")
    note = "PSNR against the dense clip, held-out captions, every step and layer sparse; the change is paired by caption, "
    return "\n\n".join([*blocks, f"<sub>{note}with its 95 % bootstrap interval.</sub>"])


def _spread(row: Row, name: str, digits: int, sign: str = "") -> str:
    low, high = float(row[f"{name}_low"]), float(row[f"{name}_high"])
    return f"{float(row[name]):{sign}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def selection_table(file: Path) -> str:
    """What a choice costs beside the attention it saves from."""
    rows = read_rows(file)
    header = ["choice", "tokens", "visited", "of dense attention", "of what is saved"]
    body = [
        [
            row["pattern"],
            row["tokens"],
            f"{float(row['density']):.2f}",
            f"{float(row['share']):.1%}",
            f"{float(row['of_saved']):.1%}" if row["of_saved"] else "nothing saved",
        ]
        for row in rows
    ]
    return _with_note(
        header, body, rows, f"{rows[0]['heads']} heads of {rows[0]['head_dim']}, the fastest of interleaved calls."
    )


def break_even_table(file: Path) -> str:
    """Sparse over dense speed by length, share and backend."""
    rows = read_rows(file)
    lengths = list(dict.fromkeys(r["tokens"] for r in rows))
    header = ["backend", "share", *(f"{n} tokens" for n in lengths)]
    keys = list(dict.fromkeys((r["backend"], r["share"]) for r in rows))
    found = {(r["backend"], r["share"], r["tokens"]): f"{float(r['speedup']):.2f}x" for r in rows}
    body = [[backend, share, *(found.get((backend, share, n), "-") for n in lengths)] for backend, share in keys]
    note = f"{rows[0]['heads']} heads of {rows[0]['head_dim']}, random tiles, plan made before."
    return _with_note(header, body, rows, note)


def end_to_end_table(file: Path) -> str:
    """Whole calls of a trained model, sparse against dense: a block per model and length, every setting and every column."""
    rows = read_rows(file)
    grounds = sorted({(int(row["frames"]), row["model"]) for row in rows})
    blocks = [_whole_calls([row for row in rows if (int(row["frames"]), row["model"]) == ground]) for ground in grounds]
    note = (
        "8 steps, every step and layer sparse unless the name says otherwise; held-out captions, the same "
        "noise for all settings of a caption; dense is torch's own. Times faster than dense: the first figure is by the clock, "
        "on tiny-wan-long-bound the median of three calls that take turns with dense ones, the one in round brackets by "
        "processor time over all captions. Oracle: share of colour, shape, motion and "
        "size found as asked, and its change against dense, paired by caption. Square brackets: 95 % bootstrap intervals."
    )
    return "\n\n".join([*blocks, f"<sub>{note}</sub>"])


def _whole_calls(rows: Sequence[Row]) -> str:
    header = ["attention", "computed", "whole call", "denoiser", "PSNR dB", "SSIM", "oracle", "against dense", "peak GB"]
    body = [
        [
            row["setting"],
            f"{float(row['density']):.0%}",
            _times(row, ""),
            _times(row, "_denoiser"),
            _spread(row, "psnr", 1) if row["psnr"] else "-",
            f"{float(row['ssim']):.3f}",
            f"{float(row['oracle']):.2f}",
            _spread(row, "oracle_change", 2, sign="+"),
            f"{float(row['peak_gb']):.2f}" if row.get("peak_gb") else "-",
        ]
        for row in rows
    ]
    timed = next((r for r in rows if r.get("seconds")), rows[0])
    clock = f" Seconds by the clock, {timed['threads']} threads." if timed.get("seconds") else ""
    first = rows[0]
    title = f"**{first['model']}, {first['frames']} frames, {int(first['tokens']):,} tokens**"
    note = f"{first['captions']} captions.{clock}"
    return f"{title}\n\n{_with_note(header, body, rows, note)}"


def _times(row: Row, part: str) -> str:
    by_processor = f"{float(row[f'speedup{part}_processor']):.2f}x"
    by_clock = row.get(f"speedup{part}")
    seconds = row.get("denoiser_seconds" if part else "seconds")
    return f"{float(by_clock):.2f}x, {float(seconds or 0):.1f} s ({by_processor})" if by_clock else f"({by_processor})"


SHOWN_FRAMES = 61
SHOWN_FIRST = ("dense", "profiled 0.4 + mean2", "profiled 0.25 + mean2", "window + mean2", "narrow window + mean2", "window")


def first_screen_table(file: Path, model: str = FIRST_MODEL) -> str:
    """What matters, for README: how much faster a whole call of `model` is, and what of the clip is kept."""
    shown = [row for row in read_rows(file) if row["model"] == model and int(row["frames"]) == SHOWN_FRAMES]
    found = {row["setting"]: row for row in shown}
    rows = [found[name] for name in SHOWN_FIRST if name in found and found[name]["seconds"]]
    header = ["attention", "whole call", "faster", "PSNR to dense", "clip shows what was asked"]
    body = [
        [
            row["setting"].replace("mean2", "tail").replace("mean", "tail"),
            f"{float(row['seconds']):.1f} s",
            "-" if row["setting"] == "dense" else f"{float(row['speedup']):.1f}x",
            f"{float(row['psnr']):.0f} dB" if row["psnr"] else "-",
            f"{float(row['oracle']):.0%}",
        ]
        for row in rows
    ]
    first = rows[0]
    note = (
        f"{first['model']}, a clip of {int(first['tokens']):,} tokens, {first['captions']} held-out captions. "
        f"{first['device']}, torch {first['torch_version']}, {first['date']}. "
        "Seconds: the fastest of three calls; faster: the median of three calls right after dense ones. "
        "All settings, with intervals: [by content](docs/adaptive.md#a-whole-call)."
    )
    return f"{markdown_table(header, body)}\n\n<sub>{note}</sub>"


def _with_note(header: Sequence[str], body: Sequence[Sequence[str]], rows: Sequence[Row], note: str) -> str:
    first = rows[0]
    made = f"{note} {first['device']}, torch {first['torch_version']}, {first['date']}, commit {first['commit']}."
    return f"{markdown_table(header, body)}\n\n<sub>{made}</sub>"
