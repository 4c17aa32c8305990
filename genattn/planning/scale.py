"""What long video costs on paper: arithmetic, memory, bytes over the wire and time of one run, from a model's shape.

    arithmetic   4 L d n^2 density + L n linear(d)      per forward, n tokens, L blocks of width d
    memory       weights + max(2 n d, n d + n / g max(10 d, 3 d + 2 ffn)) values, 16 bit, per GPU of g
    wire         4 n / g d (g - 1) / g values           sent per GPU and block by Ulysses: query, key, value, output
    time         arithmetic / (g rate), or wire / link where that is longer

Memory is what diffusers' WanTransformer3DModel holds (counted by apps/laboratory/scale.py): n d is the embedded clip, which
every GPU keeps whole because context parallelism cuts after the patch embedding, and holds twice while it is made; 10 d is
self-attention with its norm in 32 bit, 3 d + 2 ffn the feed-forward. So more GPUs save memory only up to about 2 n d.

FIFO (window w of the model's own length, 2 p windows a latent with lookahead): the same for w tokens, times the latents. The
rate is what published runs on one H100 came to (560 PFLOPs in 1630 s, 612 in 1649 s), not the data sheet's.
"""

import math
from dataclasses import dataclass
from typing import Literal

from genattn.errors import GenAttnError
from genattn.planning.model_preset import ModelPreset

Method = Literal["dense", "radial", "fifo"]


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind. rate: FLOP/s reached. memory: bytes. link, network: bytes/s per GPU inside a node and beyond."""

    name: str = "H100 80 GB"
    rate: float = 350e12
    memory: float = 80e9
    link: float = 450e9
    network: float = 50e9
    node: int = 8


@dataclass(frozen=True)
class ScaleSettings:
    """tile_overhead: tiles' density over the element density of Eq. 4. dense_steps: share of the run. partitions: of FIFO."""

    steps: int = 50
    tile_overhead: float = 1.31
    dense_steps: float = 0.25
    dense_layers: int = 1
    partitions: int = 4
    rope_latents: int = 1024

    def __post_init__(self) -> None:
        if min(self.steps, self.partitions) < 1 or self.tile_overhead < 1 or not 0 <= self.dense_steps <= 1:
            raise GenAttnError(f"steps and partitions must be >= 1, tile_overhead >= 1, dense_steps in [0, 1], got {self}")


@dataclass(frozen=True)
class ScaleCost:
    """One run. density: of the sparse calls. flops: of the run. memory, wire: bytes per GPU. seconds: of the run.

    gpus: those that can be used. bounds: what stands in the way or decides the time.
    """

    method: Method
    frames: int
    tokens: int
    gpus: int
    density: float
    flops: float
    memory: float
    wire: float
    seconds: float
    bounds: tuple[str, ...]


