"""Tiny random models of ComfyUI's own families; imported by scripts that run in ComfyUI's Python."""

import importlib
import inspect

import comfy.ops
import torch

COMMON = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
WIDTH, TEXT = 64, 6
FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2.0,
    "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 8, 8], "theta": 256, "qkv_bias": True,
    "guidance_embed": False, "txt_ids_dims": [],
}  # fmt: skip
HUNYUAN = {**FLUX, "patch_size": [1, 2, 2], "byt5": False, "meanflow": False, "use_cond_type_embedding": False}
HUNYUAN |= {"vision_in_dim": None, "meanflow_sum": False}
WAN = {"dim": WIDTH, "ffn_dim": 64, "num_heads": 2, "num_layers": 1, "in_dim": 16, "out_dim": 16, "text_dim": WIDTH}
LTX = {"in_channels": 16, "cross_attention_dim": WIDTH, "attention_head_dim": 32, "num_attention_heads": 2, "num_layers": 1}
LTX |= {"caption_channels": WIDTH}
VIDEO, PICTURE, FLUX_IN = (1, 16, 3, 6, 8), (1, 16, 6, 8), {"y": torch.zeros(1, 32)}


def flux_like(path, params, **more):
    """Fields that this version's parameters have."""
    import dataclasses

    module = importlib.import_module(path)
    known = {field.name for field in dataclasses.fields(getattr(module, params))}
    return {name: value for name, value in more.items() if name in known}


