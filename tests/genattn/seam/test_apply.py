"""Control: options, report, removal in any order, and nothing left behind by exceptions, copies and threads."""

import contextlib
import contextvars
import copy
import gc
import json
import threading
import weakref
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

import genattn
from genattn import DensePattern, GenAttnError, RadialPattern, Schedule, TokenLayout
from genattn.guidance.tag import TAG
from genattn.layouts.site import AttentionSite
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.cores import MARK
from genattn.seam.handle import Handle, apply
from genattn.seam.plugin import AttentionCall, Inner, Plugin, Run
from genattn.seam.report import GenAttnWarning
from genattn.seam.sparse_plugin import SparsePlugin


def forward(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, **more, return_dict=False)[0]
    return out


def sample(pipe: Any, kwargs: dict[str, Any], **more: Any) -> torch.Tensor:
    out = pipe(**{**kwargs, **more, "output_type": "latent"}, generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = out.frames if hasattr(out, "frames") else out.images
    return found


class Scaled(Plugin):
    """Multiplies the attention by a factor: order and number of plugins show in the output."""

    def __init__(self, factor: float, add: float = 0.0) -> None:
        self.factor, self.add = factor, add

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        return inner(call) * self.factor + self.add


class Extra(Plugin):
    """Adds a pass of its own and notes which passes the attention saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[str | None, str | None]] = []

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        self.seen.append((call.run.pass_name, call.run.extra))
        return inner(call)

    def forward(self, run: Run, args: Any, kwargs: Any, inner: Any) -> Any:
        with run.extra_pass("mine"):
            inner(*args, **kwargs)
        return inner(*args, **kwargs)


# ---- options


KEYS = {"wan": "attention_kwargs", "sd3": "joint_attention_kwargs", "flux": "joint_attention_kwargs"}
KEYS |= {"hunyuan-video": "attention_kwargs", "cogvideox": "attention_kwargs", "ltx": "attention_kwargs"}
KEYS |= {"mochi": "attention_kwargs", "unet": "cross_attention_kwargs", "animatediff": "cross_attention_kwargs"}


@pytest.mark.parametrize("family", list(KEYS))
@pytest.mark.filterwarnings("ignore:In CPU autocast", "ignore:CPU Autocast")
def test_options_of_one_call(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """The key reaches us, never a processor, and the pipeline's own dict stays as it was."""
    pipe, kwargs = build_pipeline(family)
    stock = sample(pipe, kwargs)
    carried = {"genattn": {"enabled": False}}
    with apply(pipe, RadialPattern(), Scaled(0.5), dense_steps=0, dense_layers=0) as handle:
        assert torch.equal(sample(pipe, kwargs, **{KEYS[family]: carried}), stock)
        assert handle.report().dense_reasons == {"switched off (enabled=False)": handle.report().calls}
        assert not torch.equal(sample(pipe, kwargs), stock)
    assert carried == {"genattn": {"enabled": False}}
    assert not [r for r in caplog.records if "not expected" in r.message]


def test_options_context_and_precedence() -> None:
    pipe, kwargs = build_pipeline("wan")
    handle = apply(pipe, RadialPattern())
    with handle.options(dense_steps=1.0) as same:
        assert same is handle
        sample(pipe, kwargs)
        assert handle.report().sparse_calls == 0
        with handle.options(dense_layers=0):  # both hold
            sample(pipe, kwargs)
            assert handle.report().sparse_calls == 0
        sample(pipe, kwargs, attention_kwargs={"genattn": {"dense_steps": 0, "dense_layers": 0}})  # the call wins
        assert handle.report().sparse_calls == 18
    sample(pipe, kwargs)
    assert handle.report().sparse_calls == 18 + 8
    handle.set(enabled=False)
    sample(pipe, kwargs)
    assert handle.report().sparse_calls == 18 + 8
    handle.remove()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dense_step": 1}, r"unknown options \['dense_step'\].*dense_steps"),
        ({"dense_steps": 2.5}, "dense_steps must be"),
        ({"num_steps": 0}, "num_steps must be"),
        ({"num_steps": 2.0}, "num_steps must be"),
    ],
)
def test_bad_options_are_refused_before_the_forward(options: dict[str, Any], match: str) -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    with apply(model, RadialPattern(), dense_steps=0) as handle:
        with pytest.raises(GenAttnError, match=match), handle.options(**options):
            pass
        with pytest.raises(GenAttnError, match=match):
            handle.set(**options)
        with pytest.raises(GenAttnError, match=match):
            forward(model, inputs, attention_kwargs={"genattn": options})
        forward(model, inputs)  # the refusal left nothing behind
        assert handle.report().forwards == 1


