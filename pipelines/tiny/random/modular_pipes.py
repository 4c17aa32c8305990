"""Whole Modular pipelines around tiny denoisers, for models that have no other."""

from typing import Any

from genattn.pipelines.tiny.random import qwen_text, vaes
from genattn.pipelines.tiny.random.build import build_model

MINIMAX_H3_FRAMES = 124  # five seconds, the least that its blocks make: 37 frames of latents


def minimax_h3() -> tuple[Any, dict[str, Any]]:
    """(MiniMax-H3 with all of its own blocks, keyword arguments of a call of three steps for video and sound).

    Add `image=` or `last_image=` for keyframes, `references=` for the omni-reference way; see `MiniMaxH3Blocks`.
    """
    from diffusers import MiniMaxH3Scheduler
    from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3Blocks

    pipe = MiniMaxH3Blocks().init_pipeline()
    pipe.update_components(
        text_encoder=qwen_text.qwen3_vl_encoder(),
        tokenizer=qwen_text.qwen_tokenizer(),
        processor=qwen_text.qwen3_vl_processor(),
        transformer=build_model("minimax-h3"),
        transformer_ref=build_model("minimax-h3-reference", seed=1),
        vae=vaes.minimax_h3_vae(),
        audio_vae=vaes.minimax_h3_audio_vae(),
        scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    )
    pipe.update_components(reference_image_short_edge=24)
    size = {"height": 24, "width": 32, "num_frames": MINIMAX_H3_FRAMES}
    return pipe, {"prompt": "a cat dances", "num_inference_steps": 3, "output_type": "pt", **size}
