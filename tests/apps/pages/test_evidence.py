"""The evidence page: every claim has a verdict, verdicts follow the tables, and the committed page is what the files say."""

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from genattn.apps.cli.evidence import evidence_command
from genattn.apps.laboratory.geometry import TABLES, density_rows, noise_rows
from genattn.apps.pages import evidence
from genattn.apps.pages.evidence_methods import FINDINGS as METHODS
from genattn.apps.pages.evidence_patterns import FINDINGS as PATTERNS, fit_n_log_n, growth
from genattn.apps.pages.evidence_tables import MINIATURE, NEEDS, NOT, REPRODUCED, Claim, NotMeasuredError, Tables, read_claims
from genattn.apps.sampling.measured_rows import append_rows
from genattn.errors import GenAttnError

CLAIMS = evidence.ROOT / "assets" / "claims.json"
FACTS = {"device": "CPU, 1 threads", "date": "2026-01-01", "commit": "abc", "weights": "w", "model": "m"}


def claim(**changes: str) -> Claim:
    blank = {"id": "x", "method": "M", "claim": "c", "published": "p", "source": "s", "measure": "", "needs": "", "command": ""}
    return Claim(**(blank | changes))


def tables(folder: Path, name: str, rows: list[dict]) -> Tables:
    append_rows(folder / f"{name}.csv", [FACTS | row for row in rows])
    return Tables(folder)


def test_every_method_and_every_claim_is_there() -> None:
    claims = read_claims(CLAIMS)
    assert {c.method for c in claims} >= {
        "Radial Attention", "Generalized Neighborhood Attention", "HeadHunter and SoftPAG", "BroadWay", "FIFO-Diffusion",
        "Ouroboros-Diffusion",
    }  # fmt: skip
    used = {c.measure for c in claims}
    assert set(evidence.FINDINGS) <= used, "a finding without a claim"
    found = evidence.gather()
    assert len(found) == len(claims)
    for e in found:
        assert e.verdict in (REPRODUCED, MINIATURE, NOT, NEEDS)
        assert e.measured or e.why, e.claim.id
        assert e.verdict in (REPRODUCED, MINIATURE) or e.why, f"{e.claim.id} must say why"


def test_claims_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    path.write_text(json.dumps([vars(claim())]))
    with pytest.raises(GenAttnError, match="claim x must have text, figure, source"):
        read_claims(path)
    path.write_text(json.dumps([vars(claim(measure="energy_decay"))]))
    with pytest.raises(GenAttnError, match='claim x must say on which model it was measured; add "on"'):
        read_claims(path)
    path.write_text(json.dumps([vars(claim(needs="a GPU"))] * 2))
    with pytest.raises(GenAttnError, match="got twice: x"):
        read_claims(path)
    with pytest.raises(GenAttnError, match="names the measure 'nonsense'"):
        evidence.judge(claim(measure="nonsense"), Tables(tmp_path))
    with pytest.raises(GenAttnError, match="which does not exist"):
        evidence.judge(claim(measure="test:tests/apps/pages/test_evidence.py::test_no_such"), Tables(tmp_path))


def test_a_verdict_comes_with_the_table(tmp_path: Path) -> None:
    asked = claim(measure="broadway_dynamic")
    missing = evidence.judge(asked, Tables(tmp_path))
    assert missing.verdict == NOT
    assert "not measured yet: assets/bench/broadway.csv is not there yet" in missing.why
    assert evidence.judge(claim(measure="broadway_dynamic", needs="weights"), Tables(tmp_path)).verdict == NEEDS
    row = {"variant": "both", "clips": 9, "dynamic_degree": 2.0, "dynamic_degree_change": 0.5, "model": "tiny-animatediff"}
    for low, high, verdict in ((0.1, 0.9, MINIATURE), (-0.1, 0.9, NOT), (-0.9, -0.1, NOT)):
        ends = {"dynamic_degree_low": low, "dynamic_degree_high": high}
        got = evidence.judge(asked, tables(tmp_path / str(low + high), "broadway", [row | ends]))
        assert got.verdict == verdict
        assert f"[{low:+.4f}, {high:+.4f}]" in got.measured
        assert got.where == "CPU, 1 threads, 2026-01-01"
    with pytest.raises(NotMeasuredError, match="has no rows with variant both, model tiny-animatediff yet"):
        METHODS["broadway_dynamic"](tables(tmp_path / "other", "broadway", [row | {"variant": "stock"}]))


def test_every_measured_claim_says_on_which_model() -> None:
    """What a claim says agrees with the rows behind it, where they name their model."""
    found = evidence.gather()
    folder = Tables(evidence.ROOT / "assets" / "bench")
    for e in found:
        if e.claim.measure in evidence.FINDINGS and e.measured:
            rows = evidence.FINDINGS[e.claim.measure](folder).rows
            named = {row.get("base") or row.get("model", "") for row in rows}
            assert {name for name in named if name.startswith("tiny-")} <= set(e.claim.on.split(", ")), e.claim.id
    text = evidence.page(found)
    assert "What the measured claims were measured on: tiny-wan " in text
    assert not [e.claim.id for e in found if e.measured and f"| {e.claim.on} | " not in text]