def radial_density(frames: int, tokens: int) -> float:
    """Share of the scores that Eq. 4 shows for so many frames of so many tokens: windows, single places, frame 0 as sink.

    Raises GenAttnError for fewer than one of either.
    """
    if min(frames, tokens) < 1:
        raise GenAttnError(f"frames and tokens must be >= 1, got {frames} and {tokens}")
    seen = 0.0
    for apart in range(frames):
        reach = 2 ** math.floor(math.log2(max(apart, 1)))
        width = min(tokens // reach, tokens) - 1  # |k - l| + 1 <= s / 2^r
        if width >= 0:
            pairs = tokens + 2 * (width * tokens - width * (width + 1) // 2)
        else:
            pairs = tokens if apart % math.ceil(reach / tokens) == 0 else 0
        # of the pairs of frames so far apart one has frame 0 as key, which is seen whole
        ordered = (frames - apart) * (1 if apart == 0 else 2)
        seen += pairs * (ordered - 1) + tokens**2
    return seen / (frames * tokens) ** 2


def weights_bytes(model: ModelPreset) -> float:
    """Bytes of the blocks' weights in 16 bit."""
    dim = model.heads * model.head_dim
    width, keys = model.width or dim, (model.kv_heads or model.heads) * model.head_dim
    per_block = 2 * width * (dim + keys) + 4 * width * dim * bool(model.cross_tokens) + 2 * width * model.ffn
    return 2.0 * model.layers * per_block


def activation_bytes(model: ModelPreset, tokens: int, gpus: int = 1) -> float:
    """Bytes that one GPU holds at once beside the weights for so many tokens of the whole clip, in 16 bit."""
    dim = model.heads * model.head_dim
    block = max(10 * dim, 3 * dim + 2 * model.ffn)
    return 2.0 * tokens * max(2 * dim, dim + block / gpus)


def usable_gpus(model: ModelPreset, gpus: int) -> int:
    """How many GPUs Ulysses can use: the largest divisor of the heads that is not above `gpus`."""
    return max(n for n in range(1, gpus + 1) if model.heads % n == 0)


def cost(
    model: ModelPreset,
    frames: int,
    method: Method,
    gpus: int = 1,
    settings: ScaleSettings | None = None,
    machine: Machine | None = None,
) -> ScaleCost:
    """The cost of one video of `frames` pixel frames at the model's own size, on `gpus` GPUs.

    Raises GenAttnError for a number of frames that the model cannot take, an unknown method or no GPU.
    """
    settings, machine = settings or ScaleSettings(), machine or Machine()
    if method not in ("dense", "radial", "fifo") or gpus < 1:
        raise GenAttnError(f"method must be dense, radial or fifo and gpus >= 1, got {method!r} and {gpus}")
    grid = model.grid(model.size, frames)
    if method == "fifo":
        return _fifo(model, frames, grid, gpus, settings, machine)
    layout = model.layout(model.size, frames)
    attention, rest = model.flops(layout)
    density, share = 1.0, 0.0
    if method == "radial":
        density = min(1.0, settings.tile_overhead * radial_density(grid[0], grid[1] * grid[2]))
        share = (1 - settings.dense_steps) * (1 - settings.dense_layers / model.layers)
    forwards = settings.steps * model.passes
    flops = (rest + attention * (1 - share + share * density)) * forwards
    used = usable_gpus(model, gpus)
    wire = wire_bytes(model, layout.seqlen, used) * forwards
    memory = weights_bytes(model) + activation_bytes(model, layout.seqlen, used)
    bounds = []
    if used < gpus:
        bounds.append(f"{model.heads} heads: Ulysses uses {used} of {gpus} GPUs")
    if grid[0] > settings.rope_latents:
        bounds.append(f"position table ends at {settings.rope_latents} latents, asked {grid[0]}")
    return _finished(method, frames, layout.seqlen, used, density, (flops, memory, wire), bounds, machine)


def _fifo(
    model: ModelPreset, frames: int, grid: tuple[int, int, int], gpus: int, settings: ScaleSettings, machine: Machine
) -> ScaleCost:
    """Windows of the model's own length; the 2 p windows of a tick and the passes go to groups of GPUs of their own."""
    window = model.layout(model.size, model.frames)
    latents = model.grid(model.size, model.frames)[0]
    levels = settings.partitions * latents
    forwards = (grid[0] + levels - latents) * 2 * settings.partitions * model.passes
    groups = math.gcd(gpus, 2 * settings.partitions * model.passes)
    inside = usable_gpus(model, gpus // groups)
    flops = sum(model.flops(window)) * forwards
    memory = weights_bytes(model) + activation_bytes(model, window.seqlen, inside)
    wire = wire_bytes(model, window.seqlen, inside) * forwards / groups
    bounds = [f"{levels} noise levels: the first frame comes after {levels - latents} ticks"]
    used = groups * inside
    return _finished("fifo", frames, window.seqlen, used, 1.0, (flops, memory, wire), bounds, machine)


def wire_bytes(model: ModelPreset, tokens: int, gpus: int) -> float:
    """Bytes that one of `gpus` GPUs sends in one forward for so many tokens of the whole clip, in 16 bit."""
    dim = model.heads * model.head_dim
    return 2.0 * 4 * model.layers * tokens / gpus * dim * (gpus - 1) / gpus


def _finished(
    method: Method,
    frames: int,
    tokens: int,
    gpus: int,
    density: float,
    totals: tuple[float, float, float],
    bounds: list[str],
    machine: Machine,
) -> ScaleCost:
    flops, memory, wire = totals
    compute = flops / (gpus * machine.rate)
    sending = wire / (machine.link if gpus <= machine.node else machine.network)
    if memory > machine.memory:
        bounds.append(f"memory: {memory / 1e9:.0f} GB of {machine.memory / 1e9:.0f}")
    if sending > compute:
        bounds.append("wire")
    seconds = max(compute, sending)
    return ScaleCost(method, frames, tokens, gpus, density, flops, memory, wire, seconds, tuple(bounds))


def balance_tokens(model: ModelPreset) -> float:
    """Tokens at which dense attention costs as much arithmetic as everything else."""
    layout = model.layout(model.size, model.frames)
    attention, rest = model.flops(layout)
    return layout.seqlen * rest / attention


def longest_frames(model: ModelPreset, gpus: int, machine: Machine | None = None) -> int:
    """Pixel frames at which the memory of `gpus` GPUs is full."""
    machine = machine or Machine()
    free = machine.memory - weights_bytes(model)
    tokens = free / activation_bytes(model, 1, usable_gpus(model, gpus))
    _, rows, columns = model.grid(model.size, model.frames)
    return max(0, int(tokens / (rows * columns)) - 1) * model.frame_step + 1


def wire_bites_below(model: ModelPreset, gpus: int, machine: Machine | None = None) -> float:
    """Tokens below which dense attention on `gpus` GPUs waits for the wire; 0 when it never does."""
    machine = machine or Machine()
    used = usable_gpus(model, gpus)
    layout = model.layout(model.size, model.frames)
    attention, rest = model.flops(layout)
    n = layout.seqlen
    speed = machine.link if used <= machine.node else machine.network
    # (a n^2 + r n) / (g rate) = w n / speed
    room = wire_bytes(model, n, used) / n / speed * used * machine.rate - rest / n
    return max(0.0, room / (attention / n**2))
