"""Every supported family, at tiny size: dense is stock to the bit, removal leaves nothing, the layout is the sequence's."""

import copy
import gc
import sys
from typing import Any

import pytest
import torch
from older_diffusers import ABSENT

import genattn
from genattn import DensePattern, GenAttnError, RadialPattern, TokenLayout
from genattn.layouts.families import FAMILIES, family_of, register_family
from genattn.layouts.family import Family
from genattn.layouts.site import AttentionSite
from genattn.patterns.pattern import Pattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model, families
from genattn.pipelines.tiny.random.models import MODELS
from genattn.pipelines.tiny.random.spec import TinyModel
from genattn.seam.handle import apply
from genattn.seam.plugin import AttentionCall, Inner, Plugin

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:CPU Autocast"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]
SPARSE = [f for f in families() if f != "sana"]


EVERY_KIND = ("self", "joint", "cross", "spatial", "temporal", "refiner")


class Recorder(Plugin):
    """Keeps the tensors of every call at the sites it wants."""

    def __init__(self, kinds: tuple[str, ...] = ("self", "joint", "spatial", "temporal")) -> None:
        self.kinds = kinds
        self.calls: list[AttentionCall] = []

    def wants(self, site: AttentionSite) -> bool:
        return site.kind in self.kinds

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        self.calls.append(call)
        return inner(call)


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**copy.deepcopy(inputs), return_dict=False)  # caches among the inputs are written to
    while isinstance(out, (list, tuple)):
        out = out[0]
    return out


def snapshot(model: Any) -> dict[str, Any]:
    """Identity of everything that applying could touch: classes, attributes, processors, module globals."""
    kept: dict[str, Any] = {}
    for name, module in model.named_modules():
        kept[f"{name} class"] = type(module)
        kept |= {f"{name}.{key}": id(value) for key, value in module.__dict__.items()}
        processor = getattr(module, "processor", None)
        if processor is not None:
            kept[f"{name} processor"] = (id(processor), type(processor))
            kept |= {f"{name} processor.{key}": id(value) for key, value in vars(processor).items()}
            for base in type(processor).__mro__:
                module_names = vars(sys.modules[base.__module__])
                kept |= {f"{base.__module__}.{k}": id(v) for k, v in module_names.items() if not k.startswith("__")}
    return kept


@pytest.mark.parametrize("family", families())
def test_dense_is_stock_and_removal_is_exact(family: str) -> None:
    model, inputs = build_model(family), build_inputs(family)
    stock = forward(model, inputs)
    before = snapshot(model)
    forward(model, inputs)
    again = snapshot(model)
    own = {key for key in before if before[key] != again[key]}  # what stock code itself makes anew in every forward
    before = {key: value for key, value in again.items() if key not in own}
    handles = [apply(model, Recorder(EVERY_KIND)), apply(model, Recorder(EVERY_KIND))]
    if family != "sana":
        handles.append(apply(model, DensePattern()))
    assert torch.equal(forward(model, inputs), stock)
    for handle in handles:  # not in the reverse order
        handle.remove()
    assert {key: value for key, value in snapshot(model).items() if key not in own} == before
    assert torch.equal(forward(model, inputs), stock)


# calls over other tokens at the same modules, which keep a rule of the model's own: text by itself, kept references
WITH_OTHERS = {"cosmos3", "flux2-kv", "qwen-image-2.1"}


def belongs_to_others(family: str, call: AttentionCall) -> bool:
    whole = call.run.layout
    return family in WITH_OTHERS and whole is not None and call.query.shape[1] != whole.seqlen


@pytest.mark.parametrize("family", SPARSE)
def test_layout_is_the_sequence(family: str) -> None:
    model, inputs = build_model(family), build_inputs(family)
    recorder = Recorder()
    with apply(model, recorder):
        forward(model, inputs)
    calls = [call for call in recorder.calls if not belongs_to_others(family, call)]
    assert calls
    for call in calls:
        assert call.layout is not None, f"{call.site.name}: {call.run.why_no_layout}, {call.query.shape}, {call.run.layout}"
        assert call.layout.seqlen == call.query.shape[1] == call.key.shape[1]


