"""The seam beside what users put on the same model: adapters, quantisation, offload, caches, checkpointing; one row each.

Every row: with the neighbour on, applied-but-dense is what the neighbour alone gives, to the bit; a pattern takes effect; and
after removal the neighbour is as it was.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import older_diffusers
import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

from genattn import DensePattern, RadialPattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.handle import apply

Put = Callable[[Any], Any]


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


def lora(model: Any) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(1)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))


def layerwise_fp8(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def group_offload(model: Any) -> None:
    older_diffusers.offload_layers(model)


def model_offload(model: Any) -> None:
    import accelerate

    accelerate.cpu_offload_with_hook(model, execution_device="cpu")


def torchao_int8(model: Any) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="int8 weights need torchao")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def bnb_8bit(model: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="8-bit layers need bitsandbytes")
    replace_projections(model, lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False))


def bnb_nf4(model: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="4-bit layers need bitsandbytes")
    replace_projections(model, lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=torch.float32, quant_type="nf4"))


def replace_projections(model: Any, make: Callable[[int, int], Any]) -> None:
    """Queries, keys and values of every block through layers that keep their weights packed."""
    for attn in [attn for block in model.blocks for attn in (block.attn1, block.attn2)]:
        for name in ("to_q", "to_k", "to_v"):
            old = getattr(attn, name)
            new = make(old.in_features, old.out_features)
            new.load_state_dict(old.state_dict())
            setattr(attn, name, new.to("cpu"))  # packed here


def gguf_linear(model: Any) -> None:
    gguf = pytest.importorskip("gguf", reason="GGUF layers need gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    old = model.blocks[1].ffn.net[2]
    new = GGUFLinear(old.in_features, old.out_features, bias=True, compute_dtype=torch.float32)
    packed = gguf.quants.quantize(old.weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
    new.weight = GGUFParameter(torch.from_numpy(packed), quant_type=gguf.GGMLQuantizationType.Q8_0)
    new.bias = old.bias
    model.blocks[1].ffn.net[2] = new


def fused(model: Any) -> None:
    model.fuse_qkv_projections()


def own_processors(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(type(module.processor.__class__.__new__(module.processor.__class__))())


def native_math(model: Any) -> None:
    model.set_attention_backend("_native_math")


MODEL_ROWS: list[tuple[str, str, Put]] = [
    ("lora", "wan", lora),
    ("layerwise fp8", "wan", layerwise_fp8),
    ("group offload", "wan", group_offload),
    ("model offload", "wan", model_offload),
    ("torchao int8", "wan", torchao_int8),
    ("bitsandbytes int8", "wan", bnb_8bit),
    ("bitsandbytes nf4", "wan", bnb_nf4),
    ("gguf", "wan", gguf_linear),
    ("fused qkv, new style", "wan", fused),
    ("fused qkv, old style", "sd3", fused),
    ("fused qkv, old style, unet", "unet", fused),
    ("set_attn_processor", "flux", own_processors),
    ("set_attention_backend", "wan", native_math),
]


@pytest.fixture(autouse=True)
def _global_backend() -> Any:
    """set_attention_backend also sets the process-wide one, and resets only its own."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.mark.parametrize("order", ["apply first", "apply last"])
@pytest.mark.parametrize(("family", "put"), [row[1:] for row in MODEL_ROWS], ids=[row[0] for row in MODEL_ROWS])
def test_neighbours_of_the_model(family: str, put: Put, order: str) -> None:
    inputs = build_inputs(family)
    alone = build_model(family)
    put(alone)
    expected = forward(alone, inputs)

    model = build_model(family)
    if order == "apply first":
        handle = apply(model, DensePattern())
        put(model)
    else:
        put(model)
        handle = apply(model, DensePattern())
    assert torch.equal(forward(model, inputs), expected)
    sparse = apply(model, RadialPattern(), dense_steps=0, dense_layers=0)
    forward(model, inputs)
    report = sparse.report()
    assert report.sparse_calls == report.calls == len(sparse.sites), report.dense_reasons
    handle.remove()
    sparse.remove()
    assert torch.equal(forward(model, inputs), expected)
    for ours, theirs in zip(model.modules(), alone.modules()):
        assert type(ours) is type(theirs)
        if getattr(ours, "processor", None) is not None and hasattr(theirs, "processor"):
            assert type(ours.processor) is type(theirs.processor)
            assert getattr(ours.processor, "_attention_backend", None) == getattr(theirs.processor, "_attention_backend", None)


def test_unfusing_gives_back_the_stock_processors() -> None:
    """The old style keeps the processors it replaced; they must come back as plain ones."""
    model, inputs = build_model("sd3"), build_inputs("sd3")
    stock = forward(model, inputs)
    handle = apply(model, DensePattern())
    model.fuse_qkv_projections()
    forward(model, inputs)
    handle.remove()
    model.unfuse_qkv_projections()
    assert {type(p).__name__ for p in model.attn_processors.values()} == {"JointAttnProcessor2_0"}
    assert not any("_genattn_stock" in type(p).__dict__ for p in model.attn_processors.values())
    assert torch.equal(forward(model, inputs), stock)


