"""What the nodes offer beyond a window, and every order with other nodes, in a real ComfyUI with tiny random checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_scene import BLOCKS, LIVE, SPARSE, Scene
from comfy_server import Comfy, Ref
from safetensors.torch import save_file

pytestmark = LIVE
NAG = {"nag_scale": 4.0, "nag_tau": 1.5, "nag_alpha": 0.5, "start_percent": 0.0, "end_percent": 1.0}
ALL = {**SPARSE, "dense_blocks": ""}


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() <= 2e-4 * np.abs(other).max())


def sampled(scene: Scene, model: Ref, name: str, steps: int = 2, **changes: Any) -> None:
    scene.sample(model, name, steps=steps, told=True, **changes)


def test_adaptive_presets_tails_moments_and_break_even(comfy: Comfy) -> None:
    scene = Scene("tiny_wan")
    plain = {**ALL, "pattern_options": ""}
    scene.sample(scene.model, "plain")
    sampled(scene, scene.sparse({**plain, "pattern": "adaptive"}), "adaptive")
    for name in ("auto", "gna"):
        sampled(scene, scene.sparse({**plain, "pattern": name}), name)
    for tail in ("none", "mean"):
        sampled(scene, scene.sparse({**plain, "pattern": "neighborhood", "tail": tail}), f"tail_{tail}")
    sampled(scene, scene.sparse({**ALL, "start_percent": 0.4, "end_percent": 0.8}), "moments", steps=5)
    told = scene.run(comfy)
    pictures = {name: comfy.image(name) for name in (*told, "plain")}
    assert all(np.isfinite(picture).all() for picture in pictures.values())
    for name in ("adaptive", "auto", "gna", "tail_none", "tail_mean"):
        assert told[name]["sparse_calls"] == told[name]["calls"] > 0, told[name]["dense_reasons"]
        assert told[name]["density"] < 1
    assert not close(pictures["tail_none"], pictures["tail_mean"]), "what stands in for skipped tiles makes a difference"
    moments = told["moments"]["sites"]
    assert [row["sparse"] for row in moments] == [2] * BLOCKS["tiny_wan"], "steps 2 and 3 of 5"
    short = Scene("tiny_wan", length=9)  # 192 tokens; the shortest break-even measured on a CPU is 256
    short.sample(short.model, "short_plain")
    sampled(short, short.sparse({**ALL, "min_tokens": -1}), "short")
    report = short.run(comfy)["short"]
    assert report["sparse_calls"] == 0
    assert any("short sequence" in reason for reason in report["dense_reasons"])
    assert np.array_equal(comfy.image("short"), comfy.image("short_plain"))


def test_profile_writes_a_map_that_sparse_attention_reads(comfy: Comfy) -> None:
    scene = Scene("tiny_wan")
    profile = scene.node(
        "GenAttn_Profile", model=scene.model, positive=scene.positive, negative=scene.negative, latent=scene.latent, seed=1,
        sampling_steps=2, cfg=1.0, runs=2, density=0.5, name="tests/map",
    )  # fmt: skip
    profiled = scene.sparse({**ALL, "pattern": "profile", "pattern_options": "", "path": profile})
    sampled(scene, profiled, "profiled")
    scene.texts["table"] = scene.node("RigText", text=profile[2])
    outputs = comfy.run(scene.nodes)
    assert (comfy.base / "output" / "tests" / "map.safetensors").is_file()
    assert "of the scores" in outputs[scene.texts["table"].name]["text"][0]
    told = json.loads(outputs[scene.texts["profiled"].name]["text"][0])
    assert told["sparse_calls"] == told["calls"] > 0, told["dense_reasons"]
    assert told["density"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("family", "padding"), [("tiny_wan", 0), ("tiny_hunyuan", 5), ("tiny_flux", 0), ("tiny_sd35m", 0)])
def test_nag_through_the_sampler(comfy: Comfy, family: str, padding: int) -> None:
    scene = Scene(family, padding)
    guided = scene.node("GenAttn_NAG", model=scene.model, negative=scene.negative, **NAG)
    off = scene.node("GenAttn_NAG", model=scene.model, negative=scene.negative, **{**NAG, "nag_scale": 1.0})
    same = scene.node("GenAttn_NAG", model=scene.model, negative=scene.positive, **NAG)
    late = scene.node("GenAttn_NAG", model=scene.model, negative=scene.negative, **{**NAG, "start_percent": 0.5})
    for name, model in (("plain", scene.model), ("off", off), ("same", same)):
        scene.sample(model, name, cfg=1.0)
    sampled(scene, guided, "guided", cfg=1.0)
    sampled(scene, late, "late", steps=4, cfg=1.0)
    sampled(scene, scene.sparse(SPARSE, guided), "both", cfg=1.0)
    sampled(scene, scene.node("GenAttn_NAG", model=scene.sparse(SPARSE), negative=scene.negative, **NAG), "both_too", cfg=1.0)
    told = scene.run(comfy)
    pictures = {name: comfy.image(name) for name in ("plain", "off", "same", "guided", "both", "both_too")}
    assert np.array_equal(pictures["off"], pictures["plain"])
    assert close(pictures["same"], pictures["plain"])
    assert not close(pictures["guided"], pictures["plain"])
    assert np.isfinite(pictures["guided"]).all()
    assert np.array_equal(pictures["both"], pictures["both_too"]), "before or after Sparse Attention"
    assert not close(pictures["both"], pictures["guided"])
    assert told["both"]["sparse_calls"] > 0
    counts = {name: told[name]["plugins"][-1]["counts"] for name in ("guided", "late")}
    assert counts["guided"] == {"forwards": 2, "guided": 2, "calls": 2 * BLOCKS[family]}
    assert 0 < counts["late"]["guided"] < counts["late"]["forwards"] == 4
    again = Scene(family, padding)
    again.sample(again.model, "again", cfg=1.0)
    again.run(comfy)
    assert np.array_equal(comfy.image("again"), pictures["plain"]), "nothing stays behind"


def test_nag_with_guidance_above_one_and_with_a_bare_guider(comfy: Comfy) -> None:
    scene = Scene("tiny_wan")
    guided = scene.node("GenAttn_NAG", model=scene.model, negative=scene.negative, **NAG)
    sampled(scene, guided, "cfg", cfg=2.0)
    sampled(scene, scene.guided(guided, heads="L1"), "softpag", cfg=1.0)
    sampled(scene, guided, "cfg1", cfg=1.0)
    noise = scene.node("RandomNoise", noise_seed=5)
    guider = scene.node("BasicGuider", model=guided, conditioning=scene.positive)
    sigmas = scene.node("BasicScheduler", model=guided, scheduler="simple", steps=2, denoise=1.0)
    sampler = scene.node("KSamplerSelect", sampler_name="euler")
    latent = scene.node(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=scene.latent
    )
    scene.node("RigSave", images=scene.node("RigDecode", latent=latent), name="bare")
    told = scene.run(comfy)
    assert np.array_equal(comfy.image("bare"), comfy.image("cfg1")), "a guider without a negative prompt"
    assert not close(comfy.image("cfg"), comfy.image("cfg1"))
    assert not close(comfy.image("softpag"), comfy.image("cfg1"))
    assert told["cfg"]["plugins"][-1]["counts"]["guided"] == 2
    assert told["softpag"]["plugins"][-1]["counts"]["guided"] == 4, "the extra pass too"


# ---- beside other nodes


def lora(comfy: Comfy) -> str:
    """A LoRA of the tiny Wan."""
    folder = comfy.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(4)
    state = {}
    for place in range(3):
        for part in ("self_attn.q", "cross_attn.k"):
            name = f"diffusion_model.blocks.{place}.{part}"
            state[f"{name}.lora_down.weight"] = torch.randn(4, 256, generator=generator) / 8
            state[f"{name}.lora_up.weight"] = torch.randn(256, 4, generator=generator)
    save_file(state, folder / "tiny_wan_lora.safetensors")
    return "tiny_wan_lora.safetensors"


OTHERS = {
    "backend": ("ModelAttentionBackend", {"attention": "pytorch attention"}),
    "lora": ("LoraLoaderModelOnly", {"lora_name": "tiny_wan_lora.safetensors", "strength_model": 1.0}),
    "skip_layers": (
        "SkipLayerGuidanceDiT",
        {
            "double_layers": "1", "single_layers": "", "scale": 2.0, "start_percent": 0.0, "end_percent": 1.0,
            "rescaling_scale": 0.0,
        },
    ),
    "on_top": ("RigTop", {"takes": False}),
    "takes": ("RigTakes", {}),
    "object_patch": ("RigForward", {"part": "self_attn"}),
    "compiled": ("RigCompile", {"backend": "eager"}),
    "core_declines": ("RigCoreSparse", {"takes": False}),
    "core_takes": ("RigCoreSparse", {"takes": True}),
    "kj_enhance": ("WanVideoEnhanceAVideoKJ", {"latent": "@latent", "weight": 10.0}),
    "kj_nag": ("WanVideoNAG", {"conditioning": "@negative", "nag_scale": 50.0, "nag_alpha": 1.0, "nag_tau": 10.0}),
    "kj_zero_star": ("CFGZeroStarAndInit", {"use_zero_init": False, "zero_init_steps": 0}),
    "kj_chunks": ("WanChunkFeedForward", {"chunks": 2, "dim_threshold": 1024}),
    "kj_nabla": (
        "NABLA_AttentionKJ",
        {
            "latent": "@latent", "window_time": 3, "window_width": 3, "window_height": 3, "sparsity": 0.9,
            "torch_compile": False,
        },
    ),
    "kj_compiled": ("RigCompileBlocks", {}),
}  # fmt: skip
# the node of another that one of the rig puts on
NEEDS = {"RigCoreSparse": "BlockSparseAttention", "RigCompileBlocks": "TorchCompileModelAdvanced"}
# whose node after ours leaves it no call: told, not silent
TAKES_THE_SLOT = {"backend", "kj_nabla"}
TAKES_EVERYTHING = {"takes", "core_takes"}  # in either order
CHANGES_THE_MODEL = {"lora", "skip_layers", "object_patch", "kj_enhance", "kj_nag", "kj_zero_star"}
HARDLY = {
    "kj_nag"
}  # its clamped norm leaves little of a text that random weights hardly heed: a millionth of the largest value


@pytest.mark.parametrize("other", OTHERS)
def test_every_order_with_another_node_works_or_is_told(comfy: Comfy, other: str) -> None:
    lora(comfy)
    kind, widgets = OTHERS[other]
    needed = NEEDS.get(kind, kind)
    if needed not in comfy.get("/object_info"):
        pytest.skip(f"this ComfyUI has no node {needed}")
    widgets_of_ours = {**SPARSE, "dense_steps": 1.0, "dense_blocks": ""}
    scene = Scene("tiny_wan")
    refs = {"@latent": scene.latent, "@negative": scene.negative}
    widgets = {name: refs.get(value, value) if isinstance(value, str) else value for name, value in widgets.items()}
    scene.sample(scene.model, "plain", steps=3)
    scene.sample(scene.node(kind, model=scene.model, **widgets), "theirs", steps=3)
    sampled(scene, scene.sparse(widgets_of_ours), "ours", steps=3)
    sampled(scene, scene.sparse(widgets_of_ours, scene.node(kind, model=scene.model, **widgets)), "before", steps=3)
    sampled(scene, scene.node(kind, model=scene.sparse(widgets_of_ours), **widgets), "after", steps=3)
    told = scene.run(comfy)
    plain, theirs, alone, before, after = (comfy.image(name) for name in ("plain", "theirs", "ours", "before", "after"))
    assert not close(alone, plain)
    assert told["ours"]["removed"] == ""
    if other in TAKES_EVERYTHING:
        assert close(before, theirs)
        assert close(after, theirs)
        assert all("answered the self-attention of 3 blocks" in told[name]["removed"] for name in ("before", "after"))
        return
    assert told["before"]["removed"] == ""
    assert told["before"]["sparse_calls"] >= told["ours"]["sparse_calls"] > 0
    if other in TAKES_THE_SLOT:
        assert close(after, theirs), "then the model runs as if ours were not there"
        assert told["after"]["removed"].startswith("NOT APPLIED")
    else:
        assert close(after, before), "the order makes no difference"
        assert told["after"]["removed"] == ""
        assert told["after"]["sparse_calls"] == told["before"]["sparse_calls"]
    if other in CHANGES_THE_MODEL:
        acts = not np.array_equal(before, alone) if other in HARDLY else not close(before, alone)
        assert acts, "the other node acts"
        assert not close(before, theirs), "and so does ours"
    else:
        assert close(before, alone)
    again = Scene("tiny_wan")
    again.sample(again.model, "bypassed", steps=3)
    again.run(comfy)
    assert np.array_equal(comfy.image("bypassed"), plain), "bypassed, the model is stock"


@pytest.mark.parametrize("other", ["on_top", "object_patch", "lora", "core_declines"])
def test_every_order_of_nag_with_another_node(comfy: Comfy, other: str) -> None:
    lora(comfy)
    kind, widgets = OTHERS[other]
    if NEEDS.get(kind, kind) not in comfy.get("/object_info"):
        pytest.skip(f"this ComfyUI has no node {NEEDS.get(kind, kind)}")
    scene = Scene("tiny_wan")

    def nag(model: Ref) -> Ref:
        return scene.node("GenAttn_NAG", model=model, negative=scene.negative, **NAG)

    scene.sample(nag(scene.model), "ours", cfg=1.0)
    scene.sample(nag(scene.node(kind, model=scene.model, **widgets)), "before", cfg=1.0)
    scene.sample(scene.node(kind, model=nag(scene.model), **widgets), "after", cfg=1.0)
    scene.run(comfy)
    assert close(comfy.image("after"), comfy.image("before"))
    assert close(comfy.image("before"), comfy.image("ours")) == (other in ("on_top", "core_declines"))


def test_an_attention_taken_from_nag_stops_the_run(comfy: Comfy) -> None:
    scene = Scene("tiny_wan")
    guided = scene.node("GenAttn_NAG", model=scene.model, negative=scene.negative, **NAG)
    scene.sample(scene.node("RigThief", model=guided, chains=False), "never", cfg=1.0)
    assert "another node answered it" in comfy.error(scene.nodes)


def test_an_exception_leaves_nothing_behind(comfy: Comfy) -> None:
    def patched(scene: Scene) -> Ref:
        return scene.sparse(ALL, scene.node("GenAttn_NAG", model=scene.model, negative=scene.negative, **NAG))

    scene = Scene("tiny_wan")
    scene.sample(scene.model, "plain", cfg=1.0)
    scene.sample(patched(scene), "patched", cfg=1.0)
    scene.run(comfy)
    plain, alone = comfy.image("plain"), comfy.image("patched")
    failing = Scene("tiny_wan")
    failing.sample(failing.node("RigFail", model=patched(failing)), "never", cfg=1.0)
    assert "the rig fails here" in comfy.error(failing.nodes)
    again = Scene("tiny_wan", seed=1)
    again.sample(patched(again), "patched_again", cfg=1.0)
    again.sample(again.model, "plain_again", cfg=1.0)
    again.run(comfy)
    assert np.array_equal(comfy.image("plain_again"), plain)
    assert np.array_equal(comfy.image("patched_again"), alone)
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    last = Scene("tiny_wan")
    last.sample(last.model, "plain_last", cfg=1.0)
    last.run(comfy)
    assert np.array_equal(comfy.image("plain_last"), plain), "and unloaded"


def test_workflows_saved_before_still_load(comfy: Comfy) -> None:
    previous = Path(__file__).with_name("previous")
    for file in sorted(previous.glob("api_*.json")):
        graph = json.loads(file.read_text())
        info = comfy.get("/object_info")
        for node in graph.values():
            if node["class_type"].startswith("GenAttn_"):
                inputs = info[node["class_type"]]["input"]
                assert set(inputs.get("required", {})) <= set(node["inputs"]), "nothing new is required"
                assert set(node["inputs"]) <= {*inputs.get("required", {}), *inputs.get("optional", {})}
