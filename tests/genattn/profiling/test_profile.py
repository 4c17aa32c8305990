"""Profiling a pipeline: a map that is met, resumes, refuses what it must, and runs as a static plan."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import genattn
from genattn.errors import GenAttnError
from genattn.layouts.site import AttentionSite, SiteKind
from genattn.one_writer import only_writer
from genattn.patterns.profiled import ProfiledPattern
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.profiling.draw import draw_profile, worst_heads
from genattn.profiling.profile import profile
from genattn.profiling.recorder import Recorder
from genattn.seam.plugin import AttentionCall, Inner, Plugin
from genattn.selection.profile_map import read_map

WIDE = {"num_frames": 17, "height": 128, "width": 128, "num_inference_steps": 4, "output_type": "latent"}
PROMPTS = ["a cat", "a dog", "a red circle"]


class Model:
    """A random pipeline and the prompts it was called with; breaks at a prompt when told to."""

    def __init__(self, family: str = "wan", **call: Any) -> None:
        self.pipe, own = build_pipeline(family)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = {**own, **(call or WIDE)}
        self.seen: list[str] = []
        self.breaks_at = ""

    def __call__(self, prompt: str) -> Any:
        self.seen.append(prompt)
        if prompt == self.breaks_at:
            raise KeyboardInterrupt
        return self.pipe(**{**self.call, "prompt": prompt, "generator": torch.Generator().manual_seed(0)})


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def path(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    told: list[tuple[int, int]] = []
    out = tmp_path_factory.mktemp("maps") / "map.safetensors"
    found = profile(model.pipe, model, PROMPTS, 0.3, out, progress=lambda done, total: told.append((done, total)))
    assert told == [(n, 5) for n in range(6)]
    assert model.seen == [*PROMPTS, *PROMPTS[:2]]
    assert found.path == out
    assert [row["layer"] for row in found.rows()] == [0, 1, 2]
    assert found.density == pytest.approx(0.3)
    return out


def test_the_density_asked_for_is_met_on_the_seam(model: Model, path: Path) -> None:
    """Within two points, at the profiled size and at another one, with a plan that is made once."""
    for density, more in ((None, {}), (0.5, {}), (0.4, {"num_frames": 9, "width": 160})):
        pattern = ProfiledPattern(str(path), density=density)
        with genattn.apply(model.pipe, pattern, dense_steps=0, dense_layers=0) as handle:
            model.pipe(**{**model.call, **more, "prompt": "a bird"})
            report = handle.report()
        assert report.sparse_calls == report.calls > 0
        assert report.density == pytest.approx(density or 0.3, abs=0.02)
    assert path.stat().st_size < 200_000


def test_it_is_near_the_best_choice_and_beats_an_even_map(model: Model, path: Path) -> None:
    """What is expected falls as the share grows, and a map never expects more than it would with equal shares."""
    found = read_map(path)
    known = list(found.header.shares)
    for value in ("mass", "loss"):
        errors = found.tensors[f"error.{value}"]
        assert (errors[..., -1] < 1e-6).all()
        assert (errors[..., 0] >= errors[..., -1]).all()
        for share in (0.1, 0.3, 0.6):
            even = float(errors[..., known.index(share)].sum())
            assert float(found.expected_error(value, share).sum()) <= even * 1.01


def test_an_interrupted_profile_goes_on(tmp_path: Path, path: Path) -> None:
    model, out = Model(), tmp_path / "map.safetensors"
    model.breaks_at = PROMPTS[2]
    with pytest.raises(KeyboardInterrupt):
        profile(model.pipe, model, PROMPTS, 0.3, out)
    part = tmp_path / "map.safetensors.part.safetensors"
    assert part.is_file()
    assert not out.exists()
    with safe_open(part, "pt") as file:
        assert json.loads(file.metadata()["record"])["done"] == 2
        assert max(file.get_tensor(name).numel() for name in file.keys()) < 4 * 5 * 8 * 8 * 8  # noqa: SIM118
    model.breaks_at, model.seen = "", []
    profile(model.pipe, model, PROMPTS, 0.3, out)
    assert model.seen == [PROMPTS[2], *PROMPTS[:2]]
    assert not part.exists()
    whole, again = read_map(path), read_map(out)
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), name


def test_an_unfinished_profile_of_other_settings_is_refused(tmp_path: Path) -> None:
    model, out = Model(), tmp_path / "map.safetensors"
    model.breaks_at = PROMPTS[1]
    with pytest.raises(KeyboardInterrupt):
        profile(model.pipe, model, PROMPTS, 0.3, out)
    with pytest.raises(GenAttnError, match="was made with other prompts, samples; delete it"):
        profile(model.pipe, model, ["a", "b"], 0.3, out, samples=2)
    part = tmp_path / "map.safetensors.part.safetensors"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(GenAttnError, match="cannot be read .*; delete it to start again"):
        profile(model.pipe, model, PROMPTS, 0.3, out)


def test_an_unfinished_profile_of_other_steps_or_seed_is_refused(tmp_path: Path) -> None:
    model, out = Model(), tmp_path / "map.safetensors"
    model.breaks_at = PROMPTS[1]
    with pytest.raises(KeyboardInterrupt):
        profile(model.pipe, model, PROMPTS, 0.3, out, settings={"steps": 8, "seed": 0})
    for settings in ({"steps": 9, "seed": 0}, {"steps": 8}, None, {"steps": 8, "seed": 0, "height": 64}):
        with pytest.raises(GenAttnError, match="was made with other settings; delete it"):
            profile(model.pipe, model, PROMPTS, 0.3, out, settings=settings)
    model.breaks_at, model.seen = "", []
    profile(model.pipe, model, PROMPTS, 0.3, out, settings={"seed": 0, "steps": 8})
    assert model.seen == [*PROMPTS[1:], *PROMPTS[:2]]


def test_an_unfinished_profile_of_other_weights_is_refused(tmp_path: Path) -> None:
    model, out = Model(), tmp_path / "map.safetensors"
    model.breaks_at = PROMPTS[1]
    with pytest.raises(KeyboardInterrupt):
        profile(model.pipe, model, PROMPTS, 0.3, out)
    with torch.no_grad():
        model.pipe.transformer.proj_out.weight += 1
    with pytest.raises(GenAttnError, match="was made with other weights; delete it"):
        profile(model.pipe, model, PROMPTS, 0.3, out)


def test_a_map_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    model, out = Model(), tmp_path / "map.safetensors"
    with only_writer(out, "--out"), pytest.raises(GenAttnError, match="is in use: another run writes there"):
        profile(model.pipe, model, PROMPTS, 0.3, out)
    assert model.seen == []


def test_a_damaged_unfinished_profile_is_refused(tmp_path: Path) -> None:
    model, out = Model(), tmp_path / "map.safetensors"
    model.breaks_at = PROMPTS[1]
    with pytest.raises(KeyboardInterrupt):
        profile(model.pipe, model, PROMPTS, 0.3, out)
    part = tmp_path / "map.safetensors.part.safetensors"
    with safe_open(part, "pt") as file:
        record = json.loads(file.metadata()["record"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    first = sorted(tensors)[0]
    changed: list[tuple[Any, Any]] = [
        (record | {"done": done}, tensors) for done in (0, -1, 1.5, "x", None, True, len(PROMPTS) + 1)
    ]
    changed += [(record | {"segments": segments}, tensors) for segments in (None, [], [{}], [{"kind": "x", "shape": [1]}])]
    changed += [([], tensors), ({name: value for name, value in record.items() if name != "segments"}, tensors)]
    changed += [
        (record, tensors | {first: tensors[first][:, :-1].clone()}),
        (record, tensors | {first: tensors[first] * torch.nan}),
    ]
    changed += [
        (record, tensors | {name: tensors[first].clone()}) for name in ("x", "mass.99.0.key", "mass.0.9.key", "what.0.0.key")
    ]
    whole = {part: tensors[f"{first.rsplit('.', 1)[0]}.{part}"].clone() for part in ("offset", "key", "query")}
    changed += [
        (record, tensors | {f"{name}.{part}": x for part, x in whole.items()}) for name in ("mass.99.0", "mass.0.9", "what.0.0")
    ]
    model.seen = []
    for about, content in changed:
        save_file(content, part, metadata={"record": json.dumps(about)})
        with pytest.raises(GenAttnError, match="the unfinished profile .*|layout|segment"):
            print(about, profile(model.pipe, model, PROMPTS, 0.3, out))
    assert model.seen == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": ["a"]}, "needs at least 2 different prompts, got 1: a map of one prompt"),
        ({"prompts": ["a", "a"]}, "needs at least 2 different prompts, got 1"),
        ({"target_density": 0.0}, r"target_density must be in \(0, 1\], got 0.0"),
        ({"bands": (0.5, 0.2, 1.0)}, "bands must rise within"),
        ({"bands": (0.5, 0.9)}, "bands must rise within"),
        ({"samples": 0}, "samples must be a number of queries per cell >= 1, got 0"),
        ({"out": "map.bin"}, "out must end in .safetensors, got 'map.bin'"),
    ],
)
def test_refused_before_anything_runs(model: Model, changes: dict[str, Any], says: str) -> None:
    model.seen = []
    with pytest.raises(GenAttnError, match=says):
        profile(model.pipe, model, **({"prompts": PROMPTS, "target_density": 0.3} | changes))
    assert model.seen == []


class _Spoiled(Plugin):
    """Makes queries NaN, as a model that overflows in half precision would."""

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        return inner(call.with_tensors(query=call.query * float("nan")))


def test_activations_that_are_not_finite(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "map.safetensors"
    with genattn.apply(model.pipe, _Spoiled()), pytest.raises(GenAttnError, match="holds values that are not finite; nothing"):
        profile(model.pipe, model, PROMPTS, 0.3, out)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_profiled(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "map.safetensors"
    with pytest.raises(GenAttnError, match="nothing could be profiled: no self-attention was called"):
        profile(model.pipe, lambda prompt: None, PROMPTS, 0.3, out)
    sizes = iter([128, 160])

    def growing(prompt: str) -> Any:
        return model.pipe(**{**model.call, "prompt": prompt, "width": next(sizes)})

    with pytest.raises(GenAttnError, match="all prompts of a profile must have the same size, got grid 5x8x8 and grid 5x8x10"):
        profile(model.pipe, growing, PROMPTS, 0.3, out)
    bare = model.pipe.transformer

    def forward(prompt: str) -> Any:
        hidden = torch.zeros(1, bare.config.in_channels, 5, 16, 16)
        return bare(hidden, torch.tensor([1.0]), torch.zeros(1, 4, bare.config.text_dim))

    with pytest.raises(GenAttnError, match="needs to know the sampling step and the number of steps"):
        profile(bare, forward, PROMPTS, 0.3, tmp_path / "other.safetensors")


def test_a_map_of_another_model_is_refused_before_anything_changes(path: Path) -> None:
    other, _ = build_pipeline("sd3")
    before = {name: type(p) for name, p in other.transformer.attn_processors.items()}
    with pytest.raises(GenAttnError, match="was made for WanTransformer3DModel with 3 layers"):
        genattn.apply(other, ProfiledPattern(str(path)))
    assert {name: type(p) for name, p in other.transformer.attn_processors.items()} == before


def test_joint_attention_with_text(tmp_path: Path) -> None:
    """Text is in the same sequence: it stays exact, and the grid's own share is met."""
    model = Model("sd3", height=64, width=64, num_inference_steps=2, output_type="latent")
    out = tmp_path / "map.safetensors"
    profile(model.pipe, model, PROMPTS[:2], 0.4, out, bands=(1.0,))
    header = read_map(out).header
    assert header.grid[0] == 1
    assert "text" in header.layout
    with genattn.apply(model.pipe, ProfiledPattern(str(out)), dense_steps=0, dense_layers=0) as handle:
        model("a bird")
        assert handle.report().sparse_calls > 0


