"""README's generated parts are what the files say, and a page without marks is refused."""

from pathlib import Path

import pytest

from genattn.apps.pages.readme_parts import fill, main, markdown_table, quality_table, speed_table
from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.errors import GenAttnError

PAGE = "top\n<!-- begin generated: a -->\nold\n<!-- end generated: a -->\nbottom\n"


def test_fill_replaces_only_the_marked_part() -> None:
    once = fill(PAGE, {"a": "new \\1 text"})
    assert once == "top\n<!-- begin generated: a -->\nnew \\1 text\n<!-- end generated: a -->\nbottom\n"
    assert fill(once, {"a": "new \\1 text"}) == once


def test_fill_refuses() -> None:
    with pytest.raises(GenAttnError, match=r"the page marks \['a'\], the parts are \['b'\]"):
        fill(PAGE, {"b": ""})
    with pytest.raises(GenAttnError, match="one begin and one end mark, found 0"):
        fill(PAGE.replace("end generated", "finish"), {"a": ""})


def test_markdown_table() -> None:
    assert markdown_table(["x", "y"], [["1", "2"]]).splitlines() == ["| x | y |", "| --- | ---: |", "| 1 | 2 |"]


def test_rows_append_and_widen(tmp_path: Path) -> None:
    file = tmp_path / "bench" / "a.csv"
    append_rows(file, [{"x": 1}])
    append_rows(file, [{"x": 2, "y": 3}])
    assert file.read_text() == "x,y\n1,\n2,3\n"


def test_provenance_names_what_a_row_must_carry() -> None:
    found = provenance("cpu")
    assert found["device"].startswith("CPU, ")
    assert {"torch_version", "diffusers_version", "genattn_version", "commit", "date"} <= set(found)
    assert all(found.values())


def test_quality_table_takes_the_newest_block(tmp_path: Path) -> None:
    common = {"height": 64, "width": 64, "num_frames": 29, "num_inference_steps": 20, "n": 2, **provenance("cpu")}
    for seconds in (9.0, 1.5):
        rows = [
            {"attention": "dense", "seconds": seconds, "speedup": 1.0, "colour": 1.0, "colour_low": 0.5, "colour_high": 1.0},
            {"attention": "radial@0.5", "seconds": seconds, "speedup": 0.9, "psnr": 30.0},
        ]
        append_rows(tmp_path / "c.csv", [row | common for row in rows])
    table = quality_table(tmp_path / "c.csv")
    assert "| radial, dense steps 0.5 |" in table
    assert "| 1 [0.5, 1] |" in table
    assert "1.5" in table
    assert "| 9 " not in table
    assert "512 tokens" in table
    with pytest.raises(GenAttnError, match="is not there; measure first"):
        quality_table(tmp_path / "none.csv")


def test_readme_is_what_the_files_say() -> None:
    assert main(["--check"]) == 0, "run: make tables"


def test_speed_table_leaves_out_what_was_wrong(tmp_path: Path) -> None:
    common = {
        "case": "radial 41x16x32",
        "dtype": "float32",
        "head_dim": 64,
        "density": 0.25,
        "loadavg": 1.5,
        "dense": "sdpa:flash",
    }
    rows = [
        {"impl": "cpu", "correct": True, "seconds": 0.5, "speedup": 4.0, "ratio": 1.0},
        {"impl": "grouped", "correct": False},
    ]
    append_rows(tmp_path / "a.csv", [common | {"dense": "sdpa:flash"} | row | provenance("cpu") for row in rows])
    table = speed_table(tmp_path / "a.csv")
    assert "| radial 41x16x32, float32, D 64 | cpu | 0.250 | 500 | 4.00x | 1.00 |" in table
    assert "grouped" not in table
    assert "load average 1.5" in table