def test_options_must_be_a_dict() -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    with apply(model, RadialPattern()), pytest.raises(GenAttnError, match="must be a dict of options, got bool"):
        forward(model, inputs, attention_kwargs={"genattn": True})


# ---- several plugins, several handles


def test_chain_order_and_removal_in_any_order() -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    stock = forward(model, inputs)
    with apply(model, Scaled(2.0), Scaled(1.0, add=3.0)):
        expected = forward(model, inputs)  # 2 * (attention + 3)
    first, second = apply(model, Scaled(2.0)), apply(model, Scaled(1.0, add=3.0))
    assert torch.equal(forward(model, inputs), expected)
    first.remove()
    first.remove()
    with apply(model, Scaled(1.0, add=3.0)) as alone:
        second.remove()
        assert alone.active
        assert not second.active
        once = forward(model, inputs)
    assert not torch.equal(once, stock)
    assert torch.equal(forward(model, inputs), stock)
    assert type(model).__name__ == "WanTransformer3DModel"
    assert "_genattn_stock" not in type(model).__dict__


def test_extra_passes_have_their_own_names() -> None:
    pipe, kwargs = build_pipeline("wan")
    stock = sample(pipe, kwargs)
    plugin = Extra()
    with apply(pipe, plugin):
        assert torch.equal(sample(pipe, kwargs), stock)
    layers = 3
    assert plugin.seen[: 4 * layers] == [
        *[("cond+mine", "mine")] * layers,
        *[("cond", None)] * layers,
        *[("uncond+mine", "mine")] * layers,
        *[("uncond", None)] * layers,
    ]


def test_extra_passes_keep_their_own_cache() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe, kwargs = build_pipeline("wan")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    stock = sample(pipe, kwargs)
    with apply(pipe, Extra()):
        torch.testing.assert_close(sample(pipe, kwargs), stock, atol=0, rtol=0)


def test_plugins_may_run_other_inputs() -> None:
    class Halved(Plugin):
        """Runs the model on the first sample alone."""

        def __init__(self) -> None:
            self.layouts: list[Any] = []

        def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
            self.layouts.append(call.layout)
            return inner(call)

        def forward(self, run: Run, args: Any, kwargs: Any, inner: Any) -> Any:
            shorter = {**kwargs, "hidden_states": kwargs["hidden_states"][..., :8]}
            with run.extra_pass("short"):
                inner(*args, **shorter)
            return inner(*args, **kwargs)

    model, inputs = build_model("wan"), build_inputs("wan")
    plugin = Halved()
    with apply(model, plugin):
        forward(model, inputs)
    assert [layout.grid for layout in plugin.layouts] == [(3, 8, 4)] * 3 + [(3, 8, 6)] * 3


# ---- refusals


@pytest.mark.parametrize(
    ("plugins", "settings", "match"),
    [
        ((), {}, "at least one plugin"),
        ((RadialPattern,), {}, "plugins must be objects, got the class RadialPattern"),
        ((RadialPattern(),), {"dense_setps": 1}, "unknown settings"),
        ((RadialPattern(),), {"schedule": Schedule(), "dense_steps": 1}, "either schedule"),
        ((Scaled(2.0),), {"dense_steps": 1}, "belongs to a pattern"),
    ],
)
def test_bad_calls_of_apply(plugins: tuple[Any, ...], settings: dict[str, Any], match: str) -> None:
    model = build_model("wan")
    with pytest.raises(GenAttnError, match=match):
        apply(model, *plugins, **settings)
    assert not any(MARK in module.__dict__ for module in model.modules())


def test_targets_that_cannot_be_served() -> None:
    with pytest.raises(GenAttnError, match="no attention module"):
        apply(torch.nn.Linear(2, 2), RadialPattern())
    with pytest.raises(GenAttnError, match="must be a pipeline"):
        apply("pipe", RadialPattern())
    with pytest.raises(GenAttnError, match="must be a Pattern"):
        SparsePlugin("radial")  # type: ignore[arg-type]
    model = build_model("unet")
    model.set_default_attn_processor()
    model.set_attn_processor(type(model.mid_block.attentions[0].transformer_blocks[0].attn1.processor)())
    from diffusers.models.attention_processor import AttnProcessor

    model.set_attn_processor(AttnProcessor())
    with pytest.raises(GenAttnError, match="use AttnProcessor2_0"):
        apply(model, RadialPattern())


