"""The backend by name on stock models: what apply gives, and nothing left when it goes."""

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.modeling_utils import ModelMixin

from genattn import DensePattern, GenAttnError, NeighborhoodPattern, RadialPattern
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.hosts.diffusers_backend import backend_handle, register_backend, unregister_backend
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.denoiser import INJECTION
from genattn.seam.handle import apply
from genattn.seam.report import GenAttnWarning

NOW = {"dense_steps": 0, "dense_layers": 0}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = _state()
    yield
    unregister_backend()
    assert _state() == before, "the process is not as it was"


def _state() -> tuple[Any, ...]:
    registry = _AttentionBackendRegistry
    tables = (registry._backends, registry._constraints, registry._supported_arg_names)
    return (
        *(dict(table) for table in tables),
        set(registry._supports_context_parallel),
        registry._active_backend,
        list(AttentionBackendName),
        dict(AttentionBackendName.__members__),
        set(AttentionBackendName._value2member_map_),
        ModelMixin.set_attention_backend,
        ModelMixin.reset_attention_backend,
    )


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


def backends(model: Any) -> list[Any]:
    return [getattr(m.processor, "_attention_backend", None) for m in model.modules() if hasattr(m, "processor")]


@pytest.mark.parametrize("family", ["wan", "flux", "sd3", "hunyuan-video", "cogvideox", "unet"])
@pytest.mark.parametrize("off", ["native", "reset", "unregister"])
def test_the_name_gives_what_apply_gives(family: str, off: str) -> None:
    pattern = NeighborhoodPattern(3, tail=None) if family in ("flux", "sd3", "unet") else RadialPattern(decay=0.2)
    model, twin, inputs = build_model(family), build_model(family), build_inputs(family)
    stock = forward(model, inputs)
    own = backends(model)
    with apply(twin, pattern, **NOW) as handle:
        wanted = forward(twin, inputs)
        calls = handle.report().sparse_calls
    assert calls
    assert not torch.equal(wanted, stock)
    register_backend(pattern, **NOW)
    assert torch.equal(forward(model, inputs), stock), "registering alone changes nothing"
    model.set_attention_backend("genattn")
    assert torch.equal(forward(model, inputs), wanted)
    assert backend_handle(model).report().sparse_calls == calls
    assert backends(model) == own, "its own backend stays for dense calls"
    if off == "native":
        model.set_attention_backend("native")
    else:
        (model.reset_attention_backend if off == "reset" else unregister_backend)()
    assert torch.equal(forward(model, inputs), stock)
    assert INJECTION not in model.__dict__
    if off == "reset":
        assert backends(model) == own
    for ours, theirs in zip(model.modules(), twin.modules()):
        assert type(getattr(ours, "processor", None)) is type(getattr(theirs, "processor", None))
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_dense_calls_go_to_the_users_own_backend() -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    model.set_attention_backend("_native_math")
    alone = forward(model, inputs)
    register_backend(DensePattern())
    model.set_attention_backend("GenAttn")
    assert torch.equal(forward(model, inputs), alone)
    assert {b for b in backends(model) if b is not None} == {AttentionBackendName._NATIVE_MATH}
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_a_pipeline_whose_transformer_is_switched_on() -> None:
    (pipe, kwargs), (twin, _) = build_pipeline("wan"), build_pipeline("wan")
    given = {**kwargs, "num_inference_steps": 3, "output_type": "latent"}

    def sample(one: Any) -> torch.Tensor:
        out: torch.Tensor = one(**given, generator=torch.Generator().manual_seed(0)).frames
        return out

    register_backend("radial", dense_steps=1, dense_layers=0)
    pipe.transformer.set_attention_backend("genattn")
    with apply(twin.transformer, "radial", dense_steps=1, dense_layers=0):
        assert torch.equal(sample(pipe), sample(twin))
    report = backend_handle(pipe.transformer).report()
    assert report.sparse_calls
    assert list(report.dense_reasons) == ["first dense steps (dense_steps=1)"]
    pipe.transformer.reset_attention_backend()
    assert torch.equal(sample(pipe), sample(twin))


