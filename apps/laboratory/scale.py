"""Memory, arithmetic and bytes over the wire of the stock Wan transformer at real sizes, against the model of docs/scale.md.

    python -m genattn.apps.laboratory.scale        adds rows to assets/bench/scale_check.csv; about half a minute

Nothing is computed: diffusers' own WanTransformer3DModel runs on fake tensors, which have shapes and no data, under its own
context parallelism and a fake process group, so that 40 GPUs and 700 GB need neither. torch's trackers count what the real
operators would hold, multiply and send. Attention's arithmetic is not among it: torch does not count the CPU's kernel.
"""

import multiprocessing
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode

from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.planning.model_preset import ModelPreset
from genattn.planning.presets import preset
from genattn.planning.scale import activation_bytes, wire_bytes

TABLE = Path("assets/bench/scale_check.csv")
GPUS = (1, 2, 8, 40)
LATENT_CHANNELS, TEXT_DIM = 16, 4096


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends: of what it hands to an all-to-all or an all-gather, all but its own part."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world, self.exchanged, self.gathered = world, 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "all_to_all_single" in name:
            self.exchanged += args[0].nbytes * (self.world - 1) / self.world
        elif "all_gather" in name:
            self.gathered += args[0].nbytes * (self.world - 1)
        return func(*args, **(kwargs or {}))


def build(model: ModelPreset, blocks: int) -> Any:
    """The stock transformer with so many of its blocks. To be called under FakeTensorMode."""
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": model.heads, "attention_head_dim": model.head_dim, "ffn_dim": model.ffn}
    return WanTransformer3DModel(**sizes, num_layers=blocks, in_channels=LATENT_CHANNELS, text_dim=TEXT_DIM).eval()


def share(made: Any, gpus: int) -> None:
    """Put the model under diffusers' Ulysses among `gpus` ranks that are not there."""
    from diffusers import ContextParallelConfig
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    # diffusers asks torch for an accelerator, of which a machine without GPUs has none
    with (
        mock.patch("torch.accelerator.device_count", return_value=gpus),
        mock.patch("torch._C._get_accelerator", return_value=torch.device("cpu")),
    ):
        made.enable_parallelism(config=ContextParallelConfig(ulysses_degree=gpus))


def check(model: ModelPreset, frames: int, gpus: int, blocks: int = 2) -> dict[str, Any]:
    """One row: bytes of activations and of traffic per GPU, and FLOPs without attention, counted and by the cost model.

    frames: of pixels at the preset's own size. gpus: a divisor of the heads. Starts a fake process group: one call a process.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_default_dtype(torch.bfloat16)
    layout, latents = model.layout(model.size, frames), (frames - 1) // model.frame_step + 1
    tracker, sent, counter = MemTracker(), SentBytes(gpus), FlopCounterMode(display=False)
    fake = FakeTensorMode()
    with fake:
        made = build(model, blocks)
        clip = torch.empty(1, LATENT_CHANNELS, latents, *(n // c for n, c in zip(model.size, model.compression[1:])))
        text, step = torch.empty(1, model.cross_tokens, TEXT_DIM), torch.tensor([5])
        tracker.track_external(made, clip, text)
    if gpus > 1:
        share(made, gpus)
    with fake, counter, tracker, sent, torch.no_grad():
        made(clip, step, text, return_dict=False)
    weights = sum(p.nbytes for p in made.parameters())
    peak = sum(b for parts in tracker.get_tracker_snapshot("peak").values() for k, b in parts.items() if str(k) == "Total")
    return {
        "model": model.name,
        "frames": frames,
        "tokens": layout.seqlen,
        "gpus": gpus,
        "blocks": blocks,
        "activation_bytes": peak - weights,
        "activation_model": activation_bytes(model, layout.seqlen, gpus),
        "exchanged_bytes": sent.exchanged,
        "exchanged_model": wire_bytes(model, layout.seqlen, gpus) * blocks / model.layers,
        "gathered_bytes": sent.gathered,
        "linear_flops": counter.get_total_flops() * gpus,
        "linear_model": model.flops(layout)[1] * blocks / model.layers,
    }


def main(
    name: Annotated[str, typer.Option("--model", help="A Wan preset.")] = "wan-14b",
    table: Annotated[Path, typer.Option(help="The file to add to.")] = TABLE,
) -> None:
    """Count for a clip of 81 frames and for a minute, and append the rows."""
    facts = provenance("cpu") | {"device": "fake tensors of the stock model"}
    context = multiprocessing.get_context("spawn")
    for frames in (81, 961):
        for gpus in GPUS:
            # a process group of a size can be had once in a process
            with context.Pool(1) as pool:
                row = pool.apply(check, (preset(name), frames, gpus))
            print(row, flush=True)
            append_rows(table, [row | facts])


if __name__ == "__main__":
    typer.run(main)
