"""Every attention model of the installed diffusers is known, or has a written reason not to be."""

import ast
from pathlib import Path

import diffusers
import pytest

from genattn.layouts.families import FAMILIES
from genattn.layouts.judged import REFUSED, STAYS, judged
from genattn.pipelines.tiny.random.models import MODELS

HOME = Path(diffusers.__file__).parent / "models"


def models_of(folder: str) -> set[str]:
    """Model classes that the files of diffusers/models/<folder> define, read without importing them."""
    found = set()
    for path in sorted((HOME / folder).glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and any("ModelMixin" in ast.unparse(base) for base in node.bases):
                found.add(node.name)
    return {name for name in found if not name.startswith("Flax")}  # of older versions, no PyTorch


def known() -> set[str]:
    return {name for family in FAMILIES for name in family.models}


@pytest.mark.parametrize("folder", ["transformers", "unets"])
def test_no_model_of_diffusers_goes_unseen(folder: str) -> None:
    unseen = models_of(folder) - known() - set(judged())
    assert not unseen, f"diffusers {diffusers.__version__} has models that nobody has judged: {sorted(unseen)}"


def test_a_new_class_would_be_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "transformers").mkdir()
    code = "class Tomorrow3DModel(ModelMixin, ConfigMixin):\n    pass\n"
    (tmp_path / "transformers" / "transformer_tomorrow.py").write_text(code)
    monkeypatch.setattr(f"{__name__}.HOME", tmp_path)
    with pytest.raises(AssertionError, match=r"nobody has judged: \['Tomorrow3DModel'\]"):
        test_no_model_of_diffusers_goes_unseen("transformers")


def test_a_model_is_judged_once() -> None:
    assert not known() & set(judged())
    assert not set(REFUSED) & set(STAYS)
    assert all(judged().values())


def test_every_known_class_has_a_tiny_model() -> None:
    built = {spec.model for spec in MODELS.values()}
    # base classes of the same forward: their tiny twin is the first class of the family
    twins = {"ChronoEditTransformer3DModel"}
    assert known() - built == twins


def test_as_many_as_the_claim() -> None:
    """At least 62 of the transformers of diffusers 0.42 have a layout."""
    here = models_of("transformers")
    if len(here) < 75:
        pytest.skip(f"diffusers {diffusers.__version__} has {len(here)} transformers; the claim is of 0.42.1 and later")
    with_layout = (known() & here) - {"SanaTransformer2DModel"}  # known, and refused as linear
    assert len(with_layout) >= 62
    assert "MiniMaxH3Transformer3DModel" in with_layout
