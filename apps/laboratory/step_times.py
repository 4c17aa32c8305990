"""Predicted step times of large models from the cost model: no GPU, no weights, nothing is run. For docs/scale.md.

    step = passes x (rest + scores x attention) / rate,    or weights / host where the card cannot hold them and that is longer

`attention` and `rest` are the arithmetic of one dense forward, `scores` what a pattern leaves of the attention with its unused
lanes and masks. Measured times of others stand beside it, so that a reader sees how far off the model is.
"""

from dataclasses import dataclass, replace

from genattn.errors import GenAttnError
from genattn.geometry.tile_choice import MASK_COST
from genattn.planning.model_preset import ModelPreset
from genattn.planning.presets import preset
from genattn.planning.scale import Machine, weights_bytes
from genattn.planning.simulate import end_to_end, simulate_pattern

# bytes/s at which weights that do not fit come from the host's memory, over PCIe
HOST = 25e9
TAIL = 1 / 128  # one pseudo-key for a tile of 128
MACHINES = (
    Machine("H100", 350e12, 80e9),
    Machine("H200", 350e12, 141e9),
    Machine("RTX 5090", 165e12, 32e9),
)


@dataclass(frozen=True)
class Predicted:
    """One predicted run. pattern: "dense", "radial" or "adaptive". tokens: of one forward. scores: share computed.

    seconds: of one step on each of MACHINES. faster: of the whole run over dense, with sparse attention at the rate of dense
    attention and at half of it. streamed: machines whose steps wait for weights from the host.
    """

    name: str
    pattern: str
    tokens: int
    scores: float
    seconds: tuple[float, ...]
    faster: tuple[float, float]
    streamed: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One model at one size. frames: of pixels. dense: share of the steps that stays dense under a pattern."""

    name: str
    model: ModelPreset
    size: tuple[int, int]
    frames: int
    dense: float = 0.25

    @property
    def tokens(self) -> int:
        """Tokens of one forward, text and sound included where they are in the same sequence."""
        return self.model.layout(self.size, self.frames).seqlen

    @property
    def attention_share(self) -> float:
        """Self-attention's share of the arithmetic of a dense forward."""
        attention, rest = self.model.flops(self.model.layout(self.size, self.frames))
        return attention / (attention + rest)


RUNS = (
    Run("Wan 2.2 14B", preset("wan2.2-14b"), (720, 1280), 81),
    Run("HunyuanVideo-1.5, 480p", preset("hunyuan-video-1.5"), (480, 832), 121),
    Run("HunyuanVideo-1.5, 720p", preset("hunyuan-video-1.5"), (720, 1280), 121),
    Run("MiniMax-H3", preset("minimax-h3"), (768, 1344), 124),
    Run("FLUX.2-dev, 1K", preset("flux2-dev"), (1024, 1024), 1),
    Run("FLUX.2-dev, 2K", preset("flux2-dev"), (2048, 2048), 1),
)


def work(run: Run, pattern: str) -> tuple[float, float]:
    """(share of the scores computed, their work over a dense call's) of one call under "dense", "radial" or "adaptive".

    "radial" is the model's own preset, with its unused lanes and masks; "adaptive" a fifth of the scores and means for the
    rest, without the choice itself. Raises GenAttnError for another pattern, or for Radial where the model has no preset.
    """
    if pattern == "dense":
        return 1.0, 1.0
    if pattern == "adaptive":
        return 0.2, 0.2 + TAIL
    if pattern != "radial" or not run.model.radial:
        raise GenAttnError(f"pattern must be dense, adaptive or, where the model has a preset, radial; got {pattern!r}")
    chosen = run.model.radial[0]
    cost = simulate_pattern(chosen.pattern, run.model.layout(run.size, run.frames), chosen.block, chosen.block)
    return cost.density, (1 + MASK_COST * (1 - cost.mask_free)) / cost.total_work


def step_seconds(run: Run, scores: float, machine: Machine) -> tuple[float, bool]:
    """(seconds of one step of all layers at `scores` of the attention's work, whether it waits for weights from the host).

    Raises GenAttnError for negative work.
    """
    if scores < 0:
        raise GenAttnError(f"scores must be a share of a dense call's work, at least 0, got {scores}")
    attention, rest = run.model.flops(run.model.layout(run.size, run.frames))
    weights = weights_bytes(run.model)
    compute = (rest + scores * attention) / machine.rate
    sending = weights / HOST if weights > machine.memory else 0.0
    return run.model.passes * max(compute, sending), sending > compute


def predict(run: Run, pattern: str) -> Predicted:
    """The prediction for one run under one pattern, on every machine."""
    scores, each = work(run, pattern)
    steps = [step_seconds(run, each, machine) for machine in MACHINES]
    sparse = 0.0 if pattern == "dense" else (1 - run.dense) * (1 - 1 / run.model.layers)
    faster = tuple(end_to_end(1 / (slower * each), run.attention_share * sparse) for slower in (1, 2))
    waiting = tuple(machine.name for machine, (_, waits) in zip(MACHINES, steps) if waits)
    return Predicted(run.name, pattern, run.tokens, scores, tuple(s for s, _ in steps), (faster[0], faster[1]), waiting)