def test_the_studies_write_what_the_page_reads(tmp_path: Path) -> None:
    """Columns of the studies of BroadWay and of long video, from the functions that make their rows."""
    from genattn.apps.laboratory.long_video import variants as films
    from genattn.pipelines.tiny.studies.broadway import MEASURES, rows_of, variants

    rng = np.random.default_rng(0)
    results = {kind.name: {name: rng.random(6) for name in MEASURES} for kind in variants()}
    rows = rows_of(results, dict.fromkeys(results, 1.0))
    for table, model in (("broadway", "tiny-animatediff"), ("broadway_dit", "tiny-wan")):
        found = tables(tmp_path, table, [row | {"model": model} for row in rows])
    names = [name for name in METHODS if name.startswith("broadway") and name != "broadway_cost"]
    assert len(names) == 4
    assert all("6 captions" in METHODS[name](found).measured for name in names)
    for kind in (True, False):
        film = dict.fromkeys(("subject_consistency", "background_consistency", "motion_smoothness", "temporal_flickering"), 0.9)
        made = [film | {"variant": name, "prompt": p, "frames": 253} for name in films(kind) for p in "ab"]
        found = tables(tmp_path / str(kind), "long_video_ablation", made)
        for name in ("ouroboros_over_fifo", "ouroboros_tail", "ouroboros_sacfa", "ouroboros_guidance"):
            assert "2 prompts" in METHODS[name](found).measured


def test_the_cost_of_broadway_is_that_of_the_run(tmp_path: Path) -> None:
    """A guided forward is one thing, a run with a fifth of its steps guided another."""
    row = {"measured": "video DiT", "over_stock": 1.066, "guided_steps": 0.2, "run_overhead": 0.0132}
    stock = {"measured": "attention", "over_stock": 1.2, "guided_steps": "", "run_overhead": ""}
    got = METHODS["broadway_cost"](tables(tmp_path, "broadway_cost", [stock, row]))
    assert "video DiT +1.3% (a guided forward +6.6%);" in got.measured
    assert (got.verdict, len(got.rows)) == (MINIATURE, 1)
    dear = tables(tmp_path / "dear", "broadway_cost", [row | {"run_overhead": 0.05}])
    assert METHODS["broadway_cost"](dear).verdict == NOT


def test_what_was_not_read_is_told(tmp_path: Path) -> None:
    told = evidence.page([evidence.judge(claim(needs="a GPU", standing="second-hand"), Tables(tmp_path))])
    assert "| c | p (s; second-hand) |" in told


def softpag(name: str, mean: float, gain: float) -> dict:
    gains = {"hunted_minus": gain, "minus_low": gain - 0.05, "minus_high": gain + 0.05}
    return {"condition": name, "captions": 20, "mean": mean, "low": mean - 0.01, "high": mean + 0.01, **gains}


def test_head_findings(tmp_path: Path) -> None:
    rows = [
        softpag("hunted", 0.5, 0),
        softpag("unguided", 0.3, 0.2),
        softpag("cfg", 0.4, 0.1),
        softpag("hunted + cfg", 0.6, -0.1),
    ]
    rows += [softpag("layer L3", 0.51, -0.01), softpag("random sets", 0.6, -0.1)]
    rows.append({"condition": "probe", "captions": 8, "rank_correlation": 0.8, "forwards_ratio": 4.0})
    found = tables(tmp_path, "softpag", rows)
    verdicts = {name: METHODS[name](found).verdict for name in ("hunted_over_unguided", "hunted_with_cfg", "heads_over_layer")}
    assert set(verdicts.values()) == {MINIATURE}
    assert METHODS["probe_cost"](found).verdict == MINIATURE
    assert (METHODS["transfer"](found).verdict, METHODS["transfer"](found).why) == (NOT, "it is worse here")
    with pytest.raises(NotMeasuredError, match="no sweep of u yet"):
        METHODS["softpag_u"](found)
    with pytest.raises(NotMeasuredError, match="has no condition hunted yet"):
        METHODS["transfer"](tables(tmp_path / "few", "softpag", rows[1:]))
    sweep = [softpag(f"u={u}", mean, 0) for u, mean in ((0.25, 0.3), (0.5, 0.5), (1.0, 0.4))]
    assert METHODS["softpag_u"](tables(tmp_path / "u", "softpag", sweep)).verdict == MINIATURE


def test_film_findings(tmp_path: Path) -> None:
    names = ("subject_consistency", "background_consistency", "motion_smoothness", "temporal_flickering")

    def film(variant: str, prompt: str, value: float) -> dict:
        return {"variant": variant, "prompt": prompt, "frames": 64, **dict.fromkeys(names, value)}

    rows = [film("FIFO", p, 0.9) for p in "ab"] + [film("+ tail", "a", 0.95), film("+ tail", "b", 0.96)]
    rows += [film("+ memory frames", p, 0.8) for p in "ab"] + [film("+ guidance", "a", 0.9)]
    found = tables(tmp_path, "long_video_ablation", rows)
    assert METHODS["ouroboros_tail"](found).verdict == MINIATURE
    worse = METHODS["ouroboros_sacfa"](found)
    assert worse.verdict == NOT
    assert "subject consistency" in worse.why
    with pytest.raises(NotMeasuredError, match="fewer than 2 films"):
        METHODS["ouroboros_guidance"](found)


