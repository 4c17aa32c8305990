"""The lines of docs/other-programs.md, as they stand there."""

import re
from pathlib import Path

import pytest

from genattn.hosts.diffusers_backend import backend_handle, unregister_backend
from genattn.hosts.vllm_omni import OmniAttention
from genattn.pipelines.tiny.random.build import build_pipeline

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "other-programs.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_has_these_examples() -> None:
    assert ["register_backend" in CODE[0], "genattn.attention" in CODE[1], "flash_attention_4" in CODE[2]] == [True] * 3
    assert len(CODE) == 3


def test_a_backend_by_name() -> None:
    pipe = build_pipeline("wan")[0]
    *on, off = CODE[0].strip().splitlines()
    names = {"pipe": pipe}
    try:
        exec("\n".join(on), names)
        assert backend_handle(pipe.transformer).active
        exec(off, names)
        with pytest.raises(Exception, match="must have been switched on"):
            backend_handle(pipe.transformer)
    finally:
        unregister_backend()


@pytest.mark.parametrize("code", CODE[1:], ids=["attention", "plans"])
def test_plain_examples(code: str) -> None:
    exec(compile(code, "other-programs.md", "exec"), {})


def test_the_table_names_what_the_callable_reads() -> None:
    told = set(re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE)) - set(re.findall(r"`(fl\w+)` \|", PAGE))
    described = set(re.findall(r"(?:^|\. ) *(\w+): ", OmniAttention.__doc__ or "", re.MULTILINE))
    assert told == described
