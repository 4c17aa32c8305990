"""The shipped tiny-wan-long: stock, small, of the tokens promised, with a card that agrees with its journal."""

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from genattn.pipelines.tiny import wan as tiny_wan
from genattn.pipelines.tiny.card import folder_bytes, read_journal, training_line
from genattn.pipelines.tiny.export import DEFAULTS_FILE, GenerationDefaults

ASSETS = Path(__file__).resolve().parents[3] / "assets"
NAMES = ("tiny-wan-long", "tiny-wan-long-bound")


@pytest.fixture(scope="module", params=NAMES)
def folder(request):
    return ASSETS / request.param


@pytest.fixture(scope="module")
def shipped(folder):
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_shipped_folder_is_stock_small_and_of_safetensors(folder):
    assert folder_bytes(folder) < 12e6
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".jsonl", ".safetensors", ".md"}
    for file in folder.rglob("*.json"):
        assert "_name_or_path" not in file.read_text(), file


def test_a_clip_at_the_defaults_has_four_thousand_tokens(shipped, folder):
    defaults = GenerationDefaults(**json.loads((folder / DEFAULTS_FILE).read_text()))
    seen = []
    hook = shipped.transformer.blocks[0].attn1.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].shape[1])
    )
    latents = shipped(
        "a red circle moves right on a dark background",
        height=defaults.height,
        width=defaults.width,
        num_frames=defaults.frames,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
    ).frames
    hook.remove()
    assert 4096 <= seen[0] <= 8192
    assert torch.isfinite(latents).all()
    with torch.no_grad():
        video = shipped.vae.decode(latents[:, :, :2]).sample
    assert video.shape == (1, 3, 5, defaults.height, defaults.width)
    assert video.std() > 0.01


def test_the_card_agrees_with_the_journal_and_the_folder(folder):
    card = (folder / "README.md").read_text()
    assert card.splitlines()[5] == f"# {folder.name}"
    entries = read_journal(folder)
    for entry in entries:
        assert training_line(entry) in card
    assert f"for {sum(float(entry['minutes']) for entry in entries):.0f} minutes in all" in card
    patch = json.loads((folder / "transformer" / "config.json").read_text())["patch_size"]
    assert f"patch {' x '.join(map(str, patch))}" in card
    defaults = GenerationDefaults(**json.loads((folder / DEFAULTS_FILE).read_text()))
    frames, side = (defaults.frames - 1) // 4 + 1, defaults.height // 4
    tokens = frames * side * side // math.prod(patch)
    assert f"{frames} frames of {tokens // frames} tokens, {tokens} in all" in card
    assert f'from_pretrained("assets/{folder.name}")' in card


def test_the_cards_commands_are_ones_that_the_recipe_takes(folder):
    lines = [line for line in (folder / "README.md").read_text().splitlines() if "tiny.wan train" in line]
    assert any("--phases transformer" in line for line in lines)
    for line in lines:
        options = tiny_wan.build_parser().parse_args(shlex.split(line)[3:])
        assert options.patch == 1 or not {"latents", "text"}.isdisjoint(options.phases)
        assert (options.frames - 1) // 4 + 1 == 16 or "text" in options.phases
