"""The tiny AnimateDiff: a whole run at toy size, resumed, exported, loaded by stock diffusers and judged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AnimateDiffPipeline, AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.broadway.broadway import BroadWay
from genattn.pipelines.tiny import animatediff as tiny, latents as tiny_latents
from genattn.pipelines.tiny.animatediff_card import SCORED, write_motion_card
from genattn.pipelines.tiny.evaluate import provenance
from genattn.pipelines.tiny.latents import load_latents
from genattn.pipelines.tiny.motion import (
    FRAMES,
    MotionSize,
    TinyMotion,
    build_clip_tokenizer,
    build_scheduler,
    motion_adapter_of,
)
from genattn.pipelines.training.trainer import TrainSettings

SMALL = MotionSize((16, 16, 16, 16), heads=2, text_width=16)


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two parts of a tiny-sd3 that a run begins with, at toy size."""
    folder = tmp_path_factory.mktemp("sd3")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.9,
        shift_factor=0.1,
    )
    vae.save_pretrained(folder / "vae")
    vocabulary = len(build_clip_tokenizer())
    encoder = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=24,
        projection_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    CLIPTextModelWithProjection(encoder).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_sd3: Path) -> Path:
    """A few steps of everything; a shard cut to eight clips."""
    folder = tmp_path_factory.mktemp("run")
    accelerator = Accelerator(cpu=True)
    patch = pytest.MonkeyPatch()
    patch.setattr(tiny_latents, "SHARD", 8)
    for name, value in {"PICTURES": 8, "CLIP_BATCH": 1}.items():
        patch.setattr(tiny, name, value)
    tiny.adopt_autoencoder(folder, tiny_sd3)
    assert tiny.make_latents(folder, accelerator, range(1), 5.0) == 1
    assert tiny.make_latents(folder, accelerator, range(1), 5.0, settled=True) == 1
    tiny.train_unet(folder, accelerator, TrainSettings(1), 1, 2, SMALL)
    done = tiny.train_unet(folder, accelerator, TrainSettings(4), 1, 3, SMALL)
    assert done == 4
    patch.undo()
    (folder / "journal.jsonl").write_text('{"phase": "unet", "steps": 4, "minutes": 0.1, "device": "CPU"}\n')
    return folder


def test_run_begins_with_what_it_adopts(run_dir: Path, tiny_sd3: Path) -> None:
    """The scale is kept, the shift, which AnimateDiff does not apply, is dropped; the text encoder begins as that one."""
    latents, captions = load_latents(run_dir / "clips")
    assert latents.shape == (8, 4, FRAMES, 16, 16)
    assert len(captions) == 8
    settled, _ = load_latents(run_dir / "settled-clips")
    assert not torch.equal(latents, settled)
    assert tiny.load_vae(run_dir).config.scaling_factor == 0.9
    assert tiny.load_vae(run_dir).config.shift_factor is None
    model = TinyMotion(len(build_clip_tokenizer()), SMALL)
    before = {name: value.clone() for name, value in model.text_encoder.state_dict().items()}
    tiny.begin_text_encoder(model, run_dir)
    kept = {name for name, value in model.text_encoder.state_dict().items() if torch.equal(value, before[name])}
    assert all("bias" in name or "norm" in name for name in kept)
    trained = CLIPTextModelWithProjection.from_pretrained(tiny_sd3 / "text_encoder").text_model.state_dict()
    own = {name.removeprefix("text_model."): value for name, value in model.text_encoder.state_dict().items()}
    for name in ("embeddings.token_embedding.weight", "encoder.layers.1.mlp.fc1.weight"):
        assert torch.equal(own[name], trained[name])


def test_steps_show_single_frames_then_few_then_whole_clips() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [tuple(tiny.draw_frames(step, 2, 20, generator).shape) for step in (0, 1, 8, 10, 12, 23, 24)]
    single, few, whole = (48, 1), (12, 4), (4, FRAMES)
    assert shapes == [single, single, single, few, whole, whole, single]
    few_frames = tiny.draw_frames(10, 2, 20, generator)
    assert (few_frames.diff(dim=1) > 0).all()


def test_frames_keep_their_places_outside_their_clip() -> None:
    """Frame 5 alone must be told from frame 0 alone, and the first frames need no telling."""
    torch.manual_seed(0)
    model = TinyMotion(len(build_clip_tokenizer()), SMALL).eval()
    noisy, timestep, ids = torch.randn(2, 4, 3, 8, 8), torch.tensor([3, 700]), torch.zeros(2, 24, dtype=torch.long)
    with torch.no_grad():
        plain = model(noisy, timestep, ids)
        torch.testing.assert_close(model(noisy, timestep, ids, torch.arange(3).repeat(2, 1)), plain)
        moved = model(noisy, timestep, ids, torch.tensor([[0, 1, 2], [3, 9, 15]]))
    torch.testing.assert_close(moved[0], plain[0])
    assert (moved[1] - plain[1]).abs().max() > 1e-3


