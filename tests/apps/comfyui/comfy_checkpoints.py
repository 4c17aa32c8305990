"""Tiny random checkpoints in ComfyUI's own formats; run with ComfyUI's Python: comfy_checkpoints.py COMFYUI_DIR FOLDER."""

import dataclasses
import sys
from pathlib import Path

folder = Path(sys.argv[2])
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[0], "--cpu"]  # ComfyUI reads the command line on import

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ldm.flux.model  # noqa: E402
import comfy.ldm.hunyuan_video.model  # noqa: E402
import comfy.ldm.modules.diffusionmodules.mmdit as mmdit  # noqa: E402
import comfy.ldm.wan.model  # noqa: E402
import comfy.ops  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

COMMON = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}


def wan():
    return comfy.ldm.wan.model.WanModel(
        model_type="t2v", dim=256, ffn_dim=256, num_heads=2, num_layers=3, in_dim=16, out_dim=16, text_dim=4096, **COMMON
    )


def flux_like(patch, cls, **more):
    return cls(
        in_channels=16, out_channels=16, vec_in_dim=768, hidden_size=256, mlp_ratio=4.0, num_heads=2, depth=2,
        depth_single_blocks=2, axes_dim=[16, 56, 56], patch_size=patch, qkv_bias=True, guidance_embed=True, **more, **COMMON,
    )  # fmt: skip


def known(params, **fields):
    """Fields that this version of ComfyUI has."""
    return {field.name: fields[field.name] for field in dataclasses.fields(params) if field.name in fields}


def flux():
    newer = known(comfy.ldm.flux.model.FluxParams, txt_ids_dims=[])
    return flux_like(2, comfy.ldm.flux.model.Flux, context_in_dim=4096, theta=10000, **newer)


def hunyuan():
    newer = {"meanflow": False, "meanflow_sum": False, "use_cond_type_embedding": False, "vision_in_dim": None}
    newer = known(comfy.ldm.hunyuan_video.model.HunyuanVideoParams, byt5=False, **newer)
    return flux_like([1, 2, 2], comfy.ldm.hunyuan_video.model.HunyuanVideo, context_in_dim=4096, theta=256, **newer)


def sd3(second=()):
    return mmdit.MMDiT(
        input_size=None, in_channels=16, depth=4, adm_in_channels=2048, pos_embed_max_size=32, num_patches=32 * 32,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 256}},
        qk_norm="rms", x_block_self_attn_layers=list(second), pos_embed_scaling_factor=None, **COMMON,
    )  # fmt: skip


def write(name, model):
    """Every weight random, so that every block says something; norms stay near one."""
    generator = torch.Generator().manual_seed(len(name))
    state = {}
    for key, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        is_norm = key.endswith(("scale", "ln_q.weight", "ln_k.weight", "norm_q.weight", "norm_k.weight"))
        spread = 0.05 if value.ndim < 2 else 1.5 * value[0].numel() ** -0.5
        state[key] = (1 + 0.1 * noise) if is_norm else spread * noise
    safetensors.torch.save_file(state, folder / f"{name}.safetensors")
    print(name, sum(v.numel() for v in state.values()), flush=True)


for name, model in (
    ("tiny_wan", wan()), ("tiny_flux", flux()), ("tiny_hunyuan", hunyuan()), ("tiny_sd3", sd3()), ("tiny_sd35m", sd3([0, 1]))
):  # fmt: skip
    write(name, model)
