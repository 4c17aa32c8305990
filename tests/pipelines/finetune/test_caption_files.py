"""Captions and metadata as editors save them."""

import io
import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from genattn import GenAttnError
from genattn.apps.sampling.prompt_file import read_prompts
from genattn.pipelines.finetune.data import find_clips
from genattn.pipelines.long_video.output.save_video import save_video

TEXT = "a red circle, größer"
FOREIGN = b"a man\x92s hat"  # Windows-1252


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_video(np.zeros((2, 32, 32, 3), np.uint8), tmp_path / "a.mp4", 16)
    return tmp_path


def captions(folder: Path) -> list[str]:
    return [clip.caption for clip in find_clips(folder).clips]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_text(folder: Path, encoding: str) -> None:
    (folder / "a.txt").write_text(TEXT, encoding)
    assert captions(folder) == [TEXT]
    (folder / "a.txt").unlink()
    (folder / "metadata.csv").write_text(f'file_name,text\na.mp4,"{TEXT}"\n', encoding)
    assert captions(folder) == [TEXT]
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": TEXT}) + "\r\n\r\n", encoding)
    assert captions(folder) == [TEXT]
    (folder / "p.txt").write_text(f"# note\r\n{TEXT}\r\n", encoding)
    assert read_prompts(folder / "p.txt") == [TEXT]


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x0c"])
def test_only_a_line_feed_ends_a_line_of_json(folder: Path, odd: str) -> None:
    row = json.dumps({"file_name": "a.mp4", "text": f"a red{odd}circle"}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(row + "\n", "utf-8", newline="")
    assert captions(folder) == [f"a red{odd}circle"]


def test_another_encoding_is_told_as_that(folder: Path) -> None:
    (folder / "a.txt").write_bytes(FOREIGN)
    with pytest.raises(GenAttnError, match="its caption is not UTF-8 text"):
        find_clips(folder)
    (folder / "metadata.csv").write_bytes(b"file_name,text\na.mp4," + FOREIGN + b"\n")
    with pytest.raises(GenAttnError, match=r"metadata\.csv must be UTF-8 text"):
        find_clips(folder)
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.mp4", "text": "' + FOREIGN + b'"}\n')
    with pytest.raises(GenAttnError, match=r"metadata\.jsonl must be UTF-8 text"):
        find_clips(folder)


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_captions_in_a_tar(folder: Path, suffix: str, tmp_path: Path) -> None:
    texts = {"good": TEXT.encode("utf-8-sig"), "bad": FOREIGN}
    if suffix == "json":
        texts = {"good": json.dumps({"text": TEXT}).encode("utf-8-sig"), "bad": b'{"text": "' + FOREIGN + b'"}'}
    clip = (folder / "a.mp4").read_bytes()
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, text in texts.items():
            for ending, content in (("mp4", clip), (suffix, text)):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    found = find_clips(tmp_path / "set.tar")
    assert [clip.caption for clip in found.clips] == [TEXT]
    assert found.skipped == [("set.tar/bad.mp4", "its caption is not UTF-8 text; save it as UTF-8")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_encodings_that_look_like_ascii_with_zeros_are_told_too(folder: Path, encoding: str) -> None:
    (folder / "a.txt").write_bytes("a red circle".encode(encoding))
    with pytest.raises(GenAttnError, match="its caption is not UTF-8 text"):
        find_clips(folder)
    (folder / "metadata.csv").write_bytes("file_name,text\na.mp4,a red circle\n".encode(encoding))
    with pytest.raises(GenAttnError, match=r"metadata\.csv must be UTF-8 text"):
        find_clips(folder)
    with pytest.raises(GenAttnError, match="it is not UTF-8 text"):
        read_prompts(folder / "a.txt")


def test_tables_and_lines_that_no_reader_takes(folder: Path) -> None:
    (folder / "metadata.csv").write_text(f"file_name,text\na.mp4,{'x' * 200_000}\n")
    with pytest.raises(GenAttnError, match=r"metadata\.csv must be a table of comma-separated values.*field larger"):
        find_clips(folder)
    (folder / "metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(GenAttnError, match="line 1 must be a JSON object"):
        find_clips(folder)


def test_names_with_dots(folder: Path, tmp_path: Path) -> None:
    clip = (folder / "a.mp4").read_bytes()
    (tmp_path / "shards").mkdir()
    shard = tmp_path / "shards" / "set.tar"
    texts = {"walk.v1": "one", "walk.v2": "two", "sub.dir/walk.final": "three"}
    with tarfile.open(shard, "w") as archive:
        for name, text in texts.items():
            for ending, content in (("MP4", clip), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert [clip.caption for clip in find_clips(shard).clips] == ["one", "two", "three"]
    (folder / "a.mp4").rename(folder / "a.v1.final.mp4")
    (folder / "a.v1.final.txt").write_text(TEXT)
    assert captions(folder) == [TEXT]


def test_tables_of_other_systems(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a.mp4").rename(folder / "sub" / unicodedata.normalize("NFD", "café.MP4"))
    (folder / "metadata.csv").write_text("file_name, text\r\nsub\\café.MP4, one\r\n")
    assert captions(folder) == ["one"]
    (folder / "metadata.csv").unlink()
    (folder / "sub" / unicodedata.normalize("NFD", "café.TXT")).write_text("two")
    assert captions(folder) == ["two"]


def test_a_caption_is_one_text(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": ["one", "two"]}')
    with pytest.raises(GenAttnError, match=r"a caption in .*metadata\.jsonl must be one text, got \['one', 'two'\]"):
        find_clips(folder)