def test_ip_adapter_after_apply() -> None:
    model, inputs = build_model("unet"), build_inputs("unet")
    handle = apply(model, RadialPattern(), dense_steps=0, dense_layers=0)
    forward(model, inputs)
    torch.manual_seed(3)
    processors = {}
    for name, processor in model.attn_processors.items():
        attn = model.get_submodule(name.removesuffix(".processor"))
        cross = "attn2" in name
        processors[name] = IPAdapterAttnProcessor2_0(attn.inner_dim, 8, num_tokens=(2,)) if cross else processor
    model.set_attn_processor(processors)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(4, 8, num_image_text_embeds=2)])
    model.config.encoder_hid_dim_type = "ip_image_proj"
    inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 1, 4)]}
    with handle.options(enabled=False):
        dense = forward(model, inputs)
    calls = handle.report().sparse_calls
    forward(model, inputs)
    assert handle.report().sparse_calls == 2 * calls
    handle.remove()
    assert torch.equal(forward(model, inputs), dense)
    assert {type(p) for n, p in model.attn_processors.items() if "attn2" in n} == {IPAdapterAttnProcessor2_0}


# the name on the page, the class of diffusers, and its settings
CACHES: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "first block cache": ("FirstBlockCacheConfig", lambda pipe: {"threshold": 0.3}),
    "taylorseer": (
        "TaylorSeerCacheConfig",
        lambda pipe: {
            "cache_interval": 2,
            "disable_cache_before_step": 1,
            "taylor_factors_dtype": torch.float32,
            "cache_identifiers": [r"blocks\.\d+\.(attn1|attn2|ffn)"],  # those by default do not name Wan's
        },
    ),
    "magcache": (
        "MagCacheConfig",
        lambda pipe: {"num_inference_steps": 5, "mag_ratios": [1.0] * 5, "threshold": 0.2},
    ),
    "pyramid": (
        "PyramidAttentionBroadcastConfig",
        lambda pipe: {
            "spatial_attention_block_skip_range": 2,
            "spatial_attention_timestep_skip_range": (-1, 1001),
            "current_timestep_callback": lambda: pipe.current_timestep,
        },
    ),
    "fastercache": (
        "FasterCacheConfig",
        lambda pipe: {
            "spatial_attention_block_skip_range": 2,
            "spatial_attention_timestep_skip_range": (-1, 990),
            "unconditional_batch_skip_range": 10,
            "current_timestep_callback": lambda: pipe.current_timestep,
            "is_guidance_distilled": True,
            "tensor_format": "BCFHW",
        },
    ),
}


def cached(pipe: Any, cache: str) -> None:
    name, settings = CACHES[cache]
    pipe.transformer.enable_cache(getattr(diffusers, name)(**settings(pipe)))


def sample(pipe: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    given = {**kwargs, "num_inference_steps": 5, "output_type": "latent"}
    out: torch.Tensor = pipe(**given, generator=torch.Generator().manual_seed(0)).frames
    return out


@pytest.mark.parametrize("order", ["apply first", "apply last"])
@pytest.mark.parametrize("cache", list(CACHES))
def test_caches_that_skip_blocks(cache: str, order: str) -> None:
    if not hasattr(diffusers, CACHES[cache][0]):
        pytest.skip(f"diffusers {diffusers.__version__} has no {CACHES[cache][0]}")
    family = "hunyuan-video" if cache == "fastercache" else "wan"
    alone, kwargs = build_pipeline(family)
    cached(alone, cache)
    expected = sample(alone, kwargs)

    pipe, _ = build_pipeline(family)
    if order == "apply first":
        handle = apply(pipe, DensePattern())
        cached(pipe, cache)
    else:
        cached(pipe, cache)
        handle = apply(pipe, DensePattern())
    assert torch.equal(sample(pipe, kwargs), expected)
    assert {reason.split(" (")[0] for reason in handle.report().dense_reasons} <= {
        "the pattern is dense",
        "first dense steps",
        "dense layer",
    }
    handle.remove()
    assert torch.equal(sample(pipe, kwargs), expected)
    pipe.transformer.disable_cache()
    plain, _ = build_pipeline(family)
    assert torch.equal(sample(pipe, kwargs), sample(plain, kwargs))
    assert not torch.equal(sample(plain, kwargs), expected), "the cache skipped nothing, so the test tells nothing"


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_gradient_checkpointing(family: str) -> None:
    """Same gradients as stock; and blocks recomputed after a later forward see the run of their own one."""
    model, inputs = build_model(family).train(), build_inputs(family)
    model.enable_gradient_checkpointing()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    stock = gradients()
    with apply(model, DensePattern()):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), stock))
    with apply(model, RadialPattern(), dense_steps=1, dense_layers=0) as handle:
        key = "timestep"
        first = model(**{**inputs, key: inputs[key] * 0 + 1}, return_dict=False)[0]  # step 0: dense
        second = model(**{**inputs, key: inputs[key] * 0}, return_dict=False)[0]  # step 1: sparse
        before = handle.report()
        first.sum().backward()  # recomputes step 0 while step 1 was last
        after = handle.report()
        assert after.calls > before.calls
        assert after.sparse_calls == before.sparse_calls
        second.sum().backward()
        assert handle.report().sparse_calls == 2 * before.sparse_calls
        assert set(handle.report().dense_reasons) == {"first dense steps (dense_steps=1)"}