def test_lora_findings(tmp_path: Path) -> None:
    def arm(name: str, accuracy: float, step: float | str, seconds: float) -> dict:
        spread: dict[str, float] = {}
        for measure in ("accuracy", "motion", "consistency", "drift"):
            spread |= {measure: accuracy, f"{measure}_low": accuracy - 0.1, f"{measure}_high": accuracy + 0.1}
        times = {"train_steps": 9, "train_step_seconds": step, "sample_seconds": seconds}
        return {"run": "r", "factor": "2", "arm": name, "clips": 8, **spread, **times}

    rows = [arm("untuned", 0.3, "", 4.0), arm("dense LoRA", 0.6, 2.0, 4.0), arm("radial LoRA", 0.55, 1.0, 2.0)]
    got = METHODS["lora_2x"](tables(tmp_path, "finetune", rows))
    assert got.verdict == MINIATURE
    assert "training step 2.00x, sampling 2.00x" in got.measured
    rows[2] = arm("radial LoRA", 0.2, 3.0, 2.0)
    got = METHODS["lora_2x"](tables(tmp_path / "bad", "finetune", rows))
    assert got.why == "tuning did not measurably lift accuracy; Radial LoRA is behind dense LoRA; no faster at so few tokens"
    with pytest.raises(NotMeasuredError, match="has no radial LoRA at 2x yet"):
        METHODS["lora_2x"](tables(tmp_path / "few", "finetune", rows[:2]))


def test_exponents_and_fits() -> None:
    tokens = [1000.0, 2000.0, 4000.0, 8000.0]
    slope, error = growth(tokens, [n**1.5 for n in tokens])
    assert slope == pytest.approx(1.5)
    assert error < 1e-6
    import math

    assert fit_n_log_n(tokens, [3 * n * math.log2(n) - 5 * n for n in tokens]) == pytest.approx(1.0)
    assert fit_n_log_n(tokens, [n**2 for n in tokens]) < 0.999
    with pytest.raises(NotMeasuredError, match="at least 3 lengths"):
        growth(tokens[:2], tokens[:2])


def test_speed_needs_correct_rows(tmp_path: Path) -> None:
    row = {"case": "radial a", "correct": "True", "speedup": 2.0, "density": 0.4, "ratio": 1.1, "dense_seconds": 1.0}
    found = tables(tmp_path, "attention", [row | {"median_seconds": 0.5}, row | {"case": "gna b", "correct": "False"}])
    assert PATTERNS["radial_speed"](found).verdict == MINIATURE
    with pytest.raises(NotMeasuredError, match="has no gna rows yet"):
        PATTERNS["gna_speed"](found)


def test_geometry_tables_are_what_the_code_gives() -> None:
    """The committed files of geometry can be made again on any machine."""
    folder = Tables(evidence.ROOT / "assets" / "bench")
    for name in ("sparsity", "simulator"):
        for old, new in zip(folder.rows(name), TABLES[name](), strict=True):
            for column, value in new.items():
                assert old[column] == str(value) or float(old[column]) == pytest.approx(float(value)), (name, column)
    assert [r["mean_span"] for r in noise_rows()] == sorted((r["mean_span"] for r in noise_rows()), reverse=True)


@pytest.mark.slow
def test_density_table_is_what_the_code_gives() -> None:
    old = Tables(evidence.ROOT / "assets" / "bench").rows("density")
    for before, now in zip(old, density_rows(), strict=True):
        assert float(before["tile_density"]) == pytest.approx(now["tile_density"])


@pytest.mark.slow
def test_the_pages_are_what_the_files_say(capsys: pytest.CaptureFixture[str]) -> None:
    evidence_command(root=None, check=True, as_json=False)
    assert "claims" in capsys.readouterr().out


def test_a_stale_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GenAttnError, match="has no assets/claims.json; give --root"):
        evidence_command(root=tmp_path, check=True, as_json=False)
    (tmp_path / "assets").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "assets" / "claims.json").write_text(json.dumps([vars(claim(needs="a GPU"))]))
    with pytest.raises(GenAttnError, match=r"evidence.md, scale.md must be what the files say; run: genattn evidence"):
        evidence_command(root=tmp_path, check=True, as_json=False)
    evidence_command(root=tmp_path, check=False, as_json=True)
    evidence_command(root=tmp_path, check=True, as_json=False)
    page = (tmp_path / "docs" / "evidence.md").read_text()
    # a stop at the last write leaves the old page, and nothing beside it
    (tmp_path / "docs" / "evidence.md").write_text("as it was")
    with monkeypatch.context() as stopped:
        stopped.setattr("os.replace", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evidence_command(root=tmp_path, check=False, as_json=True)
    assert (tmp_path / "docs" / "evidence.md").read_text() == "as it was"
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["evidence.md", "scale.md"]
    assert "| c | p (s) | - | - | **needs a GPU or weights not at hand** (a GPU) | - |" in page
