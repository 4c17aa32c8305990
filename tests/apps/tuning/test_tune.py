"""Tuning on a tiny random model: the files, the way back from a stop, and what is refused before work."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import genattn
from genattn.apps.cli import root as cli
from genattn.apps.sampling.load_pipeline import shipped_model
from genattn.apps.sampling.run import SamplingSettings, call_arguments, open_pipeline
from genattn.apps.sampling.saved_settings import attention_from_file
from genattn.apps.tuning import tune as tuning
from genattn.apps.tuning.candidates import Ground, candidates, with_dense_start
from genattn.apps.tuning.goal import Goal
from genattn.apps.tuning.tune import left_out, tune
from genattn.errors import GenAttnError
from genattn.one_writer import only_writer
from genattn.patterns.profiled import ProfiledPattern
from genattn.planning.ladder import Model
from genattn.seam.handle import Handle

PROMPTS = ["a cat", "a dog"]
WAN = Model("WanTransformer3DModel", 2, 2)


@pytest.fixture
def settings(random_wan_folder: Path) -> SamplingSettings:
    return SamplingSettings(str(random_wan_folder), frames=17, height=128, width=128, steps=2, guidance_scale=1.0, device="cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse runs take a third of the time of dense ones: the choice must not hang on the machine."""

    def timed(pipe: Any, call: Any, prompt: str, seed: int, setting: Any, title: str) -> Any:
        found = tuning.run_once(pipe, call, prompt, seed, setting, title)
        seconds = 3.0 if setting.pattern is None else 1.0 + found.density / 10
        return replace(found, seconds=seconds), seconds

    monkeypatch.setattr(tuning, "timed", timed)
    monkeypatch.setattr(tuning, "warm_up", lambda *_: None)


def test_a_folder_that_another_run_writes_is_refused(settings: SamplingSettings, tmp_path: Path) -> None:
    with (
        only_writer(tmp_path / "t", "--out"),
        pytest.raises(GenAttnError, match="t is in use: another run writes there .*--out"),
    ):
        tune(settings, PROMPTS, Goal(budget=2), tmp_path / "t")
    assert not (tmp_path / "t" / "journal.jsonl").exists()


