"""The verdict of a GPU run: one table of what was measured, against what, whether it is right, and what failed."""

from pathlib import Path

from genattn.apps.bench.gpu import FILES, rows_in
from genattn.whole_file import write_whole

# time over (density x dense time): what must hold, what is good, what is aimed for
MUST, GOOD, AIM = 1.35, 1.20, 1.10


def write_verdict(out: Path) -> str:
    """Write OUT/verdict.md from the rows in OUT, and return it."""
    text = "\n\n".join(part for part in (_forward(out), _checks(out), _others(out), _failures(out)) if part) + "\n"
    write_whole(out / "verdict.md", text)
    return text


def _forward(out: Path) -> str:
    rows = [row for row in rows_in(out / FILES["forward"]) if row.get("impl")]
    flex = {row["case"]: row for row in rows if row["impl"] == "flex" and row.get("seconds")}
    lines = ["| case | t / (density x dense) | over | times flex | correct | remark |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["impl"] != "triton":
            continue
        ratio = float(row["ratio"]) if row.get("ratio") else None
        other = flex.get(row["case"])
        against = f"{float(other['seconds']) / float(row['seconds']):.2f}" if other and row.get("seconds") else ""
        right = f"yes, {float(row['error']):.0e}" if row["correct"] == "True" else f"NO, {row['error']}"
        told = "" if ratio is None else f"{ratio:.2f}"
        lines.append(f"| {row['case']} | {told} | {row['dense']} | {against} | {right} | {_grade(ratio)} |")
    device = rows[0].get("device", "") if rows else "nothing was measured"
    return "\n".join([f"# {device}", "", *lines])


def _grade(ratio: float | None) -> str:
    if ratio is None:
        return "no speed"
    return "aim" if ratio <= AIM else "good" if ratio <= GOOD else "enough" if ratio <= MUST else "TOO SLOW"


def _checks(out: Path) -> str:
    rows = [row for row in rows_in(out / FILES["check"]) if row.get("correct")]
    wrong = [
        f"{row['case']}: error {row['error']}, log-sum-exp {row.get('lse_error')}" for row in rows if row["correct"] != "True"
    ]
    return "\n".join([f"Checks: {len(rows) - len(wrong)} of {len(rows)} right.", *(f"* WRONG {line}" for line in wrong)])


def _others(out: Path) -> str:
    lines = [
        f"* {row['case']}: backward {float(row['backward_ratio']):.2f} x forward"
        for row in rows_in(out / FILES["backward"])
        if row.get("backward_ratio")
    ]
    lines += [
        f"* {row['case']}: a step {float(row['dense_seconds']):.2f} s dense, {float(row['sparse_seconds']):.2f} s sparse, "
        f"{float(row['speedup']):.2f} x"
        for row in rows_in(out / FILES["step"])
        if row.get("speedup")
    ]
    best: dict[str, dict[str, str]] = {}
    for row in rows_in(out / FILES["settings"]):
        if row.get("seconds") and float(row["seconds"]) < float(best.get(row["case"], row)["seconds"]) + 1e-12:
            best[row["case"]] = row
    lines += [
        f"* {case}: fastest setting [{r['warps']}, {r['stages']}, {r['split']}], persistent {r['persistent']}, "
        f"{float(r['seconds']) * 1e3:.2f} ms"
        for case, r in best.items()
    ]
    lines += [
        f"* {row['case']}: {row['impl']} takes {float(row['over_first']):.2f} of triton's time"
        for row in rows_in(out / FILES["options"])
        if row.get("over_first") and row["impl"] != "triton"
    ]
    return "\n".join(["Beside that:", *lines]) if lines else ""


def _failures(out: Path) -> str:
    found = [
        f"* {row.get('job') or row.get('case')}: {row['error']}"
        for file in dict.fromkeys(FILES.values())
        for row in rows_in(out / file)
        if row.get("error") and not _is_number(row["error"])
    ]
    return "\n".join(["Failed:", *found]) if found else "Nothing failed."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