def test_switching_on_twice_and_to_another_pattern() -> None:
    model, twin, inputs = build_model("wan"), build_model("wan"), build_inputs("wan")
    register_backend(RadialPattern(decay=0.2), **NOW)
    model.set_attention_backend("genattn")
    first = backend_handle(model)
    model.set_attention_backend("genattn")
    assert backend_handle(model) is first
    register_backend(NeighborhoodPattern((2, 2, 2)), SoftPAG("L1H0", u=1.0, scale=2.0), **NOW)
    assert backend_handle(model) is first
    model.set_attention_backend("genattn")
    assert not first.active
    with apply(twin, NeighborhoodPattern((2, 2, 2)), SoftPAG("L1H0", u=1.0, scale=2.0), **NOW):
        assert torch.equal(forward(model, inputs), forward(twin, inputs))


def test_models_are_switched_one_by_one_and_copies_are_stock() -> None:
    model, other, inputs = build_model("wan"), build_model("wan"), build_inputs("wan")
    stock = forward(other, inputs)
    register_backend(RadialPattern(decay=0.2), **NOW)
    model.set_attention_backend("genattn")
    sparse = forward(model, inputs)
    assert not torch.equal(sparse, stock)
    assert torch.equal(forward(other, inputs), stock)
    twin = copy.deepcopy(model)
    assert torch.equal(forward(twin, inputs), stock)
    other.reset_attention_backend()
    twin.reset_attention_backend()
    assert torch.equal(forward(model, inputs), sparse)


def test_a_model_that_is_dropped_is_freed() -> None:
    register_backend(RadialPattern())
    model = build_model("wan")
    model.set_attention_backend("genattn")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_handle_that_was_removed_by_hand() -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    stock = forward(model, inputs)
    register_backend(RadialPattern(decay=0.2), **NOW)
    model.set_attention_backend("genattn")
    backend_handle(model).remove()
    assert torch.equal(forward(model, inputs), stock)
    model.set_attention_backend("genattn")
    assert not torch.equal(forward(model, inputs), stock)


def test_a_pattern_applied_before_gives_way_with_a_warning() -> None:
    model = build_model("wan")
    earlier = apply(model, RadialPattern())
    register_backend(NeighborhoodPattern((2, 2, 2)))
    with pytest.warns(GenAttnWarning, match="is replaced"):
        model.set_attention_backend("genattn")
    assert not earlier.active


def test_a_method_that_was_put_over_ours_stays() -> None:
    stock = ModelMixin.reset_attention_backend
    register_backend(RadialPattern())
    under = ModelMixin.reset_attention_backend

    def theirs(self: Any) -> None:
        under(self)

    ModelMixin.reset_attention_backend = theirs
    try:
        unregister_backend()
        assert ModelMixin.reset_attention_backend is theirs
        build_model("wan").reset_attention_backend()
    finally:
        ModelMixin.reset_attention_backend = stock


def test_other_names_are_refused_as_before() -> None:
    register_backend(RadialPattern())
    with pytest.raises(ValueError, match="must be one of the following"):
        build_model("wan").set_attention_backend("genattm")


def test_refused() -> None:
    with pytest.raises(ValueError, match="must be one of the following"):
        build_model("wan").set_attention_backend("genattn")  # not registered
    model, inputs = build_model("wan"), build_inputs("wan")
    with pytest.raises(GenAttnError, match="must have been switched on, and is not"):
        backend_handle(model)
    register_backend("sparse")
    with pytest.raises(GenAttnError, match="a pattern's name must be one of"):
        model.set_attention_backend("genattn")
    with pytest.raises(GenAttnError, match="must have been switched on, and is not"):
        backend_handle(model)
    assert INJECTION not in model.__dict__
    with (
        attention_backend("genattn"),
        pytest.raises(GenAttnError, match="acts through a model, and this call came without one"),
    ):
        forward(model, inputs)
    register_backend(RadialPattern(), dense_step=3)
    with pytest.raises(GenAttnError, match=r"unknown settings \['dense_step'\]"):
        model.set_attention_backend("genattn")
    unregister_backend()
    unregister_backend()  # nothing to do