@pytest.mark.usefixtures("clock")
def test_from_prompts_to_one_file_that_runs(settings: SamplingSettings, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    found = tune(
        settings, PROMPTS, Goal(budget=2), tmp_path, families=("window", "profiled"), densities=(0.4,),
        tell=lambda *at: told.append(at),
    )  # fmt: skip
    assert found.chosen is not None
    assert found.chosen.speedup >= 2
    assert {"window 2 of 5 frames", "profiled 0.4 + mean", "profiled 0.4 + mean2"} <= {row.name for row in found.rows}
    assert any(row.name.endswith("dense start") for row in found.rows)
    assert found.chosen.psnr == max(row.psnr for row in found.rows if row.prompts == 2 and row.speedup >= 2)
    assert (tmp_path / "front.png").stat().st_size > 5000
    assert told[0][2] == "profile"
    assert all(done <= total for done, total, _ in told)
    notes = json.loads((tmp_path / "settings.json").read_text())["_notes"]
    assert notes["goal"] == {"budget": 2}
    assert notes["size"]["num_frames"] == 17
    # every way in reads it: the command line, and Python
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    attention = attention_from_file(moved / "settings.json")
    assert attention.schedule in ({"dense_steps": 0, "dense_layers": 0}, {"dense_steps": 0.25, "dense_layers": 1})
    pipe = tuning.open_pipeline(settings)
    with genattn.apply(pipe, f"settings:{moved / 'settings.json'}") as handle:
        result = tuning.run_once(pipe, tuning.call_arguments(pipe, settings), "a cat", 0, tuning.DENSE, "again")
        assert result.frames.shape[0] == 17
        assert handle.report().density < 1  # type: ignore[operator]


@pytest.mark.usefixtures("clock")
def test_a_stop_at_any_run_loses_nothing_and_changes_nothing(
    settings: SamplingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: dict[str, Any] = {"families": ("window",), "densities": (0.2, 0.4)}
    whole = tune(settings, PROMPTS, Goal(min_psnr=1), tmp_path / "whole", **wanted)
    lines = (tmp_path / "whole" / "journal.jsonl").read_text().splitlines()
    stock, counter = tuning.run_once, itertools.count(1)

    def stopping(*given: Any) -> Any:
        if next(counter) % 4 == 0:
            raise KeyboardInterrupt
        return stock(*given)

    monkeypatch.setattr(tuning, "run_once", stopping)
    for _ in range(20):
        try:
            again = tune(settings, PROMPTS, Goal(min_psnr=1), tmp_path / "stopped", **wanted)
            break
        except KeyboardInterrupt:
            continue
    assert [(r.name, r.prompts, r.psnr, r.speedup) for r in again.rows] == [
        (r.name, r.prompts, r.psnr, r.speedup) for r in whole.rows
    ]
    assert again.chosen == whole.chosen or (again.chosen and whole.chosen and again.chosen.name == whole.chosen.name)
    assert len((tmp_path / "stopped" / "journal.jsonl").read_text().splitlines()) == len(lines)
    # another goal asks nothing anew
    monkeypatch.setattr(tuning, "run_once", lambda *_: pytest.fail("all of it is in the journal"))
    chosen_before = (tmp_path / "whole" / "settings.json").read_text()
    missed = tune(settings, PROMPTS, Goal(min_psnr=1, budget=50), tmp_path / "whole", **wanted)
    assert missed.chosen is None
    assert "no setting that is faster than dense reaches" in missed.why
    assert not (tmp_path / "whole" / "settings.json").exists()
    assert (tmp_path / "whole" / "settings-before.json").read_text() == chosen_before
    assert missed.why.endswith(f"what an earlier goal chose is in {tmp_path / 'whole' / 'settings-before.json'}")
    with pytest.raises(GenAttnError, match="belongs to a request with other prompts"):
        tune(settings, ["a bird"], Goal(budget=2), tmp_path / "whole", **wanted)


@pytest.mark.usefixtures("clock")
def test_weights_under_the_same_name_are_told_apart(settings: SamplingSettings, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(str(settings.model), folder)
    settings = replace(settings, model=str(folder))
    wanted: dict[str, Any] = {"families": ("profiled",), "densities": (0.4,)}
    tune(settings, PROMPTS, Goal(min_psnr=1), out, **wanted)
    old = (out / "map.safetensors").read_bytes()
    given = {**wanted, "profile_map": tmp_path / "map.safetensors"}
    given["profile_map"].write_bytes(old)
    tune(settings, PROMPTS, Goal(min_psnr=1), tmp_path / "given", **given)
    file = next((folder / "transformer").glob("*.safetensors"))
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(GenAttnError, match="belongs to a request with other weights; name another --out"):
        tune(settings, PROMPTS, Goal(min_psnr=1), out, **wanted)
    # begun anew, nothing of the old weights is left: the map neither
    (out / "journal.jsonl").unlink()
    tune(settings, PROMPTS, Goal(min_psnr=1), out, **wanted)
    assert (out / "map.safetensors").read_bytes() != old
    assert (out / "map-before.safetensors").read_bytes() == old
    given["profile_map"].write_bytes((out / "map.safetensors").read_bytes())
    with pytest.raises(GenAttnError, match="belongs to a request with other map; name another"):
        tune(settings, PROMPTS, Goal(min_psnr=1), tmp_path / "given", **given)


def test_speed_is_of_the_processor_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter((10.0, 14.0, 10.0, 14.0))
    monkeypatch.setattr(tuning.time, "process_time", lambda: next(ticks))
    monkeypatch.setattr(tuning, "run_once", lambda *_: SimpleNamespace(seconds=99.0))
    pipes: list[Any] = [SimpleNamespace(device="cpu"), SimpleNamespace(device="cuda:0")]
    assert [tuning.timed(pipe, {}, "a", 0, tuning.DENSE, "t")[1] for pipe in pipes] == [4.0, 99.0]


def test_refused_before_a_model_is_opened(settings: SamplingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "open_pipeline", lambda *_: pytest.fail("opened"))
    goal = Goal(budget=2)
    for wrong, says in (
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [" "]}, "at least one prompt"),
        ({"goal": Goal(min_oracle=0.9)}, "needs a model of the tiny world"),
        ({"families": ()}, "--try must be among"),
        ({"densities": ()}, "--densities must be shares"),
    ):
        given: dict[str, Any] = {"prompts": PROMPTS, "goal": goal, "out": tmp_path / "out"} | wrong
        with pytest.raises(GenAttnError, match=says):
            tune(settings, **given)
    assert not (tmp_path / "out").exists()


def test_the_command(
    random_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"tune --model {random_wan_folder} --frames 9 --height 64 --width 64 --steps 1 --device cpu --prompt cat"
    words += f" --min-psnr 500 --try radial --densities 0.4 --out {tmp_path}"
    monkeypatch.setattr("sys.argv", ["genattn", *words.split(), "--json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1  # ran, and did not reach the goal
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["chosen"] is None
    assert found["settings"] is None
    assert "genattn: no setting" in told.err
    monkeypatch.setattr("sys.argv", ["genattn", *words.split()])
    with pytest.raises(SystemExit):
        cli.main()
    assert "on the front" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "told"), [("", str(shipped_model())), ("--model mine", "mine")])
def test_the_line_to_paste_names_the_model(
    model: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --model `generate` takes another model than `tune`, which the settings are not of."""
    found = SimpleNamespace(rows=[], folder=tmp_path, chosen=SimpleNamespace(name="window", speedup=2.0, psnr=30.0))
    monkeypatch.setattr(tuning, "tune", lambda *args, **kwargs: found)
    monkeypatch.setattr("sys.argv", ["genattn", *f"tune {model} --prompt cat --budget 2x --out {tmp_path}".split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert f"use it: genattn generate --model {told} --settings {tmp_path / 'settings.json'}" in capsys.readouterr().out


def test_what_is_tried() -> None:
    video = candidates(Ground(WAN, (8, 16, 16)))
    names = [setting.name for setting in video]
    assert names[:4] == ["window 1 of 8 frames", "window 2 of 8 frames", "window 3 of 8 frames", "window 5 of 8 frames"]
    assert {"radial", "gna 0.25", "adaptive 0.17"} <= set(names)
    assert len(set(names)) == len(names) == len({setting.pattern for setting in video})
    assert all(setting.schedule == {"dense_steps": 0, "dense_layers": 0} for setting in video)
    assert with_dense_start(video[0]).schedule == {"dense_steps": 0.25, "dense_layers": 1}
    picture = candidates(Ground(WAN, (1, 32, 32)))
    assert not any(setting.name.startswith(("window", "radial")) for setting in picture)
    shipped = Path(tuning.__file__).resolve().parents[2] / "assets" / "maps" / "tiny-wan.safetensors"
    mapped = candidates(Ground(WAN, (8, 16, 16), shipped), ("profiled",), (0.25,))
    assert [s.pattern for s in mapped] == [ProfiledPattern(str(shipped), density=0.25, tail=t) for t in ("mean", "mean2")]  # type: ignore[arg-type]
    with pytest.raises(GenAttnError, match="have nothing to try"):
        candidates(Ground(WAN, (1, 32, 32)), ("window", "radial"))
    for families, densities, message in (
        (("window", "x"), (0.25,), "--try must be among window, .*, got x"),
        ((), (0.25,), "got none"),
        (("window",), (0.25, 1.0, 0.0), r"--densities must be shares of the scores in \(0, 1\), got \[1.0, 0.0\]"),
        (("window",), (), "--densities .* got none"),
    ):
        with pytest.raises(GenAttnError, match=message):
            candidates(Ground(WAN, (8, 16, 16)), families, densities)


def test_what_is_left_out_is_said() -> None:
    assert left_out(["a"], None, None) == ["profiled maps are left out: they need 2 different prompts, or --map"]
    assert left_out(["a", "b"], None, None) == left_out(["a"], ["radial"], None) == left_out(["a"], None, Path("m")) == []


@pytest.mark.parametrize(("given", "left"), [(True, "map.safetensors"), (False, "map-before.safetensors")])
def test_a_map_without_a_journal_is_put_aside_unless_it_is_asked_for(
    given: bool, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    for name in ("refuse_early", "open_pipeline", "ProfiledPattern", "is_tiny_world"):
        monkeypatch.setattr(tuning, name, lambda *_: None)
    monkeypatch.setattr(tuning, "call_arguments", lambda *_: {})
    monkeypatch.setattr(tuning, "pipeline_fingerprint", lambda *_: "aa")
    monkeypatch.setattr(tuning._Search, "ground", stopped)
    own = tmp_path / "map.safetensors"
    own.write_bytes(b"x")
    with pytest.raises(KeyboardInterrupt):
        tune(SamplingSettings("m"), ["a"], Goal(budget=2), tmp_path, profile_map=own if given else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.jsonl", left]


def test_a_model_without_a_known_grid_is_refused(settings: SamplingSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = open_pipeline(settings)
    tuned = object.__new__(tuning._Search)
    tuned.pipe, tuned.call, tuned.texts = pipe, call_arguments(pipe, settings), PROMPTS
    monkeypatch.setattr(Handle, "explain", lambda self, **call: SimpleNamespace(grid=None))
    with pytest.raises(GenAttnError, match="tune needs a model whose token grid is known, and that of .* is not"):
        tuned.ground((), None, Path())