def text_positions(layout: TokenLayout) -> set[int]:
    return {n for s, start in zip(layout.segments, layout.offsets) if s.kind == "text" for n in range(start, start + s.length)}


REFINED = {"z-image", "lumina2", "bria-fibo2", "bria-fibo2-batch"}  # a refiner mixes the image's tokens before the first block
CONVOLVED = {"unet", "unet-xl", "animatediff", "transformer-2d", "dreamlite"}  # or a norm or convolution over the raster does


def places_of(spec: TinyModel, latents: torch.Tensor, layout: TokenLayout, place: tuple[int, int, int]) -> torch.Tensor:
    """The entries of the latents [..., those of one token] that make up the token at `place` of the grid."""
    frame, row, column = place
    frames, height, width = layout.grid3
    kinds = [s.kind for s in layout.segments]
    if "S" in spec.axes:
        before = sum(s.length for s in layout.segments[: kinds.index("grid")] if s.kind == "reference")
        packed = latents.movedim(spec.axes.index("S"), 0)
        index = before + (frame * height + row) * width + column
        per = max(1, packed.shape[0] // (frames * height * width)) if len(layout.grid or ()) == 1 else 1
        return packed[index * per : (index + 1) * per]
    axes = spec.axes.strip("[]")
    view = latents
    for axis, at, n in (("F", frame, frames), ("H", row, height), ("W", column, width)):
        if axis in axes:
            size = view.shape[axes.index(axis)] // n
            view = view.narrow(axes.index(axis), at * size, size)
    if "I" in axes:  # the item that is made is the last one given
        view = view.narrow(axes.index("I"), -1, 1)
    return view


def poke(family: str, inputs: dict[str, Any], layout: TokenLayout, place: tuple[int, int, int]) -> dict[str, Any]:
    """The inputs with the latents changed at one token of the grid."""
    changed, spec = copy.deepcopy(inputs), MODELS[family]
    latents = changed[spec.latents]
    if family == "ideogram4":  # the latents of the whole sequence; text rows hold zeros
        at = int(layout.grid_positions[place[1] * layout.grid3[2] + place[2]])
        latents[:, at] += 3
        return changed
    places_of(spec, latents[0] if spec.axes.startswith("[") else latents, layout, place).add_(3)
    return changed


def asked_last(recorder: Recorder) -> AttentionCall:
    """The first block's call over the image: a block may first look at text, or keep keys of references."""
    return next(call for call in recorder.calls if call.layout is not None)


@pytest.mark.parametrize("family", [f for f in SPARSE if f not in CONVOLVED])
def test_grid_tokens_stand_where_the_layout_says(family: str) -> None:
    """A change of the latents at one place changes one query of the first block: the one the layout names."""
    model, inputs = build_model(family), build_inputs(family)
    recorder = Recorder(("self", "joint", "spatial"))
    with apply(model, recorder):
        forward(model, inputs)
        first = asked_last(recorder)
        whole = first.run.layout
        assert first.layout is not None
        assert whole is not None
        frames, height, width = whole.grid3
        line = len(whole.grid or ()) == 1
        inside = {(0, 0, width - 1), (0, 0, width // 2)} if line else {(frames - 1, height - 2, 1), (frames // 2, 1, width - 1)}
        for place in {(0, 0, 0), *inside}:
            recorder.calls.clear()
            forward(model, poke(family, inputs, whole, place))
            moved = (asked_last(recorder).query != first.query).flatten(2).any(-1)
            frame, row, column = place if first.layout.grid3[0] == frames else (0, *place[1:])
            expected = first.layout.grid_positions[(frame * height + row) * width + column]
            if family in REFINED:
                assert not (set(moved.any(0).nonzero().flatten().tolist()) & text_positions(first.layout))
            else:
                assert moved.any(0).nonzero().flatten().tolist() == [int(expected)], (place, first.layout.describe())
            assert moved[:, expected].any()


@pytest.mark.parametrize("family", SPARSE)
def test_radial_runs(family: str) -> None:
    """At every site that a pattern may take; and a pattern whose element rule shows everything equals stock."""
    model, inputs = build_model(family), build_inputs(family)
    stock = forward(model, inputs)
    with apply(model, RadialPattern(), dense_steps=0, dense_layers=0) as handle:
        out = forward(model, inputs)
        report = handle.report()
    assert out.isfinite().all()
    note = getattr(family_of(model), "note", "")
    some = family in WITH_OTHERS or family == "ace-step"
    assert 0 < report.sparse_calls <= report.calls, report.dense_reasons
    assert (report.sparse_calls == report.calls) is not some, report.dense_reasons
    assert not some or "stay" in note
    with apply(model, Everything(), dense_steps=0, dense_layers=0) as handle:
        out = forward(model, inputs)
        assert handle.report().sparse_calls == report.sparse_calls
    torch.testing.assert_close(out, stock, atol=2e-5, rtol=1e-4)


class Everything(Pattern):
    """The dense rule, run through the block-sparse path."""

    def rule(self, layout: TokenLayout) -> Any:
        return DensePattern().rule(layout)

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> Any:
        return DensePattern().build_plan(layout, block_q, block_k)


def test_sana_is_refused_with_the_reason() -> None:
    model = build_model("sana")
    before = snapshot(model)
    with pytest.raises(GenAttnError, match="SanaLinearAttnProcessor2_0 is linear attention"):
        apply(model, RadialPattern())
    assert snapshot(model) == before


def test_every_family_has_a_tiny_model() -> None:
    built = {family_of(build_model(name)) for name in families()}
    wanted = {family.name for family in FAMILIES if not ABSENT.issuperset(family.models)}
    assert wanted == {family.name for family in built if family is not None}


def test_stacks_are_numbered_in_execution_order() -> None:
    recorder = Recorder()
    for family in ("flux", "hunyuan-video", "unet", "animatediff", "aura-flow", "hidream", "sd3.5"):
        model = build_model(family)
        recorder.calls.clear()
        with apply(model, recorder):
            forward(model, build_inputs(family))
        depths = [call.site.depth for call in recorder.calls]
        assert depths == sorted(depths), family
        assert set(depths) == set(range(max(depths) + 1)), family


def test_refiners_and_side_paths_are_left_alone() -> None:
    for family, ending in (("hunyuan-video", "attn"), ("z-image", "attention"), ("lumina2", "attn"), ("ltx2", "audio_attn1")):
        handle = apply(build_model(family), RadialPattern())
        assert not any("refiner" in site.name or site.name.endswith("audio_attn1") for site in handle.sites), (family, ending)
        assert handle.sites
        handle.remove()


def test_nothing_keeps_a_removed_model_alive() -> None:
    import weakref

    model = build_model("wan")
    handle = apply(model, RadialPattern(), dense_steps=0)
    forward(model, build_inputs("wan"))
    handle.remove()
    reference = weakref.ref(model)
    del model, handle
    gc.collect()
    assert reference() is None


def test_unknown_family_stays_dense_and_says_so() -> None:
    model = build_model("wan")
    model.__class__ = type("SomethingNew", (torch.nn.Module,), dict(type(model).__dict__))
    assert family_of(model) is None
    assert genattn.layouts.families.family_of(build_model("wan")) is not None


def test_a_registered_family_is_found_and_a_nameless_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stranger(torch.nn.Module):
        """Stands for a denoiser that no table knows."""

    class Heir(Stranger):
        """A subclass is of its base's family."""

    known: dict[str, Family] = {}
    monkeypatch.setattr("genattn.layouts.families._by_class", lambda: known)
    for models, stacks in (((), ("blocks",)), (("Stranger",), ())):
        with pytest.raises(GenAttnError, match="must name its classes and stacks, got models="):
            register_family(Family("stranger", models, stacks, layout=lambda model, inputs: None))
    assert family_of(Stranger()) is None
    family = Family("stranger", ("Stranger",), ("blocks",), layout=lambda model, inputs: None)
    register_family(family)
    assert family_of(Stranger()) is family_of(Heir()) is family