def test_a_refusal_by_the_second_model_undoes_the_first() -> None:
    class Picky(Plugin):
        attached: list[str] = []  # noqa: RUF012

        def attach(self, model: Any, sites: Any) -> None:
            if len(self.attached) == 1:
                raise GenAttnError("one is enough")
            self.attached.append("x")

        def detach(self, model: Any) -> None:
            self.attached.pop()

    pipe, _ = build_pipeline("wan-experts")
    with pytest.raises(GenAttnError, match="one is enough"):
        apply(pipe, Picky())
    assert Picky.attached == []
    assert type(pipe.transformer).__dict__.get("_genattn_stock") is None


def test_a_named_backend_that_cannot_serve_is_an_error() -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    with (
        apply(model, RadialPattern(), impl="triton", dense_steps=0, dense_layers=0),
        pytest.raises(GenAttnError, match="triton"),
    ):
        forward(model, inputs)
    with pytest.raises(GenAttnError, match="impl must be one of auto, .*, got 'no-such'"):
        apply(model, RadialPattern(), impl="no-such", dense_steps=0, dense_layers=0)


# ---- the user's own backend


def test_dense_calls_go_to_the_users_backend() -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    seen = []
    from diffusers.models import attention_dispatch as dispatch

    name = dispatch.AttentionBackendName._NATIVE_MATH
    stock = dispatch._AttentionBackendRegistry._backends[name]

    def spy(**given: Any) -> torch.Tensor:
        seen.append(1)
        return stock(**given)

    dispatch._AttentionBackendRegistry._backends[name] = spy
    try:
        with apply(model, RadialPattern()) as handle:
            for module in model.modules():
                if hasattr(module, "processor"):
                    module.processor._attention_backend = name
            forward(model, inputs)
            assert handle.report().sparse_calls == 0
        assert len(seen) == 6
        with apply(model, DensePattern()), attention_backend(name):
            for module in model.modules():
                if hasattr(module, "processor"):
                    module.processor._attention_backend = None
            forward(model, inputs)
        assert len(seen) == 12
    finally:
        dispatch._AttentionBackendRegistry._backends[name] = stock


# ---- report


def test_report_is_complete_and_loud() -> None:
    pipe, kwargs = build_pipeline("wan")
    pattern = RadialPattern(decay=0.2, floor=0)
    handle = apply(pipe, pattern)
    assert "NOT APPLIED YET" in handle.report().verdict
    sample(pipe, kwargs | {"height": 128, "width": 128, "num_frames": 17})
    report = handle.report()
    assert report.calls == 18
    assert report.sparse_calls == 8
    assert report.dense_reasons == {"first dense steps (dense_steps=0.25)": 6, "dense layer (dense_layers=1)": 4}
    assert report.runs == 1
    listed = pattern.plan(TokenLayout.from_grid((5, 8, 8)), 16, 16).density
    assert listed < 0.9
    assert report.density == pytest.approx(listed)
    assert report.flops / report.flops_dense == pytest.approx(1 - 8 / 18 * (1 - listed))  # 8 of 18 equal calls
    assert all(row["seconds"] > 0 and row["tokens"] == 320 for row in report.sites)
    assert json.loads(report.to_json())["sites"][0]["site"] == "blocks.0.attn1"
    assert "blocks.1.attn1" in str(report)
    handle.remove()
    assert handle.report().calls == 18


def test_sites_never_reached_are_told() -> None:
    model, inputs = build_model("wan"), build_inputs("wan")

    class Elsewhere(Plugin):
        def wants(self, site: AttentionSite) -> bool:
            return False

        def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
            raise AssertionError

    handle = apply(model, Elsewhere())
    forward(model, inputs)
    with pytest.warns(GenAttnWarning, match="none of the selected attention sites was reached"):
        handle.remove()


def test_what_cannot_run_sparse_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = build_model("chroma"), build_inputs("chroma")
    inputs["attention_mask"] = inputs["attention_mask"].float()  # as the stock pipeline hands it: a bias, not a choice of keys
    with apply(model, RadialPattern(), dense_steps=0, dense_layers=0) as handle:
        for _ in range(2):
            forward(model, inputs)
        assert handle.report().dense_reasons == {"the mask is an additive bias, not a choice of keys": 8}
    assert [r.getMessage() for r in caplog.records if r.name == "genattn"] == [
        "transformer_blocks.0.attn stays dense: the mask is an additive bias, not a choice of keys"
    ]


def test_a_call_left_to_stock_counts_as_one_that_could_have_been_sparse() -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    counted = {}
    for name, share in (("sparse", 0.0), ("dense", 1.0)):
        with apply(model, RadialPattern(), dense_steps=share, dense_layers=0).set(num_steps=2) as handle:
            forward(model, inputs)
            counted[name] = handle.report()
    assert counted["sparse"].sparse_calls > 0
    assert counted["dense"].sparse_calls == 0
    assert counted["dense"].flops == counted["dense"].flops_dense == counted["sparse"].flops_dense