def test_picture(path: Path, tmp_path: Path) -> None:
    figure = draw_profile(read_map(path), tmp_path / "map.png", worst=2)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    errors = read_map(path).expected_error("loss", 0.3).mean(-1).sqrt()
    layer, head = worst_heads(errors, 1)[0]
    assert titles[:3] == ["share of the scores", "expected error", f"layer {layer} head {head}"]
    assert float(errors[layer, head]) == pytest.approx(float(errors.max()))


def _sites(*heads: int, kind: SiteKind = "self") -> list[AttentionSite]:
    return [AttentionSite(f"blocks.{depth}", "blocks", depth, depth, kind, count) for depth, count in enumerate(heads)]


class Other(torch.nn.Module):
    """A model of another class."""


def test_models_that_share_no_map() -> None:
    with pytest.raises(GenAttnError, match="Module has no self or joint attention in its blocks; nothing to profile"):
        Recorder((1.0,), 4).attach(torch.nn.Module(), _sites(2, 2, kind="cross"))
    with pytest.raises(GenAttnError, match=r"the same number of heads in every layer, got \[2, 3\]; not served yet"):
        Recorder((1.0,), 4).attach(torch.nn.Module(), _sites(2, 3, 2))
    recorder = Recorder((1.0,), 4)
    recorder.attach(torch.nn.Module(), _sites(2, 2))
    recorder.attach(torch.nn.Module(), _sites(2, 2))
    with pytest.raises(GenAttnError, match="all denoisers of a pipeline must be alike to share a map, got Module and Other"):
        recorder.attach(Other(), _sites(2, 2))
    for heads in ((2, 2, 2), (3, 3)):
        with pytest.raises(GenAttnError, match="must be alike to share a map, got Module and Module"):
            recorder.attach(torch.nn.Module(), _sites(*heads))


def test_a_picture_needs_matplotlib(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GenAttnError, match="drawing a map needs matplotlib; pip install matplotlib"):
        draw_profile(read_map(path), tmp_path / "map.png")
