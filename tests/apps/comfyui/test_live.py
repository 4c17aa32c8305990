"""Every node in a real ComfyUI on the CPU, with tiny random checkpoints in ComfyUI's own formats.

COMFYUI_DIR: folder with main.py. COMFYUI_PYTHON: its Python, which must see this genattn. Without them nothing here runs, and
`test_comfy_contract` holds what can be held of the nodes alone.
"""

import json
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_scene import BLOCKS, DENSE, FULL, HEADS, LIVE, PIPE, PYTHON, SPARSE, Scene
from comfy_server import HERE, Comfy, Graph, Ref

from genattn.apps.comfyui.install import pack_folder
from genattn.apps.comfyui.nodes import node_specs
from genattn.apps.comfyui.workflows import write_workflows
from genattn.guidance.heads.head_set import HeadSet

pytestmark = LIVE


def test_comfyui_knows_the_nodes_their_pages_and_examples(comfy: Comfy) -> None:
    known = comfy.get("/object_info")
    for spec in node_specs():
        found = known[spec.id]
        assert found["display_name"] == spec.title
        assert list(found["output"]) == [out.type for out in spec.outputs]
        assert {**found["input"].get("required", {}), **found["input"].get("optional", {})}.keys() == {
            f.id for f in spec.inputs
        }
        assert spec.search[0] in json.dumps(found)
        assert comfy.get(f"/extensions/genattn/docs/{spec.id}.md").startswith(f"# {spec.title}")
    offered = comfy.get("/workflow_templates")["genattn"]
    assert set(offered) == {file.stem for file in (pack_folder() / "example_workflows").glob("*.json")}


def test_example_workflows_are_what_the_command_writes(comfy: Comfy, tmp_path: Path) -> None:
    written = write_workflows(f"http://127.0.0.1:{comfy.port}", pack_folder() / "api", tmp_path)
    for file in written:
        shipped = json.loads((pack_folder() / "example_workflows" / file.name).read_text())
        assert _ours(json.loads(file.read_text())) == _ours(shipped)


def _ours(workflow: dict[str, Any]) -> dict[str, Any]:
    """A workflow without what ComfyUI's own nodes look like, which changes with its version."""
    nodes = [node for node in workflow["nodes"] if node["type"].startswith("GenAttn_")]
    return {**workflow, "nodes": nodes, "types": [node["type"] for node in workflow["nodes"]]}


@pytest.mark.parametrize(
    ("family", "padding"), [("tiny_wan", 0), ("tiny_hunyuan", 5), ("tiny_flux", 0), ("tiny_sd3", 0), ("tiny_sd35m", 0)]
)
def test_sparse_and_guided_against_unpatched(comfy: Comfy, family: str, padding: int) -> None:
    scene = Scene(family, padding)
    sparse = scene.sparse(SPARSE)
    scene.sample(scene.model, "plain")
    scene.sample(scene.sparse(DENSE), "dense")
    scene.sample(scene.sparse(FULL), "full", told=True)
    scene.sample(sparse, "sparse", told=True)
    scene.sample(scene.guided(sparse), "both", told=True)
    scene.sample(scene.guided(scene.model, scale=0.0), "unguided")
    told = scene.run(comfy)
    pictures = {name: comfy.image(name) for name in ("plain", "dense", "full", "sparse", "both", "unguided")}
    plain = pictures["plain"]
    assert all(np.isfinite(picture).all() for picture in pictures.values())
    assert np.array_equal(pictures["dense"], plain), "a dense pattern is the unpatched model"
    assert np.array_equal(pictures["unguided"], plain), "guidance of scale 0 is the unpatched model"
    np.testing.assert_allclose(pictures["full"], plain, atol=2e-4 * np.abs(plain).max())
    assert told["full"]["density"] == 1.0
    assert told["full"]["sparse_calls"] == told["full"]["calls"]
    assert np.abs(pictures["sparse"] - plain).max() > 1e-3
    assert np.abs(pictures["both"] - pictures["sparse"]).max() > 1e-3
    rows = told["sparse"]["sites"]
    assert len({row["depth"] for row in rows}) == BLOCKS[family]
    assert all((row["sparse"] == 0) == (row["depth"] == 0) for row in rows), "block 0 was to stay dense"
    assert 0 < told["sparse"]["density"] < 0.6
    guidance = next(plugin for plugin in told["both"]["plugins"] if plugin["plugin"] == "SoftPAG")
    assert guidance["counts"] == {"extra_passes": 2, "guided_steps": 2}
    # unloading and going on without our nodes gives the stock model
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    again = Scene(family, padding)
    again.sample(again.model, "again")
    again.run(comfy)
    assert np.array_equal(comfy.image("again"), plain)


