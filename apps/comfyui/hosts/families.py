"""The families of ComfyUI that are served, by the name of the model's class; subclasses are found through it."""

from typing import Any

from genattn.apps.comfyui.hosts import orders
from genattn.apps.comfyui.hosts.host import Host, Stack
from genattn.errors import GenAttnError

_JOINT = (Stack("double_blocks", "double_block", "joint"), Stack("single_blocks", "single_block", "joint"))
_BLOCKS = (Stack("blocks", "double_block", "self"),)
_TRANSFORMER = "transformer_blocks"

HOSTS = {
    "WanModel": Host("Wan", "WanTransformer3DModel", _BLOCKS, orders.patches, orders.wan, text=False),
    "HunyuanVideo": Host("HunyuanVideo", "HunyuanVideoTransformer3DModel", _JOINT, orders.patches, orders.hunyuan),
    "Flux": Host("FLUX", "FluxTransformer2DModel", _JOINT, orders.square, orders.flux),
    "Chroma": Host("Chroma", "ChromaTransformer2DModel", _JOINT, orders.square, orders.flux),
    "MMDiT": Host(
        "SD3", "SD3Transformer2DModel", (Stack("joint_blocks", "double_block", "joint"),),
        lambda model: tuple(model.x_embedder.patch_size), orders.sd3, picture_alone=True,
    ),
    "QwenImageTransformer2DModel": Host(
        "Qwen-Image", "QwenImageTransformer2DModel", (Stack(_TRANSFORMER, "double_block", "joint"),), orders.flat, orders.qwen
    ),
    "NextDiT": Host("Z-Image", "ZImageTransformer2DModel", (Stack("layers", "", "joint"),), orders.square, orders.z_image),
    "SingleStreamDiT": Host(
        "Krea", "Krea2Transformer2DModel", (Stack("blocks", "", "joint"),), lambda model: (int(model.patch),) * 2, orders.krea
    ),
    "LTXVModel": Host(
        "LTX", "LTXVideoTransformer3DModel", (Stack(_TRANSFORMER, "double_block", "self"),), lambda model: (1, 1, 1),
        orders.ltx, text=False,
    ),
    "MiniMaxH3Model": Host(
        "MiniMax H3", "MiniMaxH3Transformer3DModel", (Stack("blocks", "double_block", "joint"),), orders.patches, orders.minimax
    ),
    "MiniTrainDIT": Host(
        "Cosmos", "CosmosTransformer3DModel", (Stack("blocks", "", "self"),), orders.cosmos_patch, orders.cosmos, text=False
    ),
    # by their index: ComfyUI 0.33 offers to replace these blocks, but calls what was replaced by a wrong name
    "Kandinsky5": Host(
        "Kandinsky 5", "Kandinsky5Transformer3DModel", (Stack("visual_transformer_blocks", "", "self"),),
        orders.patches, orders.grid_alone, text=False,
    ),
}  # fmt: skip


def served() -> str:
    """The families, for messages and help."""
    return ", ".join(host.name for host in HOSTS.values())


def host_of(model: Any) -> Host:
    """The host of a diffusion model; raises GenAttnError that lists the families when it is none of them."""
    for cls in type(model).__mro__:
        if cls.__name__ in HOSTS:
            return HOSTS[cls.__name__]
    raise GenAttnError(
        f"this MODEL is a {type(model).__name__}, and GenAttn's model nodes serve {served()}; "
        "leave it unpatched, or load it as a diffusers pipeline"
    )