def test_explain_runs_nothing() -> None:
    pipe, kwargs = build_pipeline("wan")
    pipe.set_progress_bar_config(desc="mine", disable=True)
    handle = apply(pipe, RadialPattern())
    explained = handle.explain(**{**kwargs, "num_inference_steps": 8})
    assert explained.layout == "grid 3x4x3"
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}
    assert explained.num_steps == 8
    assert [(site.sparse, site.dense) for site in explained.sites] == [(0, 8), (6, 2), (6, 2)]
    assert handle.report().forwards == handle.report().runs == 0
    assert json.loads(explained.to_json())["num_steps"] == 8
    assert "first dense steps" in str(explained)
    sample(pipe, kwargs, num_inference_steps=8)
    report = handle.report()
    assert [row["sparse"] for row in report.sites] == [2 * site.sparse for site in explained.sites]
    assert report.flops / report.flops_dense == pytest.approx(explained.flops_share)
    handle.remove()
    with pytest.raises(GenAttnError, match="explain needs an active handle"):
        handle.explain(**kwargs)
    pipe.transformer, other = None, pipe.transformer
    handle = apply(other, RadialPattern())
    handle.target = lambda **call: pipe
    with pytest.raises(GenAttnError, match="function returned without a forward of its denoiser; nothing to explain"):
        handle.explain(**kwargs)
    handle.remove()


# ---- nothing left behind


def test_an_exception_in_mid_step_leaves_nothing() -> None:
    pipe, kwargs = build_pipeline("wan")
    stock = sample(pipe, kwargs)

    class Breaks(Plugin):
        def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
            if call.run.step == 1 and call.site.layer == 1:
                raise RuntimeError("broken on purpose")
            return inner(call)

    handle = apply(pipe, Breaks())
    with pytest.raises(RuntimeError, match="on purpose"):
        sample(pipe, kwargs)
    from genattn.seam.cores import CURRENT
    from genattn.seam.denoiser import HERE

    assert HERE.run is None
    assert CURRENT.held == [None]
    handle.remove()
    assert torch.equal(sample(pipe, kwargs), stock)
    with pytest.raises(RuntimeError, match="on purpose"), apply(pipe, Breaks()):
        sample(pipe, kwargs)
    assert torch.equal(sample(pipe, kwargs), stock)


def test_copies_start_without_plugins() -> None:
    model, inputs = build_model("sd3"), build_inputs("sd3")
    stock = forward(model, inputs)
    handle = apply(model, Scaled(2.0))
    copied = copy.deepcopy(model)
    assert torch.equal(forward(copied, inputs), stock)
    assert type(copied).__dict__.get("_genattn_stock") is None
    assert not any(name.startswith("_genattn") for module in copied.modules() for name in module.__dict__)
    assert type(copied.transformer_blocks[0].attn.processor).__dict__.get("_genattn_stock") is None
    assert not torch.equal(forward(model, inputs), stock)
    handle.remove()


def test_save_pretrained_is_untouched(tmp_path: Any) -> None:
    model = build_model("wan")
    with apply(model, RadialPattern()):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    inputs = build_inputs("wan")
    saved, kept = again.state_dict(), model.state_dict()
    assert saved.keys() == kept.keys()
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
    # weights mapped from a file lie at other addresses, and BLAS may take another path for them
    torch.testing.assert_close(forward(again, inputs), forward(model, inputs))