@pytest.mark.parametrize("family", ["tiny_hunyuan", "tiny_flux", "tiny_sd3", "tiny_sd35m"])
def test_the_order_of_tokens_is_the_hosts(comfy: Comfy, family: str) -> None:
    for seed in (1, 3):  # two texts, all else alike: what differs in the first block's queries are the text tokens
        scene = Scene(family, seed=seed)
        scene.sample(scene.node("RigRecord", model=scene.sparse(DENSE), name=f"queries{seed}"), "order", steps=1)
        scene.run(comfy)
    one, other = (np.load(comfy.base / "output" / f"queries{seed}.npy") for seed in (1, 3))
    moved = np.abs(one - other).max((0, -1)) > 1e-6
    assert moved.sum() == 16
    # ComfyUI turned HunyuanVideo's order round between versions, so the order is read off, not written down here
    assert np.array_equal(moved, np.load(comfy.base / "output" / "queries3_text.npy"))


def test_schedule_blocks_steps_and_noise_levels(comfy: Comfy) -> None:
    scene = Scene("tiny_wan")
    scene.sample(scene.sparse({**SPARSE, "dense_steps": 0.5, "dense_blocks": "0,-1"}), "steps", steps=4, told=True)
    scene.sample(scene.sparse({**SPARSE, "dense_blocks": "", "sigma_start": 0.9, "sigma_end": 0.3}), "levels", 4, told=True)
    scene.sample(scene.sparse({**SPARSE, "pattern": "radial", "dense_blocks": ""}), "radial", told=True)
    told = scene.run(comfy)
    assert [(row["sparse"], row["dense"]) for row in told["steps"]["sites"]] == [(0, 4), (2, 2), (0, 4)]
    assert any("outside the noise window" in reason for reason in told["levels"]["dense_reasons"])
    assert 0 < told["levels"]["sparse_calls"] < told["levels"]["calls"]
    assert told["radial"]["density"] < 1


def test_pag_seg_and_a_head_set_from_diffusers(comfy: Comfy, tmp_path: Path) -> None:
    layers = dict.fromkeys(range(4), 4)
    right = HeadSet.from_names("L1H0-3:0.5", layers, model="SD3Transformer2DModel").save(tmp_path / "right.json")
    wrong = HeadSet.from_names("L1H0", layers, model="FluxTransformer2DModel").save(tmp_path / "wrong.json")
    scene = Scene("tiny_sd3")
    loaded = scene.node("GenAttn_HeadSetLoad", path=str(right))
    scene.sample(scene.guided(scene.model, head_set=loaded), "set")
    scene.sample(scene.guided(scene.model, heads="L1", u=0.5), "text")
    scene.sample(scene.guided(scene.model, method="pag", heads="L1"), "pag")
    scene.sample(scene.guided(scene.model, heads="L1", u=1.0), "pag_by_heads")
    scene.sample(scene.guided(scene.model, method="seg", heads="L1"), "seg")
    scene.run(comfy)
    assert np.array_equal(comfy.image("set"), comfy.image("text"))
    assert np.array_equal(comfy.image("pag"), comfy.image("pag_by_heads"))
    assert np.abs(comfy.image("pag") - comfy.image("seg")).max() > 1e-3
    scene = Scene("tiny_sd3")
    loaded = scene.node("GenAttn_HeadSetLoad", path=str(wrong))
    scene.sample(scene.guided(scene.model, head_set=loaded), "never")
    assert "must be used on a model of the same layers" in comfy.error(scene.nodes)


