"""What users put on a tiny Wan pipeline beside ours, as steps: caches, quantisers, offload, adapters, and how it runs.

Several steps mean several places where ours may come in between: an adapter is loaded, later exchanged for another.
"""

import importlib
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

Step = Callable[[Any], None]
_LORA = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Neighbour:
    """steps: what is done to a pipeline, in this order. package: whose version the row carries, and without which the
    neighbour cannot be tried. undo: what must be done before another pipeline can be built. why_not: why it is not tried.
    close: the relative error that counts as the same result, 0.0 for bit-equal. processes: how many share the model.
    """

    name: str
    kind: str
    steps: tuple[Step, ...] = ()
    package: str = "diffusers"
    undo: Step = lambda pipe: None
    why_not: str = ""
    close: float = 0.0
    processes: int = 1


# ---- caches that skip blocks


def _diffusers_cache(config: str, **settings: Any) -> tuple[Step]:
    def enable(pipe: Any) -> None:
        pipe.transformer.enable_cache(getattr(diffusers, config)(**settings))

    return (enable,)


def _pyramid(pipe: Any) -> None:
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    pipe.transformer.enable_cache(config)


def _cache_dit(calibrated: bool) -> tuple[Step]:
    def enable(pipe: Any) -> None:
        cache_dit = importlib.import_module("cache_dit")
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=0.5
        )
        more = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)} if calibrated else {}
        cache_dit.enable_cache(pipe, cache_config=config, **more)

    return (enable,)


def _leave_cache_dit(pipe: Any) -> None:
    """It has put its own call on the pipeline's class."""
    importlib.import_module("cache_dit").disable_cache(pipe)


# ---- weights held in fewer bits


def _torchao(config: str) -> tuple[Step]:
    def quantise(pipe: Any) -> None:
        quantization = importlib.import_module("torchao.quantization")
        quantization.quantize_(pipe.transformer, getattr(quantization, config)())

    return (quantise,)


def _bitsandbytes(kind: str) -> tuple[Step]:
    def quantise(pipe: Any) -> None:
        layers = importlib.import_module("bitsandbytes").nn
        make = {
            "int8": lambda i, o: layers.Linear8bitLt(i, o, has_fp16_weights=False),
            "nf4": lambda i, o: layers.Linear4bit(i, o, compute_dtype=torch.float32, quant_type="nf4"),
        }[kind]
        for attn, name, old in _projections(pipe.transformer):
            new: Any = make(old.in_features, old.out_features)
            new.load_state_dict(old.state_dict())
            setattr(attn, name, new.to("cpu"))  # packed here

    return (quantise,)


