import json

import pytest
import torch
from safetensors.torch import save_file

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.curriculum import Curriculum, LatentBatches, draw_step
from genattn.pipelines.tiny.denoiser import DenoiserSize, TinyDenoiser
from genattn.pipelines.tiny.resume import refine_patches
from genattn.pipelines.tiny.text import build_tokenizer, tokenize
from genattn.pipelines.training.places import POSITION_CHANNELS, with_positions
from genattn.pipelines.training.trainer import step_generator

FRAMES = 12
TEXT = "a red circle moves right on a dark background"


@pytest.fixture
def batches(tmp_path):
    """Latents that say which folder, clip and frame they are of."""
    (tmp_path / "latents.json").write_text(json.dumps({"latents_mean": [0.0] * 3, "latents_std": [1.0, 1.0, 2.0]}))
    for number, kind in enumerate(("stills", "settled-stills", "clips", "settled-clips")):
        frames = FRAMES if "clips" in kind else 1
        latents = torch.full((5, 3, frames, 4, 4), float(number))
        latents[:, 1] = torch.arange(5.0).view(5, 1, 1, 1)
        latents[:, 2] = torch.arange(float(frames)).view(1, frames, 1, 1)
        (tmp_path / kind).mkdir()
        metadata = {"captions": json.dumps([TEXT] * 5)}
        save_file({"latents": latents.half()}, tmp_path / kind / "latents-00000.safetensors", metadata=metadata)
    return LatentBatches(tmp_path)


def test_a_run_shows_stills_then_pieces_then_whole_clips():
    curriculum = Curriculum(10, 70, window_frames=4, whole_every=3, clip_frames=FRAMES)
    assert {curriculum.kind(step) for step in range(10)} == {("settled-stills", 0)}
    middle = [curriculum.kind(step) for step in range(10, 70)]
    assert middle.count(("stills", 0)) == 6
    assert {kind for kind in middle if kind[0].endswith("clips")} == {
        (kind, frames) for kind in ("clips", "settled-clips") for frames in (0, 1, 4)
    }
    pieces = [frames for kind, frames in middle if kind.endswith("clips")]
    assert pieces.count(0) == 18
    assert abs(pieces.count(1) - pieces.count(4)) <= 4
    late = {curriculum.kind(step) for step in range(70, 100)}
    assert late == {("stills", 0), ("clips", 0), ("settled-clips", 0)}


def test_without_windows_the_pieces_are_single_frames():
    assert {Curriculum(0, 60).kind(step)[1] for step in range(60)} == {0, 1}


@pytest.mark.parametrize(("step", "frames"), [(0, 1), (1, 1), (2, 4), (3, FRAMES), (7, 4), (10, 1), (20, 1), (21, FRAMES)])
def test_a_step_shows_frames_at_their_places_in_the_clip(batches, step, frames):
    curriculum = Curriculum(1, 20, 2, 8, 3, window_frames=4, clip_frames=FRAMES)
    latents, ids = draw_step(batches, curriculum, step, step_generator(0, step))
    kind, wanted = curriculum.kind(step)
    count = {"stills": 2, "clips": 8 // wanted if wanted else 3}[kind.removeprefix("settled-")]
    assert latents.shape == (count, 3 + POSITION_CHANNELS, frames, 4, 4)
    assert torch.equal(ids, tokenize(batches.tokenizer, [TEXT]).expand(count, -1))
    number = ("stills", "settled-stills", "clips", "settled-clips").index(kind)
    assert (latents[:, 0] == number).all()
    whole = with_positions(torch.zeros(1, 3, FRAMES, 4, 4), clip_frames=FRAMES)[0, 3:]
    for shown in latents:
        assert (shown[1] == shown[1, 0, 0, 0]).all()  # one clip
        places = (2 * shown[2, :, 0, 0]).long()
        assert torch.equal(places, places[0] + torch.arange(frames))
        assert torch.equal(shown[3:], whole[:, places])


def test_windows_reach_the_first_and_the_last_frame(batches):
    curriculum = Curriculum(0, 1000, frame_batch=32, window_frames=4, clip_frames=FRAMES)
    starts = set()
    for step in (step for step in range(200) if curriculum.kind(step)[1] == 4):
        latents, _ = draw_step(batches, curriculum, step, step_generator(0, step))
        assert latents.shape[2] == 4
        starts |= set((2 * latents[:, 2, 0, 0, 0]).long().tolist())
    assert starts == set(range(FRAMES - 3))


def test_latents_load_where_the_precision_is_mixed(batches):
    with torch.autocast("cpu", torch.bfloat16):
        latents, _ = batches.draw("clips", 2, step_generator(0, 0))
    assert latents.dtype == torch.float32


def test_the_waves_of_place_span_clips_of_any_length():
    placed = with_positions(torch.zeros(1, 2, 16, 4, 4), clip_frames=16)[0, 2:]
    short = with_positions(torch.zeros(1, 2, 8, 4, 4))[0, 2:]
    # a frame of the short clip lies between two of the long one
    torch.testing.assert_close(placed.unflatten(1, (8, 2)).mean(2)[0, :, 0, 0], short[0, :, 0, 0], atol=0.1, rtol=0.0)
    assert placed[0, -1, 0, 0] == pytest.approx(-placed[0, 0, 0, 0].item(), abs=1e-5)


def test_finer_patches_do_the_same_where_latents_are_even_within_the_coarse_ones():
    torch.manual_seed(0)
    coarse, fine = (TinyDenoiser(5, 50, DenoiserSize(2, 12, 1, 24, patch)).transformer for patch in (2, 1))
    torch.nn.init.normal_(coarse.proj_out.weight)
    fine.load_state_dict(coarse.state_dict() | refine_patches(coarse.state_dict()))
    even = torch.randn(1, 5, 2, 3, 3).repeat_interleave(2, 3).repeat_interleave(2, 4)
    with torch.no_grad():
        tokens = coarse.patch_embedding(even)
        torch.testing.assert_close(fine.patch_embedding(even)[..., ::2, 1::2], tokens)
        hidden = torch.randn(7, 24)
        cells = coarse.proj_out(hidden).unflatten(1, (4, 5))
        torch.testing.assert_close(fine.proj_out(hidden), cells.mean(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"still_batch": 0}, "batches, window, whole_every and wander_every must be >= 1"),
        ({"whole_every": 0}, "batches, window, whole_every and wander_every must be >= 1"),
        ({"frame_steps": -1}, "steps >= 0"),
        ({"window_frames": 9}, "window_frames must be <= frame_batch and clip_frames"),
        ({"window_frames": 6, "frame_batch": 4}, "window_frames must be <= frame_batch"),
    ],
)
def test_bad_curricula_are_refused(changes, message):
    with pytest.raises(GenAttnError, match=message):
        Curriculum(**({"still_steps": 1, "frame_steps": 2} | changes))


def test_the_tokenizer_of_a_run_is_the_models(batches):
    assert torch.equal(batches.empty, tokenize(build_tokenizer(), [""])[0])