def test_other_overrides_before_and_after(comfy: Comfy) -> None:
    scene = Scene("tiny_wan")
    sparse = scene.sparse(SPARSE)
    chained = scene.node("RigThief", model=sparse, chains=True)
    scene.sample(sparse, "ours")
    scene.sample(chained, "chained", told=True)
    told = scene.run(comfy)
    assert np.array_equal(comfy.image("ours"), comfy.image("chained"))
    assert told["chained"]["sparse_calls"] == 4
    assert told["chained"]["removed"] == ""
    scene = Scene("tiny_wan")
    under = scene.node("RigThief", model=scene.model, chains=False)
    latent = scene.sample(scene.sparse(SPARSE, under), "under", told=True)
    seen = scene.node("RigSeen", latent=latent)
    outputs = comfy.run(scene.nodes)
    assert json.loads(outputs[scene.texts["under"].name]["text"][0])["sparse_calls"] == 4
    # its override still gets what we leave dense: block 0, and the cross-attention of all three blocks
    assert outputs[seen.name]["text"] == [str(2 * (1 + 3))]
    scene = Scene("tiny_wan")
    scene.sample(scene.node("RigThief", model=scene.sparse(SPARSE), chains=False), "stolen", told=True)
    removed = scene.run(comfy)["stolen"]["removed"]
    assert removed.startswith("NOT APPLIED in 2 of 2 forwards")
    assert "comfy_rig.RigThief" in removed
    assert "NOT APPLIED" in comfy.log.read_text()


def test_cores_own_context_windows(comfy: Comfy) -> None:
    windows = {
        "context_length": 9, "context_overlap": 5, "context_schedule": "standard_static", "context_stride": 1,
        "closed_loop": False, "fuse_method": "pyramid",
    }  # fmt: skip
    # fields that newer versions of the node require, at their defaults
    required = comfy.get("/object_info/WanContextWindowsManual")["WanContextWindowsManual"]["input"]["required"]
    windows = {name: told[1]["default"] for name, told in required.items() if "default" in told[1]} | windows
    scene = Scene("tiny_wan")
    for name, model in (("w_plain", scene.model), ("w_full", scene.sparse(FULL)), ("w_sparse", scene.sparse(SPARSE))):
        windowed = scene.node("WanContextWindowsManual", model=model, **windows)
        scene.sample(windowed, name, told=name != "w_plain")
    told = scene.run(comfy)
    plain = comfy.image("w_plain")
    np.testing.assert_allclose(comfy.image("w_full"), plain, atol=2e-4 * np.abs(plain).max())
    # newer versions put a frame in front of every window but the first, for causal autoencoders, and drop it afterwards
    tokens = {row["tokens"] for row in told["w_sparse"]["sites"]}
    assert tokens <= {3 * 8 * 8, 4 * 8 * 8}, "the grid is the window's"
    assert told["w_sparse"]["sparse_calls"] > 0


def test_preview_and_probe(comfy: Comfy) -> None:
    scene = Scene("tiny_hunyuan")
    sparse = scene.sparse(SPARSE)
    preview = scene.node("GenAttn_MaskPreview", model=sparse, latent=scene.latent, text_tokens=16)
    probe = scene.node("GenAttn_BlockProbe", model=sparse, positive=scene.positive, latent=scene.latent, sigma=0.5, seed=1)
    scene.node("RigSave", images=preview, name="preview")
    scene.node("RigSave", images=probe, name="probe")
    scene.texts["probe"] = scene.node("RigText", text=probe[1])
    scene.sample(sparse, "ran", told=True)
    told = scene.run(comfy)
    assert comfy.image("preview").shape[-1] == 3
    assert comfy.image("probe").std() > 0.01
    assert [row["block"] for row in told["probe"]] == [row["site"] for row in told["ran"]["sites"]]
    assert all(0 < row["error"] < 2 and not row["reason"] for row in told["probe"])
    assert told["probe"][0]["density"] == pytest.approx(told["ran"]["density"], abs=0.02)


