"""A hunt on a real pipeline: resumes after a kill, batches exactly, probes truly, draws its atlas."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.headhunter import atlas
from genattn.guidance.headhunter.atlas import HeadAtlas, heat_map, write_picture
from genattn.guidance.headhunter.hunter import HeadHunter, as_samples, layer_map
from genattn.guidance.headhunter.search import Trial, rank_correlation
from genattn.guidance.headhunter.x0_probe import X0Probe, denoised
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.random.build import build_model, build_pipeline
from genattn.seam.report import GenAttnWarning

POOL = "L1H0-2,L2H1"


def mean_red(samples: Any, prompts: Any) -> list[float]:
    return [sample[..., 0, :, :].mean().item() for sample in samples]


def hunter(path: Path, family: str = "sd3", **changes: Any) -> HeadHunter:
    pipe, kwargs = build_pipeline(family)
    call = {name: value for name, value in kwargs.items() if name not in ("prompt", "output_type")}
    call |= {"num_inference_steps": 2, **changes.pop("call", {})}
    settings = {"pool": POOL, "batch": 2, "rounds": 2, "top_k": 1, "scale": 5.0, "log": path / "hunt.jsonl", **changes}
    objectives = settings.pop("objectives", {"red": mean_red})
    return HeadHunter(pipe, objectives, settings.pop("prompts", ["a cat", "a dog"]), call=call, **settings)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_finds_heads_and_says_how(tmp_path: Path) -> None:
    hunt = hunter(tmp_path, held_out=["a fox"], u_grid=(0.5, 1.0))
    found = hunt.run()
    assert len(found.heads) >= 1
    assert set(found.scores) == set(hunt.pool)
    best = max(found.scores, key=found.scores.get)
    assert best == hunt.result.heads[0]
    assert found.model == "SD3Transformer2DModel"
    assert found.notes["held_out"]["low"]["red"] <= found.notes["held_out"]["gain"]["red"]
    assert HeadSet.load(found.save(tmp_path / "set.json")) == found
    with genattn.apply(hunt.pipe, SoftPAG.from_head_set(found)) as handle:
        hunt.generate(0, 1)
        assert handle.plugins[0].rule.scale == 5.0


def test_a_trial_is_the_picture_that_a_user_would_get(tmp_path: Path) -> None:
    hunt = hunter(tmp_path)
    found = hunt.evaluate((Trial(((1, 0),), 1), Trial(((2, 1),), 1)))
    for scores, head in zip(found, ["L1H0", "L2H1"], strict=True):
        with genattn.apply(hunt.pipe, SoftPAG(head, u=1.0, scale=5.0)):
            alone = hunt.pipe(
                prompt="a dog", generator=torch.Generator().manual_seed(1), output_type="pt", return_dict=False, **hunt.call
            )[0]
        assert scores["red"] == pytest.approx(mean_red(alone.clamp(0, 1), None)[0], abs=1e-5)


def test_pictures_come_from_the_seeds_that_were_given(tmp_path: Path) -> None:
    hunt = hunter(tmp_path, seeds=[7, 5])
    for prompt, (text, seed) in enumerate((("a cat", 7), ("a dog", 5))):
        generator = torch.Generator().manual_seed(seed)
        wanted = hunt.pipe(prompt=text, generator=generator, output_type="pt", return_dict=False, **hunt.call)[0]
        torch.testing.assert_close(hunt.generate(prompt, 1), as_samples(wanted))
    other = hunt.pipe(
        prompt="a dog", generator=torch.Generator().manual_seed(1), output_type="pt", return_dict=False, **hunt.call
    )
    assert not torch.allclose(hunt.generate(1, 1), as_samples(other[0]), atol=1e-3)


def test_resumes_after_a_kill_with_the_same_result(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    expected = hunter(tmp_path / "whole").run()
    text = (tmp_path / "whole" / "hunt.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    for count in (1, len(lines) // 2, len(lines) - 1):
        folder = tmp_path / f"after {count}"
        folder.mkdir()
        (folder / "hunt.jsonl").write_text("".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        hunt = hunter(folder)
        assert hunt.run() == expected
        assert hunt.forwards > 0
    again = hunter(tmp_path / "whole")
    assert again.run() == expected
    assert again.forwards == 0


def test_a_failing_objective_loses_no_finished_score(tmp_path: Path) -> None:
    calls = []

    def failing(samples: Any, prompts: Any) -> list[float]:
        calls.append(1)
        return [float("nan")] * len(samples) if len(calls) == 3 else mean_red(samples, prompts)

    with pytest.raises(GenAttnError, match="objective 'red' must give finite scores, got nan"):
        hunter(tmp_path, objectives={"red": failing}).run()
    assert len((tmp_path / "hunt.jsonl").read_text().splitlines()) == 3
    assert hunter(tmp_path).run() == hunter(tmp_path).run()


def test_the_probe_foresees_what_one_guided_step_foresees(tmp_path: Path) -> None:
    """x0 of a candidate is read off a run that is guided by it in that one step."""
    hunt = hunter(tmp_path, call={"num_inference_steps": 3})
    pipe, base = hunt.pipe, {(1, 0): 1.0}
    probe = X0Probe(pipe, hunt.generate, 3, (0.34,), rows=2, settings=hunt.settings)
    candidates = [{**base, (2, 1): 1.0}, {**base, (0, 2): 1.0}, {**base, (1, 2): 0.5}]
    found = probe.pictures(0, base, candidates)
    for candidate, samples in zip(candidates, found, strict=True):
        seen: list[torch.Tensor] = []

        stock = pipe.scheduler.step

        def step(
            output: torch.Tensor, t: Any, sample: torch.Tensor, stock: Any = stock, seen: Any = seen, **kwargs: Any
        ) -> Any:
            seen.append(denoised(pipe.scheduler, output, t, sample))
            return stock(output, t, sample, **kwargs)

        # the base guides the step before, the candidate the one that is probed
        plugins = (
            SoftPAG(base, stop=0.0, **{k: v for k, v in hunt.settings.items() if k not in ("start", "stop")}),
            SoftPAG(candidate, start=0.3, stop=0.4, **{k: v for k, v in hunt.settings.items() if k not in ("start", "stop")}),
        )
        pipe.scheduler.step = step
        with genattn.apply(pipe, *plugins):
            hunt.generate(0, 1)
        del pipe.scheduler.step
        latents = seen[1] / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        picture = pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0].detach(), output_type="pt")
        assert len(samples) == 1
        torch.testing.assert_close(samples[0], picture[0], atol=1e-4, rtol=0)


def test_the_probe_orders_heads_as_the_full_search_at_less_cost(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    settings = {"rounds": 1, "pool": None, "batch": 4, "call": {"num_inference_steps": 6}}
    full, probing = hunter(tmp_path / "full", **settings), hunter(tmp_path, **settings, probe_keep=0)
    first, second = full.run(), probing.run()
    heads = sorted(first.scores)
    assert rank_correlation([first.scores[h] for h in heads], [second.scores[h] for h in heads]) > 0.8
    assert probing.forwards + probing.probe.passes < 0.7 * full.forwards


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_hunts_on_other_families(tmp_path: Path, family: str) -> None:
    pool = {"wan": "L1H0-1", "flux": "L0H0,L3H1"}[family]
    found = hunter(tmp_path, family, pool=pool, prompts=["a cat"], rounds=1, probe_keep=1).run()
    assert len(found.heads) == 1
    assert found.layer_map == dict.fromkeys(range(3 if family == "wan" else 4), 2)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_x0_of_every_kind_of_prediction() -> None:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    uni = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    for scheduler in (flow, uni):
        scheduler.set_timesteps(5)
        sigma, t = scheduler.sigmas[2], scheduler.timesteps[2]
        x = (1 - sigma) * clean + sigma * noise
        torch.testing.assert_close(denoised(scheduler, noise - clean, t, x), clean, atol=1e-5, rtol=0)
    for kind in ("epsilon", "v_prediction", "sample"):
        ddim = DDIMScheduler(prediction_type=kind)
        ddim.set_timesteps(5)
        t = ddim.timesteps[2]
        kept = ddim.alphas_cumprod[t]
        x = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        answer = {"epsilon": noise, "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * clean, "sample": clean}[kind]
        torch.testing.assert_close(denoised(ddim, answer, t, x), clean, atol=1e-5, rtol=0)
    for kind in ("epsilon", "v_prediction"):
        euler = EulerDiscreteScheduler(prediction_type=kind)
        euler.set_timesteps(5)
        sigma, t = euler.sigmas[2], euler.timesteps[2]
        x = clean + sigma * noise
        answer = noise if kind == "epsilon" else (noise - sigma * clean) / (sigma**2 + 1).sqrt()
        torch.testing.assert_close(denoised(euler, answer, t, x), clean, atol=1e-3, rtol=0)
    odd = DDIMScheduler()
    odd.register_to_config(prediction_type="score")
    with pytest.raises(GenAttnError, match="needs flow, epsilon, v or sample predictions, got 'score'"):
        denoised(odd, noise, odd.timesteps[0], clean)
    del odd.alphas_cumprod
    odd.register_to_config(prediction_type="epsilon")
    with pytest.raises(GenAttnError, match="must know the scheduler's noise level"):
        denoised(odd, noise, odd.timesteps[0], clean)


def test_draws_an_atlas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hunt = hunter(tmp_path)
    atlas = HeadAtlas(hunt, tmp_path / "atlas")
    with pytest.raises(GenAttnError, match="got none for L1H0, L1H1"):
        atlas.contact_sheet()
    paths = atlas.draw()
    assert [p.name for p in paths] == ["unguided.png", "L01H00.png", "L01H01.png", "L01H02.png", "L02H01.png"]
    pictures = [pixels(p) for p in paths]
    assert all(p.shape == (16, 12, 3) for p in pictures)
    before, done = paths[2].stat().st_mtime_ns, hunt.forwards
    assert atlas.draw() == paths
    assert (paths[2].stat().st_mtime_ns, hunt.forwards) == (before, done)
    assert pixels(atlas.contact_sheet(cell=16)).shape == ((16 + 14) * 2, 12 * 4, 3)
    with pytest.raises(GenAttnError, match="of one model, prompt and strength"):
        HeadAtlas(hunt, tmp_path / "atlas", prompt=1)
    with pytest.raises(GenAttnError, match="an index below 2, got 2"):
        HeadAtlas(hunt, tmp_path / "other", prompt=2)
    found = HeadSet.from_names("L1H0", hunt.layers, scores={(1, 0): 1.0, (2, 3): -0.5})
    assert pixels(heat_map(found, tmp_path / "heat.png")).shape[1] > 100
    with pytest.raises(GenAttnError, match="a heat map needs scores"):
        heat_map(HeadSet.from_names("L1H0", hunt.layers), tmp_path / "heat.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GenAttnError, match="a heat map needs matplotlib, got .*; install it: pip install matplotlib"):
        heat_map(found, tmp_path / "heat.png")
    assert pixels(write_picture(torch.rand(3, 3, 4, 6), tmp_path / "clip.png")).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [""]}, "prompts must be texts"),
        ({"call": {"num_inference_steps": 0}}, "num_inference_steps >= 1"),
        ({"call": {"num_inference_steps": 2.5}}, "num_inference_steps >= 1, got 2.5"),
        ({"call": {"prompt": "x"}}, r"leave prompt, .* to the hunt, got \['prompt'\]"),
        ({"seeds": [1]}, "one per prompt, got 1 for 2"),
        ({"batch": 0}, "batch must be >= 1"),
        ({"target": "skip"}, "leaves out whole blocks"),
        ({"target": "blur"}, "target must be one of"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"stop": 2.0}, "stop must be a number"),
        ({"u": 2.0}, "u must be a number"),
        ({"pool": "L9H0"}, "it has L0-2"),
        ({"min_layer": 9}, "from layer 9 on"),
        ({"top_k": 9}, "at least top_k=9"),
        ({"weights": {"x": 1.0}}, "a weight needs an objective"),
        ({"floors": {"x": 1.0}}, "a floor needs an objective"),
        ({"probe_keep": 2, "probe_moments": (1.5,)}, "moments must be fractions"),
    ],
)
def test_refuses_before_any_step(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        hunter(tmp_path, **changes).run()
    assert not (tmp_path / "hunt.jsonl").exists()


def test_more_refusals(tmp_path: Path) -> None:
    hunter(tmp_path, rounds=1).run()
    with pytest.raises(GenAttnError, match="begun with, got other u"):
        hunter(tmp_path, rounds=1, u=0.5).run()
    other = hunter(tmp_path, rounds=1)
    with torch.no_grad():
        other.pipe.vae.decoder.conv_out.bias.add_(1)
    with pytest.raises(GenAttnError, match="begun with, got other model"):
        other.run()
    with pytest.raises(GenAttnError, match="got none that can be reached"):
        layer_map(build_model("sana"))
    with pytest.raises(GenAttnError, match="must give RGB pictures or clips"):
        as_samples(torch.zeros(1, 4, 8, 8))
    assert as_samples(np.zeros((2, 8, 8, 3), np.float32)).shape == (2, 3, 8, 8)
    assert as_samples([torch.zeros(3, 8, 8)]).shape == (1, 3, 8, 8)
    hunt = hunter(tmp_path / "floor", floors={"red": 9.0})
    with pytest.raises(GenAttnError, match="got none: no head left above the floors"):
        hunt.run()
    narrow = hunter(tmp_path / "narrow", probe_keep=1, start=0.9)
    idle = pytest.warns(GenAttnWarning, match="ProbingPAG acts at no step of a run of 2")
    with idle, pytest.raises(GenAttnError, match="the probe must see steps"):
        narrow.run()


TWO = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from accelerate import Accelerator
from test_hunter import hunter
accelerator = Accelerator(cpu=True)
hunt = hunter(Path({folder!r}), accelerator=accelerator)
found = hunt.run()
found.save(Path({folder!r}) / f"set{{accelerator.process_index}}.json")
print(accelerator.num_processes, hunt.forwards)
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    one = hunter(tmp_path / "one")
    expected = one.run()
    script = TWO.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29741",
        "ACCELERATE_USE_CPU": "true",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=500)[0].split()[-2:] for process in processes]
    assert [line[0] for line in told] == ["2", "2"]
    forwards = [float(line[1]) for line in told]
    assert min(forwards) > 0
    assert sum(forwards) == pytest.approx(one.forwards)
    for rank in range(2):
        assert HeadSet.load(tmp_path / f"set{rank}.json") == expected


def test_a_picture_holds_the_samples_values(tmp_path: Path) -> None:
    clip = torch.linspace(-0.5, 1.5, 5 * 3 * 4 * 6).reshape(5, 3, 4, 6)
    for sample, frame in ((clip, clip[2]), (clip[:4], clip[2]), (clip[0], clip[0])):
        wanted = (frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.array_equal(pixels(write_picture(sample, tmp_path / "clip.png")), wanted)


def test_a_heat_map_shows_every_score_around_white(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(atlas, "save_figure", lambda figure, path, dots: drawn.append(figure) or Path(path))
    heads = HeadSet.from_names("L2H1", {1: 3, 2: 2}, scores={(1, 0): 0.25, (2, 1): -0.5})
    heat_map(heads, tmp_path / "heat.png")
    axes, bar = drawn[-1].axes
    (image,) = axes.images
    assert image.get_clim() == (-0.5, 0.5), "a score of zero has the middle colour"
    assert image.get_array().filled(0).tolist() == [[0.25, 0.0, 0.0], [0.0, -0.5, 0.0]]
    assert image.get_array().mask.tolist() == [[False, True, True], [True, False, True]], "what was not tried stays blank"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]
    (frame,) = axes.patches
    assert (frame.get_xy(), frame.get_width(), frame.get_height(), frame.get_fill()) == ((0.5, 0.5), 1, 1, False)
    assert bar.get_ylabel() == "score"
    heat_map(heads, tmp_path / "heat.png", {(1, 2): 0.0})
    (image,) = drawn[-1].axes[0].images
    assert image.get_clim() == (-1, 1), "scores of nothing but zero have the middle colour too"
    assert image.get_array()[0, 2] == 0.0


def test_a_picture_to_start_from_is_known_by_what_it_shows(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "red", "blue")]
    told = [hunter(tmp_path, call={"image": picture}).identity()["call"] for picture in pictures]
    assert told[0] == told[1] != told[2]
