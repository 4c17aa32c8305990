"""What every page's code relies on holds for the oldest diffusers that the package accepts."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DTYPE_SINCE = (0, 40)  # DiffusionPipeline.from_pretrained reads `dtype` from this version on; older ones ignore it silently


def _floor(package: str) -> tuple[int, ...]:
    found = re.search(rf'"{package}>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return tuple(int(part) for part in found.group(1).split("."))


def test_the_oldest_diffusers_reads_the_dtype_that_the_pages_give() -> None:
    assert _floor("diffusers") >= DTYPE_SINCE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_name_the_dtype_in_one_way_and_need_no_ffmpeg(page: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    assert "torch_dtype" not in code
    assert "export_to_video" not in code, "it needs a ffmpeg that is not installed; use genattn.save_video"
