"""The app's verbs without a server: what they give, what they refuse, how they stop and go on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from gradio_session import LIMITS, SD3, random_model, random_session
from PIL import Image

from genattn.apps.sampling.output_files import read_video
from genattn.apps.webui.verbs.head_map import cell_size
from genattn.apps.webui.verbs.hunt import CAPTION_MATCH, hunt, save_set
from genattn.apps.webui.verbs.image import image, read_head_set
from genattn.apps.webui.verbs.job import Update
from genattn.apps.webui.verbs.limits import Limits
from genattn.apps.webui.verbs.long import long, resume
from genattn.apps.webui.verbs.sampling import ClipForm, read_seed
from genattn.apps.webui.verbs.session import Session, _makes_video
from genattn.apps.webui.verbs.video import video
from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.seam.sites import denoisers


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return random_session(tmp_path_factory.mktemp("app"))


def _last(updates: Iterator[Update]) -> dict[str, Any]:
    found = list(updates)
    assert found[-1].last
    return found[-1].values


def _untouched(session: Session) -> bool:
    """Nothing of ours is left in the models."""
    models = [model for name in session.models for model in denoisers(session.open(session.models[name])).values()]
    stock = all(type(p).__module__.startswith("diffusers") for m in models for p in m.attn_processors.values())
    return stock and not any(m._forward_pre_hooks for m in models)


def _frames(path: str) -> int:
    with av.open(path) as container:
        return sum(1 for _ in container.decode(video=0))


def test_an_image_with_and_without_guidance(session: Session) -> None:
    found = _last(image(session, "a cat", "L1H0,L2H1:0.3", seed=3))
    plain, guided = (np.asarray(Image.open(path)) for path in found["pair"])
    assert plain.shape == guided.shape == (16, 16, 3)
    assert not np.array_equal(plain, guided)
    again = _last(image(session, "a cat", "L1H0", scale=0.0, seed=3))
    assert np.array_equal(plain, np.asarray(Image.open(again["pair"][0]))), "the same seed is the same picture"
    report = session.report(found["report"]["run"])
    assert report["seed"] == found["seed"] == 3
    assert report["guidance"]["counts"]["guided_steps"] == 2
    assert (report["runs"][1]["picture"], report["heads"]) == ("guided", "L1H0,L2H1:0.3")
    assert _untouched(session)


def test_a_new_seed_is_told(session: Session) -> None:
    first, second = (read_seed(0, randomize=True) for _ in range(2))
    assert first != second
    with pytest.raises(GenAttnError, match="seed must be at most"):
        read_seed(2**40, randomize=False)
    found = _last(image(session, "a cat", "L1H0", randomize_seed=True, steps=1))
    assert found["report"]["seed"] == found["seed"]


def test_a_field_left_empty_is_the_models_own() -> None:
    assert ClipForm.read(frames=0, height=0, width=None, steps=0, guidance_scale=0, negative_prompt="") == ClipForm()


def test_what_an_image_cannot_be(session: Session) -> None:
    before = len(list((session.folder / "runs").iterdir()))
    for settings, said in (
        ({"heads": ""}, "choose at least one head"),
        ({"heads": "L99"}, "layer must be one of"),
        ({"u": 2.0}, "u must be a number in"),
        ({"target": "nonsense"}, "target must be one of"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"height": 20}, "height must be a positive multiple"),
        ({"height": 128, "width": 128}, "at most 4,096 pixels"),
        ({"steps": 3000}, "at most 2,000 steps"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"model": "random-wan"}, "model must be one of random-sd3"),
        ({"prompt": " "}, "must say what to show"),
    ):
        with pytest.raises(GenAttnError, match=said):
            list(image(session, **{"prompt": "a cat", "heads": "L1H0", **settings}))
    assert len(list((session.folder / "runs").iterdir())) == before, "refused before anything is written"
    assert not session.lock.locked()


def test_a_server_without_an_image_model_says_so(tmp_path: Path, session: Session) -> None:
    other = Session(tmp_path, [str(session.models["random-wan"].source)])
    with pytest.raises(GenAttnError, match="no text-to-image model; start it with: genattn app --model"):
        image(other, "a cat", "L0H0").__next__()


def test_stop_is_within_one_step_and_leaves_nothing(session: Session) -> None:
    model = next(iter(denoisers(session.open(session.models["random-sd3"])).values()))
    calls: list[int] = []
    counter = model.register_forward_hook(lambda *_: calls.append(1))
    updates = image(session, "a cat", "L1H0", steps=2000)
    while next(updates).done < 2:
        pass
    updates.close()
    seen = len(calls)
    with session.lock:
        counter.remove()
    assert len(calls) <= seen + 1
    assert _untouched(session)


def test_a_clip_dense_beside_sparse(session: Session) -> None:
    updates = list(video(session, "a cat", "radial", '{"decay": 0.2, "floor": 0}', dense_steps=0, dense_layers=0, seed=1))
    early = [u for u in updates if "dense" in u.values and not u.last]
    assert early, "the dense clip is shown before the sparse one is made"
    found = updates[-1].values
    assert _frames(found["dense"]) == _frames(found["sparse"]) == _frames(found["pair"]) == 9
    left, right = (read_video(Path(found[name]))[0].astype(int) for name in ("dense", "sparse"))
    both = read_video(Path(found["pair"]))[0].astype(int)
    half = both.shape[2] // 2
    assert np.abs(both[:, :, :half] - left).mean() < 6, "the dense clip is the left half"
    assert np.abs(both[:, :, half:] - right).mean() < 6
    dense, sparse = found["rows"]
    assert dense["density"] == 1
    assert sparse["psnr"] > 0
    assert sparse["seconds"] > 0
    assert "attention calls" in sparse["verdict"] or "ran sparse" in sparse["verdict"]
    assert session.report(found["report"]["run"])["seed"] == 1
    assert _untouched(session)


@pytest.mark.parametrize(("name", "runs_sparse"), [("neighborhood", True), ("auto", False)])
def test_a_name_takes_the_models_own_preset(name: str, runs_sparse: bool, session: Session) -> None:
    found = list(video(session, "a cat", name, dense_steps=0, dense_layers=0, steps=1))[-1].values
    verdict = found["rows"][1]["verdict"]
    assert verdict.startswith("DENSE THROUGHOUT") != runs_sparse, verdict  # "auto" stays dense at so few tokens
    assert "no preset is known for WanTransformer3DModel" in found["report"]["preset"]
    assert found["report"]["pattern"].startswith("FittedNeighborhood" if runs_sparse else "AdaptivePattern")
    assert _untouched(session)


def test_what_a_clip_cannot_be(session: Session) -> None:
    for settings, said in (
        ({"attention": "dense"}, "choose a sparse one"),
        ({"attention": "nonsense"}, "must be one of auto, dense, radial"),
        ({"pattern_options": "{"}, "must be a JSON object"),
        ({"dense_steps": 1.5}, "share below 1"),
        ({"dense_layers": -1}, "dense layers must be >= 0"),
        ({"frames": 37}, "at most 33 frames"),
        ({"frames": 8}, "frames must be"),
    ):
        with pytest.raises(GenAttnError, match=said):
            list(video(session, **{"prompt": "a cat", **settings}))


def test_a_long_video_stops_and_goes_on(session: Session) -> None:
    settings: dict[str, Any] = {"frames": 33, "partitions": 1, "lookahead": False, "seed": 2}
    whole = _last(long(session, '0:"a cat" 16:"a dog"', **settings))
    assert _frames(whole["film"]) == 33
    updates = long(session, '0:"a cat" 16:"a dog"', **settings)
    run, segments = "", []
    for update in updates:
        run = update.values.get("run", run)
        if "segment" in update.values:
            segments.append(_frames(update.values["segment"]))
            updates.close()
    with session.lock:
        pass
    assert segments == [8], "a segment is a second"
    stopped = session.report(run)
    assert stopped["stopped"] == "interrupted"
    assert 8 <= stopped["frames"] < 33
    for frames, said in ((66, "at most 65 frames, got 66"), (-1, "frames must be >= 1, got -1")):
        with pytest.raises(GenAttnError, match=said):
            next(resume(session, run, frames))
    updates = list(resume(session, run, 0))
    (begun, *_) = [update for update in updates if update.stage == "frames"]
    assert (begun.done, begun.total) == (stopped["frames"], 33)
    assert "drift" in begun.values
    assert "segment" not in begun.values, "where the film is stands there before a new second is ready"
    rest = _last(iter(updates))
    assert _frames(rest["film"]) == 33
    assert rest["report"]["frames"] == 33
    assert {row["statistic"] for row in rest["drift"]} == {"brightness", "contrast", "saturation"}
    assert rest["drift"][:3] == whole["drift"][:3], "the plot goes on from the film's beginning"
    assert rest["drift"][-1]["frame"] == 33
    with av.open(whole["film"]) as one, av.open(rest["film"]) as other:
        pairs = zip(one.decode(video=0), other.decode(video=0), strict=True)
        worst = max(float(np.abs(a.to_ndarray(format="rgb24") - 1.0 * b.to_ndarray(format="rgb24")).mean()) for a, b in pairs)
    assert worst < 3, "the film goes on to the same frames, but for the encoder's fragments"


def test_a_long_video_begins_from_a_picture(session: Session, tmp_path: Path) -> None:
    picture = tmp_path / "start.png"
    Image.new("RGB", (50, 40), (200, 30, 30)).save(picture)
    found = _last(long(session, "a cat", 9, partitions=1, lookahead=False, start_picture=str(picture)))
    assert _frames(found["film"]) == 9
    picture.write_text("no picture")
    with pytest.raises(GenAttnError, match="whole PNG"):
        list(long(session, "a cat", 9, partitions=1, start_picture=str(picture)))


def test_a_stop_in_the_first_clip_ends_the_run(session: Session) -> None:
    updates = long(session, "a cat", 9, partitions=16)
    run = next(u.values["run"] for u in updates if "run" in u.values)
    updates.close()
    with session.lock:
        pass
    if not (session.run_folder(run) / "checkpoint.json").exists():
        with pytest.raises(GenAttnError, match="cannot go on: it was stopped before its first frame"):
            next(resume(session, run))
    assert _untouched(session)


def test_what_a_long_video_cannot_be(session: Session) -> None:
    for settings, said in (
        ({"frames": 66}, "at most 65 frames"),
        ({"frames": 0}, "frames must be >= 1"),
        ({"partitions": 17}, "at most 16 partitions"),
        ({"prompt": '0:"a" 0:"b"'}, "frames of a schedule must rise"),
        ({"fade": -1}, "fade must be >= 0"),
        ({"start_picture": "/etc/passwd"}, "must be a file ending in .png"),
        ({"drift_correction": 2.0}, "drift_correction must be 0 to 1"),
        ({"height": 512, "width": 512}, "at most 4,096 pixels"),
    ):
        with pytest.raises(GenAttnError, match=said):
            list(long(session, **{"prompt": "a cat", "frames": 9, **settings}))
    with pytest.raises(GenAttnError, match="there is no run"):
        next(resume(session, "../../etc"))


def test_a_hunt_is_watched_and_its_set_saved(session: Session) -> None:
    updates = list(hunt(session, "a cat\na dog", ["sharpness", "contrast"], pool="L1", top_k=2, batch=4, steps=1))
    maps = [u.values["map"] for u in updates if "map" in u.values and not u.last]
    assert len(maps) >= 2
    assert any("latest" in u.values for u in updates)
    layers = session.layers(session.models["random-sd3"])
    assert maps[0].width > max(layers.values()) * cell_size(layers)
    found = updates[-1].values
    assert HeadSet.load(found["head_set"]).notes["prompts"] == 2
    assert len(found["heads"].split(",")) == 2
    assert found["rounds"][0]["round"] == 1
    assert session.report(found["run"])["seeds"] == [0, 1]
    with Image.open(found["sheet"]) as sheet:
        assert sheet.width > sheet.height
    path, kept = save_set(session, found["run"], "best", keep=1)
    assert Path(path).name == "best.json"
    assert len(kept.heads) == 1
    assert read_head_set(session, path).heads == kept.heads
    assert _untouched(session)
    for name in ("../out", "", "a" * 61):
        with pytest.raises(GenAttnError, match="letters, digits"):
            save_set(session, found["run"], name)


def test_what_cannot_be_hunted(session: Session) -> None:
    for settings, said in (
        ({"prompts": "\n"}, "must say what to show"),
        ({"objectives": []}, "objectives must be some of"),
        ({"objectives": ["os:system"]}, "objectives must be some of"),
        ({"objectives": ["palette:/etc/passwd"]}, "objectives must be some of"),
        ({"objectives": [CAPTION_MATCH]}, "judges captions of the tiny world, got 'a cat'"),
        ({"rounds": 0}, "rounds must be >= 1"),
        ({"batch": 17}, "at most 16 candidates"),
        ({"rounds": 8, "prompts": "a\nb\nc\nd\ne\nf\ng\nh"}, "at most 60 pictures a hunt"),
    ):
        with pytest.raises(GenAttnError, match=said):
            list(hunt(session, **{"prompts": "a cat", "objectives": ["sharpness"], **settings}))
    run = session.new_run("hunt")
    with pytest.raises(GenAttnError, match="no head set yet"):
        save_set(session, run.name)


def test_head_sets_of_another_model_are_refused(session: Session, tmp_path: Path) -> None:
    other = HeadSet.from_names("L0H0", {0: 2}).save(tmp_path / "other.json")
    with pytest.raises(GenAttnError, match="same layers"):
        read_head_set(session, str(other))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(GenAttnError, match="readable JSON"):
        read_head_set(session, str(tmp_path / "broken.json"))


def test_runs_are_found_by_name_only(session: Session) -> None:
    run = session.new_run("image")
    assert session.run_folder(f" {run.name} ") == run
    for name in ("", "..", "/etc", f"{run.name}/../x", "20200101-000000-image-0123456789abcdef"):
        with pytest.raises(GenAttnError, match="there is no run"):
            session.run_folder(name)
    with pytest.raises(GenAttnError, match="stopped before its end"):
        session.report(run.name)
    written = session.write_report(run, {"verb": "image", "path": Path("x")})
    assert session.report(run.name) == json.loads(json.dumps(written))


def test_old_runs_make_room(tmp_path: Path, session: Session) -> None:
    # half of the room is for what the page caches
    small = Session(tmp_path, [str(session.models["random-sd3"].source)], Limits(disk_bytes=3000))
    runs = []
    for i in range(3):
        runs.append(small.new_run("image"))
        (runs[-1] / "a.bin").write_bytes(b"0" * 1000)
        # names carry seconds; the order of runs within one is of no matter
        runs[-1] = runs[-1].rename(runs[-1].with_name(f"2026010{i + 1}-000000-image-{i:016x}"))
    small.prune()
    assert [run.exists() for run in runs] == [False, False, True]


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers' own, towards the hub
def test_models_are_named_and_told_apart(tmp_path: Path) -> None:
    folder = random_model(tmp_path, "sd3", SD3)
    (folder / "genattn_defaults.json").unlink()
    twice = Session(tmp_path / "out", [str(folder), str(folder)], LIMITS)
    assert twice.names() == ["random-sd3", "random-sd3 (1)"]
    assert twice.names(video=False) == twice.names()
    for wrong, said in ((str(tmp_path), "no model_index.json"), ("owner/none", "is not in the local cache")):
        with pytest.raises(GenAttnError, match=said):
            Session(tmp_path / "out", [wrong])
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "NoSuchPipeline"))
    with pytest.raises(GenAttnError, match="NoSuchPipeline, which this diffusers does not have"):
        Session(tmp_path / "out", [str(folder)])


def test_what_is_no_pipeline_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(GenAttnError, match=f"{str(tmp_path)!r} cannot be opened: "):
        _makes_video(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "PipelineOfTomorrow"}')
    with pytest.raises(GenAttnError, match="is a PipelineOfTomorrow, which this diffusers does not have; upgrade it"):
        _makes_video(str(tmp_path))