def made(family):
    """(model, latents, shape of the context, extras of the forward) of a family."""
    ref = torch.randn(1, 16, 4, 4)
    if family.startswith("wan"):
        module = importlib.import_module("comfy.ldm.wan.model")
        model = module.WanModel(model_type="t2v", **WAN, **COMMON)
        extras = {"context_latents": [torch.randn(1, 16, 1, 4, 4)]} if family == "wan-in-context" else {}
        if extras and "context_latents" not in inspect.getsource(module):
            raise ModuleNotFoundError("Wan with references in its context")
        return model, VIDEO, (1, TEXT, WIDTH), extras
    if family == "hunyuan":
        from comfy.ldm.hunyuan_video.model import HunyuanVideo

        given = flux_like("comfy.ldm.hunyuan_video.model", "HunyuanVideoParams", **HUNYUAN)
        return HunyuanVideo(**given, **COMMON), VIDEO, (1, TEXT, WIDTH), {**FLUX_IN}
    if family in ("flux", "flux-kontext"):
        from comfy.ldm.flux.model import Flux

        given = flux_like("comfy.ldm.flux.model", "FluxParams", **FLUX, patch_size=2)
        extras = {**FLUX_IN, **({"ref_latents": [ref]} if family == "flux-kontext" else {})}
        return Flux(**given, **COMMON), PICTURE, (1, TEXT, WIDTH), extras
    if family == "flux2":
        from comfy.ldm.flux.model import Flux

        newer = {"txt_ids_dims": [3], "axes_dim": [8, 8, 8, 8], "vec_in_dim": None, "qkv_bias": False, "ops_bias": False}
        newer |= {"global_modulation": True, "mlp_silu_act": True}
        given = flux_like("comfy.ldm.flux.model", "FluxParams", **{**FLUX, **newer}, patch_size=1)
        if "global_modulation" not in given:
            raise ModuleNotFoundError("FLUX.2")
        return Flux(**given, **COMMON), (1, 16, 4, 6), (1, TEXT, WIDTH), {}
    if family in ("sd3", "sd35"):
        from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

        embedder = {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128}}
        model = OpenAISignatureMMDITWrapper(
            input_size=None, in_channels=16, depth=2, adm_in_channels=32, pos_embed_max_size=8, num_patches=64,
            context_embedder_config=embedder, qk_norm="rms", pos_embed_scaling_factor=None,
            x_block_self_attn_layers=[0] if family == "sd35" else [], **COMMON,
        )  # fmt: skip
        return model, PICTURE, (1, TEXT, WIDTH), {**FLUX_IN}
    if family == "unet":
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        model = UNetModel(
            image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=(1, 2),
            num_head_channels=16, use_spatial_transformer=True, transformer_depth=[1, 1], transformer_depth_middle=1,
            transformer_depth_output=[1, 1, 1, 1], context_dim=WIDTH, num_classes="sequential", adm_in_channels=32,
            use_linear_in_transformer=True, **COMMON,
        )  # fmt: skip
        return model, (1, 4, 8, 8), (1, TEXT, WIDTH), {**FLUX_IN}
    if family == "chroma":
        from comfy.ldm.chroma.model import Chroma

        given = flux_like("comfy.ldm.chroma.model", "ChromaParams", **FLUX, patch_size=2, in_dim=64, out_dim=WIDTH,
                          hidden_dim=64, n_layers=2)  # fmt: skip
        return Chroma(**{**given, "in_channels": 64}, **COMMON), PICTURE, (1, TEXT, WIDTH), {"guidance": torch.zeros(1)}
    if family in ("qwen", "qwen-edit"):
        from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

        model = QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=1, attention_head_dim=32, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(16, 8, 8), **COMMON,
        )  # fmt: skip
        extras = {"ref_latents": [ref[:, :, None]]} if family == "qwen-edit" else {}
        return model, (1, 16, 1, 6, 8), (1, TEXT, WIDTH), extras
    if family == "krea":
        from comfy.ldm.krea2 import model as krea2

        if "block_index" not in inspect.getsource(krea2):
            raise ModuleNotFoundError("Krea that says which block runs")
        model = krea2.SingleStreamDiT(
            features=WIDTH, tdim=32, txtdim=32, heads=2, kvheads=1, multiplier=2, layers=1, txtlayers=2, txtheads=2,
            txtkvheads=2, **COMMON,
        )  # fmt: skip
        return model, PICTURE, (1, TEXT, 64), {}
    if family == "z-image":
        from comfy.ldm.lumina.model import NextDiT

        if "z_image_modulation" not in inspect.signature(NextDiT).parameters:
            raise ModuleNotFoundError("Z-Image")
        model = NextDiT(
            in_channels=16, dim=256, n_layers=1, n_refiner_layers=1, n_heads=2, multiple_of=32, ffn_dim_multiplier=1.0,
            qk_norm=True, cap_feat_dim=WIDTH, axes_dims=[32, 48, 48], axes_lens=[1, 64, 64], z_image_modulation=True,
            pad_tokens_multiple=8, **COMMON,
        )  # fmt: skip
        return model, (1, 16, 6, 6), (1, TEXT, WIDTH), {"num_tokens": TEXT}
    if family in ("ltx", "ltx2"):
        if family == "ltx":
            from comfy.ldm.lightricks.model import LTXVModel

            return LTXVModel(**LTX, **COMMON), VIDEO, (1, TEXT, WIDTH), {"attention_mask": None}
        from comfy.ldm.lightricks.av_model import LTXAVModel

        model = LTXAVModel(
            **LTX, audio_in_channels=128, audio_cross_attention_dim=WIDTH, audio_attention_head_dim=32,
            audio_num_attention_heads=2, **COMMON,
        )  # fmt: skip
        return model, [VIDEO, (1, 8, 5, 16)], (1, TEXT, 2 * WIDTH), {"attention_mask": None}
    if family == "cosmos":
        from comfy.ldm.cosmos.predict2 import MiniTrainDIT

        if "block_index" not in inspect.getsource(MiniTrainDIT):
            raise ModuleNotFoundError("Cosmos that says which block runs")
        model = MiniTrainDIT(
            max_img_h=32, max_img_w=32, max_frames=8, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
            concat_padding_mask=False, model_channels=WIDTH, num_blocks=1, num_heads=2, mlp_ratio=2.0,
            crossattn_emb_channels=WIDTH, pos_emb_cls="rope3d", **COMMON,
        )  # fmt: skip
        return model, VIDEO, (1, TEXT, WIDTH), {}
    if family == "kandinsky":
        from comfy.ldm.kandinsky5.model import Kandinsky5

        model = Kandinsky5(
            in_text_dim=WIDTH, in_text_dim2=32, time_dim=32, model_dim=WIDTH, ff_dim=64, visual_embed_dim=64,
            num_text_blocks=1, num_visual_blocks=1, axes_dims=(16, 8, 8), **COMMON,
        )  # fmt: skip
        return model, VIDEO, (1, TEXT, WIDTH), {**FLUX_IN}
    from comfy.ldm.minimax.model import MiniMaxH3Model

    model = MiniMaxH3Model(
        hidden_size=WIDTH, num_layers=1, token_refiner_num_layers=1, num_attention_heads=2, attention_head_dim=96,
        ffn_hidden_size=64, latents_dim=16, text_dim=WIDTH, timestep_input_dim=32, time_embed_hidden_size=32,
        time_embed_dim=32, **COMMON,
    )  # fmt: skip
    from comfy.ldm.minimax.model import PackedLayout

    payload = {"layout": PackedLayout(TEXT, 3, 6, 8, 4)}
    return model, [VIDEO, (1, 32, 2, 4)], (1, TEXT, WIDTH), {"minimax_payload": payload}


def filled(model):
    """Every weight and buffer random, so that every part says something; norms stay near one."""
    for name, weight in list(model.named_parameters()) + list(model.named_buffers()):
        if weight.is_floating_point():
            scale = 0.05 if weight.ndim < 2 else 1.5 * weight[0].numel() ** -0.5
            near_one = weight.ndim < 2 and name.endswith(("norm.weight", "scale", "norm_q.weight", "norm_k.weight"))
            weight.data = torch.randn(weight.shape) * scale + (1.0 if near_one else 0.0)
    return model.requires_grad_(False)
