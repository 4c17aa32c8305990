"""Clips and captions: both forms are read, and nothing that cannot be used goes without a word."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from genattn.apps.sampling.output_files import write_video
from genattn.errors import GenAttnError
from genattn.pipelines.finetune.data import ClipSource, find_clips, read_clip


def video(path: Path, frames: int = 9, height: int = 32, width: int = 48, level: int = 120) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.full((frames, height, width, 3), level, np.uint8), 8.0, {})
    return path


def names(dataset) -> list[str]:
    return [clip.name for clip in dataset.clips]


def test_captions_beside_clips(tmp_path: Path) -> None:
    for name in ("b.mp4", "sub/a.mp4", "mute.mp4", "empty.mp4"):
        video(tmp_path / name)
    (tmp_path / "b.txt").write_text("a red circle\n")
    (tmp_path / "sub" / "a.txt").write_text("a blue ring")
    (tmp_path / "empty.txt").write_text(" \n")
    found = find_clips(tmp_path)
    assert [(c.name, c.caption) for c in found.clips] == [("b.mp4", "a red circle"), ("sub/a.mp4", "a blue ring")]
    assert dict(found.skipped).keys() == {"mute.mp4", "empty.mp4"}
    assert "no caption" in found.summary()
    assert "its caption is empty" in found.summary()


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_captions_in_a_table(tmp_path: Path, form: str) -> None:
    video(tmp_path / "a.mp4")
    if form == "jsonl":
        rows = [{"file_name": "a.mp4", "text": "one"}, {"file_name": "gone.mp4", "text": "two"}]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        (tmp_path / "metadata.csv").write_text("video,caption\na.mp4,one\ngone.mp4,two\n")
    found = find_clips(tmp_path)
    assert [c.caption for c in found.clips] == ["one"]
    assert found.skipped == [("gone.mp4", "named in the metadata, but there is no such clip")]


def test_webdataset_tar(tmp_path: Path) -> None:
    clip = video(tmp_path / "x.mp4", level=60).read_bytes()
    members = {
        "000.mp4": clip,
        "000.txt": b"a cat",
        "001.mp4": clip,
        "001.json": b'{"caption": "a dog"}',
        "002.mp4": clip,
        "003.mp4": clip,
        "003.txt": b"\xff\xfe",
        "004.txt": b"no clip",
    }
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "s.tar", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    for source in (tmp_path / "shards", tmp_path / "shards" / "s.tar"):
        found = find_clips(source)
        assert [(c.name, c.caption) for c in found.clips] == [("s.tar/000.mp4", "a cat"), ("s.tar/001.mp4", "a dog")]
        assert [name for name, _ in found.skipped] == ["s.tar/002.mp4", "s.tar/003.mp4"]
    frames = read_clip(found.clips[0], 5, 16, 16)
    assert frames.shape == (5, 16, 16, 3)
    assert abs(frames.astype(int) - 60).max() <= 4


def test_clips_are_cut_around_the_middle(tmp_path: Path) -> None:
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :, 16:48] = 200
    write_video(tmp_path / "a.mp4", frames, 8.0, {})
    (tmp_path / "a.txt").write_text("x")
    got = read_clip(find_clips(tmp_path).clips[0], 3, 16, 16)
    assert got[:, :, 2:-2].min() > 180


@pytest.mark.parametrize("kind", ["short", "broken", "gone"])
def test_clips_that_cannot_serve_say_why(tmp_path: Path, kind: str) -> None:
    path = video(tmp_path / "a.mp4", frames=3)
    (tmp_path / "a.txt").write_text("x")
    clip = find_clips(tmp_path).clips[0]
    if kind == "broken":
        path.write_bytes(b"not a video")
    elif kind == "gone":
        path.unlink()
    with pytest.raises(GenAttnError, match="has 3 frames and 5 are needed" if kind == "short" else "cannot be read"):
        read_clip(clip, 5, 16, 16)


def test_datasets_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="there is no"):
        find_clips(tmp_path / "nowhere")
    with pytest.raises(GenAttnError, match="found none in"):
        find_clips(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(GenAttnError, match="no clip of the dataset can be used, 1 were skipped: a.mp4: no caption"):
        find_clips(tmp_path)
    with pytest.raises(GenAttnError, match="got the file"):
        find_clips(tmp_path / "a.mp4")
    (tmp_path / "s.tar").write_bytes(b"x" * 600)
    with pytest.raises(GenAttnError, match="cannot be read as a tar"):
        find_clips(tmp_path / "s.tar")


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "line 1 must be a JSON object"), ("[1]", "must be a JSON object, got"), ('{"text": "x"}', "must name its clip")],
)
def test_metadata_that_is_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(GenAttnError, match=match):
        find_clips(tmp_path)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_that_is_cut_off_is_refused(kind: str, tmp_path: Path) -> None:
    clip, text = video(tmp_path / "a.mp4"), tmp_path / "a.txt"
    text.write_text("a red circle")
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, f"w:{kind}") as archive:  # type: ignore[call-overload]
        for file in (clip, text):
            archive.add(file, file.name)
    assert names(find_clips(whole)) == ["whole.tar/a.mp4"]
    content = whole.read_bytes()
    (tmp_path / "data").mkdir()
    cut = tmp_path / "data" / "cut.tar"
    for share in (0.0, 0.1, 0.5, 0.9):
        cut.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(GenAttnError, match=r"cut.tar cannot be read as a tar \(.*\); make it again") as told:
            find_clips(cut)
        assert "\n" not in str(told.value)
    cut.write_bytes(content)
    source = find_clips(cut).clips[0]
    cut.write_bytes(content[: len(content) // 2])  # cut off after it was looked through
    with pytest.raises(GenAttnError, match="cannot be read as a video"):
        read_clip(source, 5, 32, 32)


def test_a_caption_is_never_cut_at_a_comma(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,a red circle, seen from above\n")
    with pytest.raises(GenAttnError, match=r"more cells than columns; put captions with commas in quotes: .*seen from above"):
        find_clips(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.mp4,"a red circle, seen from above"\n')
    assert find_clips(tmp_path).clips[0].caption == "a red circle, seen from above"


def test_a_clip_has_one_caption(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    rows = [json.dumps({"file_name": "a.mp4", "text": text}) for text in ("one", "two")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(GenAttnError, match="must have one caption a clip, got 'one' and 'two' for a.mp4"):
        find_clips(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n".join([rows[0]] * 2))
    assert find_clips(tmp_path).clips[0].caption == "one"


def test_what_only_looks_like_a_clip_is_told_and_not_waited_for(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("a red circle")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.mp4")
    found = find_clips(tmp_path)
    assert names(found) == ["a.mp4"]
    assert found.skipped == [(name, "it is no file") for name in ("folder.mp4", "gone.mp4", "pipe.mp4")]


def test_a_member_that_is_no_file_any_more_is_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.mp4"), io.BytesIO())
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        folder = tarfile.TarInfo("a.mp4")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with pytest.raises(OSError, match="a.mp4 is no file"):
        ClipSource("a", "a cat", tmp_path / "s.tar", "a.mp4").read_bytes()