def predictions() -> list[Predicted]:
    """Every run dense, under its Radial preset where it has one, and under "adaptive"."""
    return [predict(run, p) for run in RUNS for p in ("dense", "radial", "adaptive") if p != "radial" or run.model.radial]


@dataclass(frozen=True)
class Measured:
    """A time that others measured, beside the cost model's. evaluations: forwards of the run. rate: FLOP/s assumed per GPU.

    scores: share of the attention that stays in `sparse` of the evaluations.
    """

    what: str
    source: str
    seconds: float
    run: Run
    evaluations: int
    gpus: int = 1
    machine: Machine = MACHINES[0]
    scores: float = 1.0
    sparse: float = 0.0

    @property
    def predicted(self) -> float:
        """Seconds by the cost model, communication left out."""
        dense, _ = step_seconds(self.run, 1.0, self.machine)
        sparse, _ = step_seconds(self.run, self.scores, self.machine)
        passes = self.run.model.passes
        return self.evaluations * (dense + self.sparse * (sparse - dense)) / passes / self.gpus


_H3 = RUNS[3]
_H3_LONG = replace(_H3, model=replace(_H3.model, joint_tokens=226 + 810), frames=243)
_BLOG = "lm-sys blog, 2026-08-25"
_SOL = "NVlabs/Sana, models/minimax_h3"
_H200, _CARD = MACHINES[1], MACHINES[2]
# 10 of 49 evaluations dense, a quarter of the key blocks kept in the others
_KEPT, _SPARSE = 0.25, 39 / 49
MEASURED = (
    Measured("H3 5 s, 8 x H200, diffusers", _BLOG, 74.34, _H3, 49, 8, _H200),
    Measured("H3 5 s, 8 x H200, SGLang", _BLOG, 39.67, _H3, 49, 8, _H200),
    Measured("H3 5 s, 8 x H200, SGLang, SubBlock 0.75", _BLOG, 30.90, _H3, 49, 8, _H200, _KEPT, _SPARSE),
    Measured("H3 10 s, 8 x H200, diffusers", _BLOG, 207.71, _H3_LONG, 49, 8, _H200),
    Measured("H3 10 s, 8 x H200, SGLang", _BLOG, 112.44, _H3_LONG, 49, 8, _H200),
    Measured("H3 10 s, 8 x H200, SGLang, SubBlock 0.75", _BLOG, 77.12, _H3_LONG, 49, 8, _H200, _KEPT, _SPARSE),
    Measured("H3 5 s, 4 x H100, SGLang", _SOL, 81.47, _H3, 49, 4),
    Measured("H3 5 s, RTX 5090 (sets the card's rate)", _SOL, 1045.4, _H3, 49, 1, _CARD),
    Measured("FLUX.2 1K, one step, 2 GPUs of 80 GB", "SGLang #16219", 0.3695, RUNS[4], 1, 2),
)


@dataclass(frozen=True)
class Published:
    """A speed-up of a whole run that others published, in their words' setting."""

    model: str
    method: str
    faster: str
    setting: str
    source: str


PUBLISHED = (
    Published("Wan 2.2", "SVG-EAR", "up to 1.77x", "H100, PSNR up to 29.8", "arXiv 2603.08982, abstract"),
    Published("Wan 2.1 14B", "SVG2", "up to 1.89x", "PSNR up to 26", "arXiv 2505.18875, abstract"),
    Published("Wan 2.1 14B", "Radial", "1.77x", "H100, 69 frames, PSNR 23.9", "arXiv 2506.19852, table 1"),
    Published("HunyuanVideo-1.5", "LVSA", "2.66x", "A100, 129 frames, 50 steps", "gglorian/LVSA f4ba559"),
    Published("HunyuanVideo", "SVG2", "up to 2.30x", "PSNR up to 30", "arXiv 2505.18875, abstract"),
    Published("HunyuanVideo", "SVG-EAR", "up to 1.93x", "H100, PSNR up to 31.0", "arXiv 2603.08982, abstract"),
    Published("MiniMax-H3", "SubBlock 0.75", "1.28x, 1.46x", "8 x H200, 5 s and 10 s, SSIM .80, .83", _BLOG),
    Published("MiniMax-H3", "Sol-Attn", "1.22x", "RTX 4090, on top of TeaCache, 20 % of the blocks", _SOL),
    Published("several", "SD.Next, 30 %", "1.09x to 1.37x", "RTX 3090, weights offloaded", "SD.Next #5068"),
    Published("FLUX.1-dev, 4K", "GNA", "1.45x", "B200, 28 steps", "arXiv 2504.16922, end to end"),
)
