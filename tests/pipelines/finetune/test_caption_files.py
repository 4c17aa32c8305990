"""Captions and metadata as editors save them."""

import io
import json
import tarfile
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
