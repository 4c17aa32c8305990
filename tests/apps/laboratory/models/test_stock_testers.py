"""The configurations of diffusers' own tests: found once each, compared bit by bit, and what differs is told."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from genattn import GenAttnError
from genattn.apps.laboratory.models import stock_testers
from genattn.apps.laboratory.models.before_and_after import same_bits
from genattn.seam.handle import Handle, apply
from genattn.seam.plugin import AttentionCall, Inner, Plugin

FILE = """
import torch
from diffusers import WanTransformer3DModel, DiTTransformer2DModel


class Base:
    @property
    def model_class(self):
        return WanTransformer3DModel

    def get_init_dict(self):
        return dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
                    text_dim=16, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32)

    def get_dummy_inputs(self):
        generator = torch.Generator().manual_seed(0)
        return dict(hidden_states=torch.randn(1, 4, 12, 16, 12, generator=generator, dtype=self.dtype),
                    encoder_hidden_states=torch.randn(1, 12, 16, generator=generator, dtype=self.dtype),
                    timestep=torch.tensor([5]))

    dtype = torch.float32


class TestAgain(Base):
    "the same model, settings and inputs"


class TestBfloat16(Base):
    dtype = torch.bfloat16

    def get_dummy_inputs(self):
        return super().get_dummy_inputs()


class TestBroken(Base):
    def get_init_dict(self):
        return dict(no_such_setting=1)


class NoTester:
    model_class = WanTransformer3DModel
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    home = tmp_path / "diffusers" / "tests" / "models" / "transformers"
    home.mkdir(parents=True)
    for folder in (home, home.parent, home.parent.parent):
        (folder / "__init__.py").write_text("")
    (home / "test_models_wan.py").write_text(FILE)
    (home / "test_models_other.py").write_text("import a_package_of_this_tester_alone\n")
    return tmp_path / "diffusers"


def rows(path: Path) -> dict[str, dict[str, str]]:
    return {row["tester"]: row for row in stock_testers.read_rows(path)}


def test_every_configuration_has_a_row(checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    assert stock_testers.main(["--checkout", str(checkout), "--out", str(out)]) == 0
    got = rows(out)
    assert list(got) == ["test_models_other", *(f"test_models_wan:{name}" for name in ("Base", "TestBfloat16", "TestBroken"))]
    assert got["test_models_other"]["stock"].startswith("cannot be read: ModuleNotFoundError: No module named 'a_package")
    assert got["test_models_wan:TestBroken"]["stock"].startswith("does not run: TypeError")
    for name in ("Base", "TestBfloat16"):
        row = got[f"test_models_wan:{name}"]
        assert row["model"] == "WanTransformer3DModel"
        assert {row[key] for key in ("stock", "passed_on", "dense", "removed")} == {"yes"}
        assert row["sites"] == "4"  # cross-attention's too
        assert 0 < float(row["radial"]) < 0.8
    assert "2 of 4 configurations of 1 model classes run here" in (told := capsys.readouterr().out)
    assert "2 of them are stock's to the bit" in told
    assert not [name for name in sys.modules if name.startswith("tests.models.transformers")]
    assert str(checkout) not in sys.path


class Louder(Plugin):
    """An edit that no dense pattern makes."""

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        return inner(call) * 1.001


def _leaves_a_trace(model: Any, *plugins: Any, **settings: Any) -> Handle:
    model.blocks[0].trace = True
    return apply(model, *plugins, **settings)


FAULTS: dict[str, tuple[Any, dict[str, str]]] = {
    "edits": (lambda model, pattern, **_: apply(model, pattern, Louder()), {"dense": "differs", "removed": "yes"}),
    "leaves a trace": (_leaves_a_trace, {"dense": "yes", "removed": "left behind at blocks.0"}),
    "refuses": (lambda model, *_, **__: apply(model, object()), {"dense": "refused: plugins must", "removed": "yes"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_differs_is_told(fault: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, (broken, expected) = tmp_path / "rows.csv", FAULTS[fault]
    monkeypatch.setattr(stock_testers, "apply", broken)
    failed = stock_testers.main(["--checkout", str(checkout), "--out", str(out), "--only", "Base"])
    assert failed == (fault != "refuses")  # a refusal is no difference
    row = rows(out)["test_models_wan:Base"]
    assert {key: row[key][: len(value)] for key, value in expected.items()} == expected


def test_plugins_that_stay_on_are_told(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handle, "remove", lambda self: None)
    out = tmp_path / "rows.csv"
    assert stock_testers.main(["--checkout", str(checkout), "--out", str(out), "--only", "Base"]) == 1
    assert rows(out)["test_models_wan:Base"]["removed"] == "differs"


def test_bits_are_compared() -> None:
    one, nan = torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])
    assert same_bits([one, nan], [one.clone(), nan.clone()])
    assert not same_bits([one], [one + 1e-7])
    assert not same_bits([one], [one[:1]])
    assert not same_bits([one], [nan])
    assert not same_bits([one], [])


def test_a_folder_without_tests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="--checkout must be a checkout of diffusers"):
        stock_testers.main(["--checkout", str(tmp_path)])


def test_the_shipped_table_holds() -> None:
    """What the last full run found: nothing differs, and most testers of transformers run here."""
    ran = [row for row in stock_testers.read_rows() if row["stock"] == "yes"]
    assert len({row["model"] for row in ran}) >= 60
    assert {row["removed"] for row in ran} == {"yes"}
    assert {row["passed_on"] for row in ran if row["model"] != "UNet1DModel"} <= {"yes", "no attention was called"}
    assert {row["dense"] for row in ran if not row["dense"].startswith("refused")} <= {"yes", "no attention was called"}