def test_two_models_in_two_threads() -> None:
    """Each attention call belongs to the model of its thread, although both share the processors' module."""
    models = [build_model("wan", seed=i) for i in range(2)]
    inputs = build_inputs("wan")
    stock = [forward(model, inputs) for model in models]
    handles: list[Handle] = []
    seen: list[list[bool]] = [[], []]

    class Mine(Plugin):
        def __init__(self, index: int) -> None:
            self.index = index

        def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
            seen[self.index].append(call.run.model is models[self.index])
            return inner(call)

    handles = [apply(model, Mine(i)) for i, model in enumerate(models)]
    outs: list[list[torch.Tensor]] = [[], []]

    def work(i: int) -> None:
        outs[i] = [forward(models[i], inputs) for _ in range(8)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    for i in range(2):
        assert all(torch.equal(out, stock[i]) for out in outs[i])
        assert seen[i] == [True] * 24


def test_a_model_without_plugins_is_not_touched() -> None:
    """Another model of the same class, whose processors share the patched module, never comes by."""
    applied, other, inputs = build_model("wan"), build_model("wan", seed=1), build_inputs("wan")
    stock = forward(other, inputs)
    with apply(applied, Scaled(0.0)) as handle:
        assert torch.equal(forward(other, inputs), stock)
        assert handle.report().forwards == 0
        assert type(other.blocks[0].attn1.processor).__dict__.get("_genattn_stock") is None


def test_public_names() -> None:
    assert genattn.apply is apply
    assert genattn.Schedule is Schedule


class Again(Plugin):
    """An extra pass of its own name."""

    def forward(self, run: Run, args: Any, kwargs: Any, inner: Any) -> Any:
        with run.extra_pass("again"):
            inner(*args, **kwargs)
        return inner(*args, **kwargs)


def test_a_cache_context_that_takes_a_name_alone_is_told_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers had it before 0.40; what was told counts for the steps all the same."""
    model, inputs = build_model("wan"), build_inputs("wan")
    names: list[str] = []

    @contextlib.contextmanager
    def named(self: Any, name: str) -> Any:
        names.append(name)
        yield

    monkeypatch.setattr(type(model), "cache_context", named)
    with apply(model, Again()):
        with model.cache_context("cond", step_index=0, sigma=0.5, num_inference_steps=4):
            forward(model, inputs)
        assert names == ["cond", "cond+again", "cond"]
    with pytest.raises(TypeError, match="step_index"), model.cache_context("cond", step_index=0):
        pass


def test_options_hold_in_their_own_thread_alone() -> None:
    """Two threads with a block of options each, and a third without, on one handle; `set` holds for all."""
    handle = apply(build_model("wan"), RadialPattern(), dense_steps=0)
    inside, others = threading.Barrier(3, timeout=20), {}

    def work(name: str, options: dict[str, Any]) -> None:
        with handle.options(**options) if options else contextlib.nullcontext():
            inside.wait()
            others[name] = dict(handle.current_options)
            inside.wait()
        inside.wait()
        others[f"{name} after"] = dict(handle.current_options)

    handle.set(dense_layers=0)
    given: dict[str, dict[str, Any]] = {"one": {"dense_steps": 1}, "two": {"dense_steps": 2, "dense_layers": 3}, "none": {}}
    threads = [threading.Thread(target=work, args=pair) for pair in given.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, options in given.items():
        assert others[name] == {"dense_layers": 0, **options}
        assert others[f"{name} after"] == {"dense_layers": 0}
    with handle.options(dense_steps=3):
        with handle.options(dense_layers=2):
            handle.set(dense_steps=4)
            assert handle.current_options == {"dense_steps": 4, "dense_layers": 2}
        assert handle.current_options == {"dense_steps": 3, "dense_layers": 0}
        copied = contextvars.copy_context()  # as asyncio hands it on
    assert copied.run(lambda: handle.current_options["dense_steps"]) == 3
    assert handle.current_options == {"dense_layers": 0}
    handle.remove()


def test_options_of_one_handle_are_not_those_of_another() -> None:
    one, two = apply(build_model("wan"), RadialPattern()), apply(build_model("wan"), RadialPattern())
    with one.options(dense_steps=3), two.options(dense_steps=4), one.options(dense_layers=1):
        assert one.current_options == {"dense_steps": 3, "dense_layers": 1}
        assert two.current_options == {"dense_steps": 4}
    assert one.current_options == two.current_options == {}
    one.remove()
    two.remove()


def test_a_hundred_times_on_and_off_leaves_nothing() -> None:
    """In every order of removal: the same attributes, hooks and processors, no handle, and no more objects than before."""
    pipe, call = build_pipeline("wan")
    sample(pipe, call, num_inference_steps=1)  # stock adds attributes of its own when it runs

    def state() -> tuple[Any, ...]:
        model = pipe.transformer
        hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
        return (
            type(pipe),
            sorted(pipe.__dict__),
            sorted(model.__dict__),
            hooks,
            [type(p) for p in model.attn_processors.values()],
        )

    before, objects = state(), []
    for number in range(100):
        one, two = apply(pipe, RadialPattern(), dense_steps=0), apply(pipe, TAG())
        if number % 25 == 0:
            sample(pipe, call, num_inference_steps=1)
        for handle in (one, two) if number % 2 else (two, one):
            handle.remove()
        kept = weakref.ref(one), weakref.ref(two)
        del one, two, handle
        if number % 20 == 19:
            gc.collect()
            objects.append(len(gc.get_objects()))
            assert [ref() for ref in kept] == [None, None]
            assert state() == before
    assert objects[-1] - objects[1] < 100, objects