def fifo(scene: Scene, model: Ref, steps: int = 6, window: int = 4) -> Ref:
    sampler = scene.node("GenAttn_FifoSampler", window=window, latents_per_level=1, lookahead=True, eta=0.0, window_batch=2)
    sigmas = scene.node("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)
    return scene.node(
        "SamplerCustom", model=model, add_noise=True, noise_seed=3, cfg=2.0, positive=scene.positive,
        negative=scene.negative, sampler=sampler, sigmas=sigmas, latent_image=scene.latent,
    )  # fmt: skip


def test_fifo_makes_as_many_frames_as_the_latent_has(comfy: Comfy) -> None:
    scene = Scene("tiny_wan", width=64, height=64, length=37)
    patched = scene.guided(scene.sparse({**SPARSE, "window": "3,2,2"}), heads="L1H0")
    for name, model in (("long", scene.model), ("long_patched", patched)):
        scene.node("RigSave", images=scene.node("RigDecode", latent=fifo(scene, model)), name=name)
    scene.run(comfy)
    plain, both = comfy.image("long"), comfy.image("long_patched")
    assert plain.shape == both.shape == (10, 8, 8, 3)
    assert np.isfinite(both).all()
    assert np.abs(plain - both).max() > 1e-3
    assert all(np.abs(a - b).max() > 1e-3 for a, b in pairwise(plain))


def test_fifo_refuses_before_it_starts(comfy: Comfy) -> None:
    short = Scene("tiny_wan", width=64, height=64, length=9)
    short.node("RigSave", images=short.node("RigDecode", latent=fifo(short, short.model)), name="never")
    assert "longer than the window" in comfy.error(short.nodes)
    few = Scene("tiny_wan", width=64, height=64, length=37)
    few.node("RigSave", images=few.node("RigDecode", latent=fifo(few, few.model, steps=3)), name="never")
    assert "at least as many steps" in comfy.error(few.nodes)
    other = Scene("tiny_hunyuan", width=64, height=64, length=37)
    other.node("RigSave", images=other.node("RigDecode", latent=fifo(other, other.model)), name="never")
    assert "one timestep per frame" in comfy.error(other.nodes)


def test_wrong_widgets_are_refused_at_submit_time(comfy: Comfy) -> None:
    scene = Scene("tiny_wan")
    scene.sample(scene.sparse({**SPARSE, "window": "a,b"}), "never")
    status, told = comfy.post("/prompt", {"prompt": scene.nodes})
    assert status == 400
    assert "window must be tokens per axis" in json.dumps(told)


def pipe_inputs(**changes: Any) -> dict[str, Any]:
    plain = {"prompt": "a red circle moves right on a dark background", "negative": "", "seed": 1, "height": 48, "width": 48}
    return {**plain, "steps": 3, "guidance_scale": 0.0, **changes}


def test_video_over_diffusers(comfy: Comfy) -> None:
    graph = Graph()
    pipe = graph.node("GenAttn_LoadPipeline", model="", dtype="auto", device="cpu", offline=True)
    branches = {"stock": pipe}
    branches["same"] = graph.node("GenAttn_ApplyPipeline", pipe=pipe, **{**PIPE, "pattern": "dense"}, **HEADS)
    branches["sparse"] = graph.node("GenAttn_ApplyPipeline", pipe=pipe, **PIPE, **{**HEADS, "method": "softpag"})
    branches["after"] = pipe
    texts = {}
    for place, (name, branch) in enumerate(branches.items()):
        clip = graph.node("GenAttn_SampleVideo", pipe=branch, frames=9, **pipe_inputs(fps=float(place)))
        graph.node("RigSave", images=clip, name=name)
        texts[name] = graph.node("RigText", text=clip[2])
    film = graph.node("SaveVideo", video=clip[1], filename_prefix="clip", format="auto", codec="auto")
    outputs = comfy.run(graph.nodes)
    pictures = {name: comfy.image(name) for name in branches}
    assert pictures["stock"].shape == (9, 48, 48, 3)
    assert 0 <= pictures["stock"].min() < pictures["stock"].max() <= 1
    assert np.array_equal(pictures["same"], pictures["stock"])
    assert np.array_equal(pictures["after"], pictures["stock"]), "a sampling leaves the pipeline stock"
    assert np.abs(pictures["sparse"] - pictures["stock"]).max() > 1e-3
    assert "ran sparse" in outputs[texts["sparse"].name]["text"][0]
    assert outputs[film.name]["images"][0]["filename"].endswith(".mp4")


def test_picture_over_diffusers(comfy: Comfy, tmp_path: Path) -> None:
    from genattn.pipelines.tiny.random.build import build_pipeline

    build_pipeline("sd3")[0].save_pretrained(tmp_path / "sd3")
    graph = Graph()
    pipe = graph.node("GenAttn_LoadPipeline", model=str(tmp_path / "sd3"), dtype="float32", device="cpu", offline=True)
    guided = graph.node(
        "GenAttn_ApplyPipeline", pipe=pipe, **{**PIPE, "pattern": "dense"}, **{**HEADS, "method": "pag", "heads": "L1"}
    )
    for name, branch in (("picture", pipe), ("guided", guided)):
        image = graph.node("GenAttn_SampleImage", pipe=branch, **pipe_inputs(height=64, width=64, guidance_scale=3.0, steps=2))
        graph.node("RigSave", images=image, name=name)
    comfy.run(graph.nodes)
    assert comfy.image("picture").shape == (1, 64, 64, 3)
    assert np.abs(comfy.image("picture") - comfy.image("guided")).max() > 0
    graph.node("GenAttn_SampleVideo", pipe=pipe, frames=9, **pipe_inputs(fps=0.0))
    graph.node("RigSave", images=Ref(str(len(graph.nodes))), name="never")
    assert "needs the node Sample Image" in comfy.error(graph.nodes)


def listen(comfy: Comfy, graph: Graph, interrupt_after: int = 0) -> dict[str, Any]:
    told = subprocess.run(
        [str(PYTHON), str(HERE / "comfy_listen.py"), str(comfy.port), str(interrupt_after)],
        input=json.dumps(graph.nodes), capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    return json.loads(told.stdout)


def test_long_video_progress_preview_and_interrupt(comfy: Comfy) -> None:
    def film(frames: int) -> Graph:
        graph = Graph()
        pipe = graph.node("GenAttn_LoadPipeline", model="", dtype="auto", device="cpu", offline=True)
        settings = pipe_inputs(frames=frames, steps=8)
        video = graph.node("GenAttn_LongVideo", pipe=pipe, **settings, partitions=1, lookahead=False, ouroboros=False, fps=8.0)
        graph.node("RigSave", images=video, name="film")
        return graph

    told = listen(comfy, film(33))
    assert told["kinds"].get("execution_success") == 1, told["error"]
    assert told["progress"][-1] == [33, 33]
    assert told["previews"] > 0
    assert comfy.image("film").shape == (33, 48, 48, 3)
    assert len(list((comfy.base / "output").glob("genattn_long*.mp4"))) == 1
    told = listen(comfy, film(4001), interrupt_after=3)
    assert told["kinds"].get("execution_interrupted") == 1
    assert told["progress"][-1][0] < 200


@pytest.mark.parametrize("node", ["GenAttn_SampleImage", "GenAttn_SampleVideo"])
def test_a_sampling_shows_previews_and_stops(comfy: Comfy, tmp_path: Path, node: str) -> None:
    video = node == "GenAttn_SampleVideo"
    if not video:
        from genattn.pipelines.tiny.random.build import build_pipeline

        build_pipeline("sd3")[0].save_pretrained(tmp_path / "sd3")

    def graph(steps: int) -> Graph:
        made = Graph()
        source = "" if video else str(tmp_path / "sd3")
        pipe = made.node("GenAttn_LoadPipeline", model=source, dtype="auto", device="cpu", offline=True)
        sizes = pipe_inputs(height=64, width=64, steps=steps, guidance_scale=3.0)
        picture = made.node(node, pipe=pipe, **sizes, **({"frames": 9, "fps": 0.0} if video else {}))
        made.node("RigSave", images=picture, name="sampled")
        return made

    told = listen(comfy, graph(4))
    assert told["kinds"].get("execution_success") == 1, told["error"]
    assert told["progress"][-1] == [4, 4]
    assert told["previews"] > 0
    told = listen(comfy, graph(200), interrupt_after=1)
    assert told["kinds"].get("execution_interrupted") == 1, told["error"]
    assert told["progress"][-1][0] < 150


def test_fifo_shows_progress_previews_and_stops(comfy: Comfy) -> None:
    scene = Scene("tiny_wan", width=64, height=64, length=801)
    scene.node("RigSave", images=scene.node("RigDecode", latent=fifo(scene, scene.model)), name="never")
    told = listen(comfy, scene, interrupt_after=3)
    assert told["kinds"].get("execution_interrupted") == 1
    assert told["progress"][-1][1] > 200
    assert told["previews"] > 0
