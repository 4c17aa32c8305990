"""Findings about tiles chosen by content, stood in for and profiled, computed from assets/bench/adaptive.csv."""

from collections.abc import Callable

from genattn.apps.pages.evidence_tables import MINIATURE, NOT, Finding, NotMeasuredError, Row, Tables, between, bounds, number

_MODEL = "tiny-wan"


def _pairs(tables: Tables, first: tuple[str, str], second: tuple[str, str]) -> list[tuple[Row, Row]]:
    """Rows of two (pattern, tail) at equal shares, by rising share. Raises NotMeasuredError where there are none."""
    rows = tables.rows("adaptive", model=_MODEL)
    found = {(r["pattern"], r["tail"], float(r["share"])): r for r in rows if r["error"]}
    shares = sorted({share for _, _, share in found})
    pairs = [(found[(*first, s)], found[(*second, s)]) for s in shares if (*first, s) in found and (*second, s) in found]
    if not pairs:
        raise NotMeasuredError(f"assets/bench/adaptive.csv has no errors of {first} beside {second} yet")
    return pairs


def _errors(pairs: list[tuple[Row, Row]], names: tuple[str, str]) -> str:
    parts = [f"{number(a, 'density'):.2f}: {number(a, 'error'):.3f} and {number(b, 'error'):.3f}" for a, b in pairs]
    return f"error of the attention output by visited share, {names[0]} and {names[1]}: {'; '.join(parts)}"


def _rows(pairs: list[tuple[Row, Row]]) -> tuple[Row, ...]:
    return tuple(row for pair in pairs for row in pair)


def stand_in(tables: Tables) -> Finding:
    """Sol-Attn: means in the place of skipped tiles, same tiles computed."""
    pairs = _pairs(tables, ("top-k", ""), ("top-k", "mean"))
    good = all(number(b, "error") < number(a, "error") for a, b in pairs)
    at = min(pairs, key=lambda p: abs(float(p[0]["share"]) - 0.25))
    text = _errors(pairs, ("dropped", "stood in for"))
    text += f"; PSNR at a share of {float(at[0]['share']):g}: {between(at[0], 'psnr', 1)} and {between(at[1], 'psnr', 1)} dB"
    good = good and bounds(at[1], "psnr")[0] > bounds(at[0], "psnr")[1]
    return Finding(text, MINIATURE if good else NOT, "" if good else "not at every share", _rows(pairs))


def error_aware(tables: Tables) -> Finding:
    """SVG-EAR: ranking by what standing in loses against ranking by mass, both stood in for."""
    pairs = _pairs(tables, ("top-k", "mean"), ("error-aware", "mean"))
    good = all(number(b, "error") < number(a, "error") for a, b in pairs)
    why = "" if good else "no lower at every share"
    return Finding(_errors(pairs, ("top-k", "error-aware")), MINIATURE if good else NOT, why, _rows(pairs))


def clusters(tables: Tables) -> Finding:
    """SVG2: clusters of like tokens against boxes of a frame, both dropped as published."""
    pairs = _pairs(tables, ("top-k", ""), ("clusters", ""))
    good = all(number(b, "error") < number(a, "error") for a, b in pairs)
    why = "" if good else "boxes of a frame describe this small model's tokens as well: 512 tokens, 32 clusters"
    return Finding(_errors(pairs, ("boxes", "clusters")), MINIATURE if good else NOT, why, _rows(pairs))


def profiled(tables: Tables) -> Finding:
    """SVOO: a map found on other prompts against a choice in every call."""
    pairs = _pairs(tables, ("top-k", "mean"), ("profiled", "mean"))
    good = all(number(b, "error") <= 1.15 * number(a, "error") for a, b in pairs)
    why = "" if good else "more than 1.15 times the error of choosing in every call"
    return Finding(_errors(pairs, ("chosen in every call", "profiled")), MINIATURE if good else NOT, why, _rows(pairs))


FINDINGS: dict[str, Callable[[Tables], Finding]] = {
    "stand_in": stand_in,
    "error_aware": error_aware,
    "clusters": clusters,
    "profiled": profiled,
}
