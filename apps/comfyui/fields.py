"""Widgets that several nodes share: one name, one meaning, one tooltip everywhere."""

from genattn.apps.comfyui.schema import Field
from genattn.apps.comfyui.settings import METHODS, PATTERNS, TAIL_CHOICES
from genattn.errors import GenAttnError
from genattn.guidance.softpag.perturbation import TARGETS

IMPLS = ("auto", "triton", "flex", "cpu", "sdpa", "reference")
SEED = Field("seed", "INT", "Seed of the noise; same seed, same result.", 0, 0, 2**32 - 1, 1, seed=True)

SPARSE = (
    Field(
        "pattern",
        "COMBO",
        "Which tokens may see which. dense switches the node off, auto takes the preset of the model, settings reads a file.",
        "radial",
        options=PATTERNS,
    ),
    Field("decay", "FLOAT", "Radial: width of the windows, larger is denser; 0 takes the variant's own.", 0.0, 0.0, 16.0, 0.05),
    Field(
        "window",
        "STRING",
        "Neighborhood: keys per axis as frames,height,width (or one number); -1 is the whole axis.",
        "5,12,12",
    ),
    Field(
        "stride",
        "STRING",
        "Neighborhood: queries per axis that share a window. 1: a sliding window; the window's size: separate blocks.",
        "1",
    ),
    Field(
        "dense_steps", "FLOAT", "First steps kept dense: a share of them (below 1) or their number.", 0.25, 0.0, 1000.0, 0.05
    ),
    Field("dense_blocks", "STRING", "Blocks kept dense, such as 0-2,-1, counted over the whole model; -1 is the last.", "0"),
    Field(
        "impl",
        "COMBO",
        "Backend of the sparse calls. If you name one that cannot serve, the error says why.",
        "auto",
        options=IMPLS,
    ),
    Field("pattern_options", "STRING", 'Further settings of the pattern as JSON, e.g. {"sink": false}.', ""),
)

# widgets that came later stand last and are optional, so that workflows saved before them still load
LATER = (
    Field(
        "path", "STRING", "For profile: the map of the Profile node or of genattn profile. For settings: the file of genattn "
        "tune, which also says what stays dense.", "", optional=True,
    ),
    Field(
        "tail", "COMBO", "What stands in for skipped tiles. auto: what was measured best for the pattern; none: nothing.",
        "auto", optional=True, options=TAIL_CHOICES,
    ),
    Field(
        "min_tokens", "INT", "Sequences with fewer tokens stay dense. -1: the length where sparse becomes faster; 0: no limit.",
        -1, -1, 1 << 30, 1, optional=True,
    ),
    Field("start_percent", "FLOAT", "Sparse from this share of the sampling on.", 0.0, 0.0, 1.0, 0.01, optional=True),
    Field("end_percent", "FLOAT", "Sparse up to this share of the sampling.", 1.0, 0.0, 1.0, 0.01, optional=True),
)  # fmt: skip

SIGMAS = (
    Field("sigma_start", "FLOAT", "Act from this noise level down; 1 is the beginning.", 1.0, 0.0, 1.0, 0.01),
    Field("sigma_end", "FLOAT", "Act down to this noise level; 0 is the end.", 0.0, 0.0, 1.0, 0.01),
)

HEADS = (
    Field("heads", "STRING", "Heads such as L11H15,L13H17:0.3, or whole layers such as L7; pag and seg take layers.", "L1"),
    Field("u", "FLOAT", "softpag: how far the heads are moved towards the target, 0 to 1.", 0.5, 0.0, 1.0, 0.05),
    Field("scale", "FLOAT", "How far to move away from the disturbed result; 0 is off.", 3.0, -20.0, 20.0, 0.1),
)

HEAD_SET = Field("head_set", "GENATTN_HEADS", "Heads from a file instead of the text.", optional=True)
METHOD = Field(
    "method",
    "COMBO",
    "softpag disturbs heads; pag (each token sees itself) and seg (mean query) disturb layers.",
    "softpag",
    options=METHODS,
)
_ATTENTION_TARGETS = tuple(target for target in TARGETS if target != "skip")
TARGET = Field("target", "COMBO", "softpag: what a disturbed head computes instead.", "identity", options=_ATTENTION_TARGETS)


def check_sparse(
    cls: type,
    dense_blocks: str,
    pattern: str,
    decay: float,
    window: str,
    stride: str,
    pattern_options: str,
    path: str | None = "",
    tail: str = "auto",
) -> bool | str:
    """At submit time: can the pattern be made, and can the blocks be read. None comes by a link and is not known yet."""
    from genattn.apps.comfyui.settings import blocks_of, pattern_of

    try:
        if path is not None and None not in (pattern, decay, window, stride, pattern_options, tail):
            pattern_of(pattern, decay, window, stride, pattern_options, path, tail)
        if dense_blocks is not None:
            blocks_of(dense_blocks, 10_000)
    except GenAttnError as error:
        return str(error)
    return True
