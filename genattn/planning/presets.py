"""What is known per model: shapes, costs, and attention settings with their source.

The published Radial settings are those of the released scripts. Those for `variant="genattn"` carry the published window over
without its rounding to a power of two (at 3600 tokens a frame the released window is 2048 / 3600 = 0.57 of Eq. 4), and always
keep the first quarter of the steps and the first block dense: without dense steps quality collapses (12.8 dB PSNR against 23.6,
paper, table B). Neighborhood settings are those of the GNA paper. None of them was measured by us on these checkpoints.
"""

import difflib
import math
from dataclasses import replace
from pathlib import Path

from genattn.errors import GenAttnError
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern
from genattn.planning.model_preset import ModelPreset, RadialPreset
from genattn.planning.published_shapes import PUBLISHED
from genattn.reading import read_object, whole


def _ours(decay: float, block: int = 128) -> RadialPreset:
    return RadialPreset(
        RadialPattern(decay=decay), 0.25, 1, block, "genattn: published window without rounding, never 0 dense steps"
    )


def _script(name: str, decay: float, steps: float, layers: int, block: int, model: str = "wan") -> RadialPreset:
    pattern = RadialPattern(variant="official", decay=decay, model=model, block=block)  # type: ignore[arg-type]
    return RadialPreset(pattern, steps, layers, block, f"mit-han-lab/radial-attention 72788d4, scripts/{name}")


_PAPER = RadialPreset(
    RadialPattern(variant="paper"), 0.24, 1, 128, "arXiv 2506.19852, section 5.1: 12 of 50 steps, 1 block dense"
)
_WAN21 = (_ours(0.2), _script("wan_t2v_inference.sh", 0.2, 12 / 50, 1, 128), _PAPER)
_WAN22 = (_ours(0.5), _script("wan_22_t2v_inference.sh", 0.8, 11 / 40, 1, 64), _PAPER)
_GNA = "arXiv 2504.16922, table"


def _window(window: tuple[int, ...], stride: tuple[int, ...], source: str) -> tuple[NeighborhoodPattern, str]:
    return NeighborhoodPattern(window, stride), source


_VIDEO = (4, 8, 8)
PRESETS: dict[str, ModelPreset] = {
    p.name: p
    for p in (
        ModelPreset(
            "wan-1.3b", 12, 128, 30, 8960, _VIDEO, cross_tokens=512, size=(480, 832), radial=_WAN21,
        ),
        ModelPreset("wan-14b", 40, 128, 40, 13824, _VIDEO, cross_tokens=512, radial=_WAN21),
        ModelPreset("wan2.2-14b", 40, 128, 40, 13824, _VIDEO, cross_tokens=512, steps=40, radial=_WAN22),
        ModelPreset(
            "wan2.2-5b", 24, 128, 30, 14336, (4, 16, 16), cross_tokens=512, size=(704, 1280), frames=121, radial=_WAN22,
        ),
        ModelPreset(
            "hunyuan-video", 24, 128, 60, 12288, _VIDEO, joint_tokens=256, passes=1, frames=129,
            radial=(_ours(0.55), _script("hunyuan_t2v_inference.sh", 0.95, 12 / 50, 0, 128, "hunyuan"), _PAPER),
            neighborhood=(
                _window((18, 24, 24), (16, 8, 8), f"{_GNA} of HunyuanVideo, 30x48x80, first 15 of 50 steps dense"),
                _window((30, 40, 40), (1, 32, 8), f"{_GNA} of HunyuanVideo, 30x48x80"),
            ),
        ),
        ModelPreset(
            "cogvideox-5b", 48, 64, 42, 12288, _VIDEO, joint_tokens=226, text_first=True, size=(480, 720), frames=49,
            radial=(_ours(0.5), _PAPER),
        ),
        ModelPreset(
            "cogvideox-2b", 30, 64, 30, 7680, _VIDEO, joint_tokens=226, text_first=True, size=(480, 720), frames=49,
            radial=(_ours(0.5), _PAPER),
        ),
        ModelPreset(
            "mochi", 24, 128, 48, 8192, (6, 8, 8), joint_tokens=256, size=(480, 848), frames=163, steps=64,
            radial=(_ours(0.5), _PAPER),
        ),
        ModelPreset(
            "ltx-video", 32, 64, 28, 8192, (8, 32, 32), (1, 1, 1), cross_tokens=256, size=(512, 704), frames=161,
            radial=(_ours(0.5), _PAPER),
        ),
        ModelPreset(
            "cosmos-7b", 32, 128, 28, 16384, (8, 8, 8), cross_tokens=512, steps=35, size=(704, 1280), frames=121,
            radial=(_ours(0.5),),
            neighborhood=(
                _window((16, 32, 48), (1, 8, 16), f"{_GNA} of Cosmos-7B, 16x44x80, first 12 of 35 steps dense"),
                _window((16, 24, 16), (1, 8, 16), f"{_GNA} of Cosmos-7B, 16x44x80; quality is not kept"),
            ),
        ),
        ModelPreset(
            "flux-dev", 24, 128, 57, 12288, (1, 8, 8), joint_tokens=512, text_first=True, passes=1, steps=28,
            size=(1024, 1024), frames=1,
            neighborhood=(_window((80, 80), (16, 16), f"{_GNA} of FLUX.1-dev at 4096x4096, first 9 of 28 steps dense"),),
        ),
    )
}  # fmt: skip
PRESETS |= {shape.name: replace(shape, radial=(_ours(0.5), _PAPER) if shape.frames > 1 else ()) for shape in PUBLISHED}


def preset(model: str) -> ModelPreset:
    """The preset called `model`, or read from a local pipeline folder of the Wan architecture.

    Raises GenAttnError that lists the names.
    """
    if model in PRESETS:
        return PRESETS[model]
    if (Path(model) / "model_index.json").is_file():
        return _from_folder(Path(model))
    near = [name for name in PRESETS if name.startswith(model.lower())] or difflib.get_close_matches(model, PRESETS, n=3)
    guess = f"; did you mean {' or '.join(near)}?" if model and near else ""
    raise GenAttnError(f"model must be a pipeline folder or one of {', '.join(PRESETS)}, got {model!r}{guess}")


def _from_folder(folder: Path) -> ModelPreset:
    with whole(f"a config in {folder}"):
        return _from_configs(folder)


def _from_configs(folder: Path) -> ModelPreset:
    transformer = read_object(folder / "transformer" / "config.json", "a transformer's config")
    if transformer.get("_class_name") != "WanTransformer3DModel":
        raise GenAttnError(
            f"a local folder must hold a WanTransformer3DModel to be planned for, got {transformer.get('_class_name')!r} "
            f"in {folder}; name one of {', '.join(PRESETS)} instead"
        )
    vae = read_object(folder / "vae" / "config.json", "a VAE's config")
    space = int(vae.get("scale_factor_spatial") or 8)
    compression = (int(vae.get("scale_factor_temporal") or 4), space, space)
    side = 16 * compression[1] * transformer["patch_size"][1]
    heads, width = transformer["num_attention_heads"], transformer["attention_head_dim"]
    return ModelPreset(
        folder.name, heads, width, transformer["num_layers"], transformer["ffn_dim"], compression,
        tuple(transformer["patch_size"]), cross_tokens=512, steps=20, size=(side, side), frames=29, radial=(_ours(0.5),),
    )  # fmt: skip


def carried_over_decay(official: float, tokens_per_frame: int) -> float:
    """The decay for which Eq. 4 without rounding has the released code's window."""
    return official * 2 ** math.floor(math.log2(tokens_per_frame)) / tokens_per_frame