def test_export_is_a_stock_folder(run_dir: Path, tmp_path: Path) -> None:
    assert tiny.export(run_dir, tmp_path / "tiny-animatediff", SMALL) == 4
    for part in ("unet", "vae", "motion_adapter"):
        (file,) = (tmp_path / "tiny-animatediff" / part).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}, part
    pipe = AnimateDiffPipeline.from_pretrained(tmp_path / "tiny-animatediff").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_frames": 4, "height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.0}
    frames = pipe("a red circle moves right on a dark background", **call, output_type="np").frames[0]
    assert frames.shape == (4, 32, 32, 3)
    assert (tmp_path / "tiny-animatediff" / "journal.jsonl").exists()
    rows = [dict.fromkeys(SCORED, 0.5) | {"variant": "stock", "clips": 2, "steps": 3} | provenance(cpu=True)]
    write_motion_card(tmp_path / "tiny-animatediff", run_dir, rows)
    card = (tmp_path / "tiny-animatediff" / "README.md").read_text()
    assert "| unet | 4 | 0.1 | CPU |" in card
    assert "| dynamic degree | 0.500 |" in card
    defaults = json.loads((tmp_path / "tiny-animatediff" / "genattn_defaults.json").read_text())
    assert defaults["frames"] == FRAMES
    before = pipe.unet.state_dict()
    for name, value in pipe.motion_adapter.state_dict().items():
        assert torch.equal(value, before[name])


def test_full_size_stays_below_its_limit() -> None:
    model = TinyMotion(len(build_clip_tokenizer()))
    halves = sum(p.numel() for m in (model.unet, motion_adapter_of(model.unet, MotionSize())) for p in m.parameters())
    whole = sum(p.numel() for p in model.text_encoder.parameters())
    vae = sum(file.stat().st_size for file in Path("assets/tiny-sd3/vae").iterdir())
    assert 2 * halves + 4 * whole + vae < 15_000_000
    guided = [n for n in model.unet.attn_processors if "up_blocks" in n and "motion_modules" in n]
    assert {n.split(".")[1] for n in guided} == {"0", "1", "2", "3"}


def test_velocity_loss_is_that_of_the_velocity() -> None:
    """A model that knows the answer has no loss; one that answers nothing has that of the velocity's square."""
    scheduler = build_scheduler()
    latents = torch.randn(6, 4, 2, 4, 4)
    ids, empty = torch.zeros(6, 24, dtype=torch.long), torch.zeros(24, dtype=torch.long)
    seen: dict[str, torch.Tensor] = {}

    class Oracle(torch.nn.Module):
        def forward(
            self, noisy: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor, frames: torch.Tensor | None
        ) -> torch.Tensor:
            share = scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1, 1)
            noise = (noisy - share.sqrt() * latents) / (1 - share).sqrt()
            seen["timestep"] = timestep
            return share.sqrt() * noise - (1 - share).sqrt() * latents

    generator = torch.Generator().manual_seed(0)
    loss = tiny.velocity_loss(Oracle(), scheduler, latents, ids, empty, generator)
    assert float(loss) < 1e-6
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6  # pure noise at the end
    assert seen["timestep"].max() < 1000


def test_missing_phases_are_named(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="a run must hold an autoencoder"):
        tiny.load_vae(tmp_path)
    with pytest.raises(GenAttnError, match="a run begins with tiny-sd3's autoencoder"):
        tiny.adopt_autoencoder(tmp_path / "run", tmp_path)
    with pytest.raises(GenAttnError, match="a run must hold vae/config.json"):
        tiny.assemble(tmp_path)


def test_weights_of_another_size_are_refused(run_dir: Path) -> None:
    with pytest.raises(GenAttnError, match="the weights must be of size"):
        tiny.assemble(run_dir)


@pytest.mark.parametrize("wrong", [{"channels": (12, 16, 16, 16)}, {"heads": 3}, {"layers": 0}])
def test_sizes_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(GenAttnError, match="channels must be multiples of 8"):
        MotionSize(**wrong)  # type: ignore[arg-type]


def test_command_line_passes_its_settings_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called: dict[str, tuple] = {}
    answers = {"make_latents": 3, "train_unet": 7, "export": 7, "folder_bytes": 5_000_000}
    for name, answer in answers.items():
        monkeypatch.setattr(tiny, name, lambda *args, name=name, answer=answer, **more: called.update({name: args}) or answer)
    settings = ["--steps", "7", "--still-steps", "3", "--few-steps", "5", "--shards", "2", "5", "--out", str(tmp_path / "out")]
    tiny.main(["train", "--run-dir", str(tmp_path), "--cpu", "--begin-with", str(tiny_sd3), *settings])
    assert called["make_latents"][2] == range(2, 4)
    assert called["train_unet"][2].steps == 7
    assert called["train_unet"][3:] == (3, 5)
    assert called["export"] == (tmp_path, tmp_path / "out")
    assert "7 steps, 5.0 MB" in capsys.readouterr().out
    assert '"steps": 7' in (tmp_path / "journal.jsonl").read_text()


SHIPPED = Path(__file__).resolve().parents[3] / "assets" / "tiny-animatediff"


def test_the_shipped_model_is_small_and_can_be_guided() -> None:
    """Below 15 MB, loaded by stock diffusers, steered by BroadWay, with a card whose scores are measured."""
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 15_000_000
    assert "| motion | 0." in (SHIPPED / "README.md").read_text()
    pipe = AnimateDiffPipeline.from_pretrained(SHIPPED).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        settings = {"num_frames": 8, "height": 64, "width": 64, "num_inference_steps": 3, "output_type": "np"}
        return pipe("a red circle moves right on a dark background", **settings, generator=torch.manual_seed(0)).frames[0]

    stock = draw()
    with genattn.apply(pipe, BroadWay.preset("animatediff")):
        guided = draw()
    assert np.array_equal(draw(), stock)
    assert np.abs(guided - stock).max() > 0.01
    assert stock[..., 0].max() > stock[..., 1].max()  # something red