def _gguf(pipe: Any) -> None:
    gguf = importlib.import_module("gguf")
    utils = importlib.import_module("diffusers.quantizers.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0
    for block in pipe.transformer.blocks:
        old = block.ffn.net[2]  # rows of a block of 32 weights
        new = utils.GGUFLinear(old.in_features, old.out_features, bias=True, compute_dtype=torch.float32)
        packed = gguf.quants.quantize(old.weight.detach().numpy(), kind)
        new.weight, new.bias = utils.GGUFParameter(torch.from_numpy(packed), quant_type=kind), old.bias
        block.ffn.net[2] = new


def _sdnq(pipe: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("sdnq").sdnq_post_load_quant(
            pipe.transformer,
            weights_dtype="int8",
            add_skip_keys=False,
            minimum_allowed_numel=1,  # it leaves layers as small as these alone
            minimum_allowed_channel_size=1,
        )


def _layerwise(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _projections(model: Any) -> list[tuple[Any, str, Any]]:
    """Queries, keys and values of every attention."""
    attentions = [attn for block in model.blocks for attn in (block.attn1, block.attn2)]
    return [(attn, name, getattr(attn, name)) for attn in attentions for name in ("to_q", "to_k", "to_v")]


# ---- memory


def _group_offload(pipe: Any) -> None:
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def _model_offload(pipe: Any) -> None:
    importlib.import_module("accelerate").cpu_offload_with_hook(pipe.transformer, execution_device="cpu")


# ---- how the model runs


_COMPILER = "aot_eager"  # traces, takes apart and runs what it traced; no C++ compiler, which takes a minute for each graph


def _compile_blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=_COMPILER)


def _compile_in_place(pipe: Any) -> None:
    pipe.transformer.compile(fullgraph=True, backend=_COMPILER)


def _compile_wrapped(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=_COMPILER)


def _forget_compiled(pipe: Any) -> None:
    torch.compiler.reset()


_BACKEND_AT_FIRST = _AttentionBackendRegistry.get_active_backend()[0]


def _backend(name: str) -> tuple[Step]:
    return (lambda pipe: pipe.transformer.set_attention_backend(name),)


def _stock_backend(pipe: Any) -> None:
    """Setting one sets it for the whole process too, and resetting the model leaves that as it is."""
    pipe.transformer.reset_attention_backend()
    _AttentionBackendRegistry.set_active_backend(_BACKEND_AT_FIRST)


def _fused(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()


def _split(**degrees: Any) -> tuple[Step]:
    def split(pipe: Any) -> None:
        pipe.transformer.enable_parallelism(config=diffusers.ContextParallelConfig(**degrees))

    return (split,)


_FORWARD_OF_NATIVE = attention_dispatch._native_attention_forward_op


def _with_lse(
    ctx: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    **named: Any,
) -> Any:
    """torch's CPU attention knows its log-sum-exp, for which a ring asks; diffusers takes it from CUDA's only."""
    if enable_gqa:
        raise NotImplementedError("torch's CPU attention with its log-sum-exp takes as many key heads as query heads")
    heads_first = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    flags: dict[str, Any] = {"attn_mask": attn_mask, "scale": scale}
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, dropout_p, is_causal, **flags)
    out, lse = out.permute(0, 2, 1, 3), lse.permute(0, 2, 1)
    return (out, lse) if return_lse else out


def _ring(pipe: Any) -> None:
    attention_dispatch._native_attention_forward_op = _with_lse
    _split(ring_degree=2)[0](pipe)


def _leave_ring(pipe: Any) -> None:
    attention_dispatch._native_attention_forward_op = _FORWARD_OF_NATIVE


# ---- adapters


def _load_adapter(seed: int, hotswap: bool = False) -> Step:
    def load(pipe: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _write_adapter(Path(folder), seed)
            more = {"hotswap": True} if hotswap else {}
            pipe.transformer.load_lora_adapter(folder, adapter_name="one", prefix=None, weight_name=_LORA, **more)

    return load


def _write_adapter(folder: Path, seed: int) -> None:
    """A LoRA file as a hub has it, with weights that are not zero."""
    peft = importlib.import_module("peft")
    build = importlib.import_module("genattn.pipelines.tiny.random.build")
    model = build.build_model("wan")
    torch.manual_seed(seed)
    model.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), adapter_name="one"
    )
    model.save_lora_adapter(folder, adapter_name="one")


NEIGHBOURS: tuple[Neighbour, ...] = (
    Neighbour("cache-dit, DBCache", "cache", _cache_dit(False), "cache-dit", _leave_cache_dit),
    Neighbour("cache-dit, DBCache + TaylorSeer", "cache", _cache_dit(True), "cache-dit", _leave_cache_dit),
    Neighbour("SeaCache", "cache", _diffusers_cache("SeaCacheConfig", threshold=10.0)),
    Neighbour("First Block Cache", "cache", _diffusers_cache("FirstBlockCacheConfig", threshold=0.3)),
    Neighbour(
        "TaylorSeer", "cache",
        _diffusers_cache(
            "TaylorSeerCacheConfig", cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"blocks\.\d+\.(attn1|attn2|ffn)"],  # those it has by default do not name Wan's
        ),
    ),
    Neighbour(
        "MagCache", "cache", _diffusers_cache("MagCacheConfig", num_inference_steps=5, mag_ratios=[1.0] * 5, threshold=0.2)
    ),
    Neighbour("Pyramid Attention Broadcast", "cache", (_pyramid,)),
    Neighbour("torchao int8", "weights", _torchao("Int8WeightOnlyConfig"), "torchao"),
    Neighbour("torchao fp8", "weights", _torchao("Float8WeightOnlyConfig"), "torchao"),
    Neighbour("bitsandbytes int8", "weights", _bitsandbytes("int8"), "bitsandbytes"),
    Neighbour("bitsandbytes NF4", "weights", _bitsandbytes("nf4"), "bitsandbytes"),
    Neighbour("GGUF Q8_0", "weights", (_gguf,), "gguf"),
    Neighbour("SDNQ int8", "weights", (_sdnq,), "sdnq"),
    Neighbour(
        "Nunchaku", "weights", package="nunchaku",
        why_not="its wheels come from its own releases and need a CUDA GPU; the PyPI package of that name is another project",
    ),
    Neighbour("fp8 storage (layerwise casting)", "weights", (_layerwise,)),
    Neighbour("model offload", "memory", (_model_offload,), "accelerate"),
    Neighbour("group offload", "memory", (_group_offload,)),
    Neighbour("torch.compile, blocks", "compiler", (_compile_blocks,), "torch", _forget_compiled, close=1e-5),
    Neighbour("torch.compile, model.compile()", "compiler", (_compile_in_place,), "torch", _forget_compiled, close=1e-5),
    Neighbour("torch.compile, torch.compile(model)", "compiler", (_compile_wrapped,), "torch", _forget_compiled, close=1e-5),
    Neighbour("set_attention_backend, _native_math", "backend", _backend("_native_math"), undo=_stock_backend),
    Neighbour("set_attention_backend, flex", "backend", _backend("flex"), undo=_stock_backend),
    Neighbour("set_attention_backend, xformers", "backend", _backend("xformers"), "xformers", _stock_backend),
    Neighbour("fused projections", "execution", (_fused,)),
    Neighbour("context parallel, Ulysses", "split", _split(ulysses_degree=2), close=1e-5, processes=2),
    Neighbour("context parallel, ring", "split", (_ring,), undo=_leave_ring, close=1e-5, processes=2),
    Neighbour("LoRA", "adapter", (_load_adapter(1),), "peft"),
    Neighbour("LoRA, hot swap", "adapter", (_load_adapter(1), _load_adapter(2, hotswap=True)), "peft"),
)  # fmt: skip
