"""An atlas of heads: what each one does when it is perturbed, as one picture per head, a contact sheet and a heat map.

    atlas = HeadAtlas(hunter, "atlas")
    atlas.draw()                                 # L00H00.png, L00H01.png, ...; those that exist are kept
    atlas.contact_sheet()                        # rows are layers, columns heads, the unguided picture first
    heat_map(head_set, "heat.png")               # score of every head of the first round

Clips are shown by their middle frame.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from genattn import whole_file
from genattn.errors import GenAttnError
from genattn.guidance.headhunter.hunter import HeadHunter
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.heads.names import Head, head_name
from genattn.whole_file import save_figure, write_whole

_MARGIN = 14


class HeadAtlas:
    """Pictures of one prompt with each head perturbed alone.

    Args:
        hunter: says pipeline, prompts, seeds, weight and scale.
        folder: where the pictures go; created if missing.
        prompt: index of the prompt.
    """

    def __init__(self, hunter: HeadHunter, folder: str | Path, prompt: int = 0) -> None:
        if not 0 <= prompt < len(hunter.prompts):
            raise GenAttnError(f"prompt must be an index below {len(hunter.prompts)}, got {prompt}; choose one of those")
        self.hunter, self.folder, self.prompt = hunter, Path(folder), prompt
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim()

    def _claim(self) -> None:
        """Refuse a folder that holds the atlas of another model, prompt or strength."""
        identity = {**self.hunter.identity(), "prompt": self.prompt}
        identity = {
            name: identity[name] for name in sorted(identity) if name not in ("search", "objectives", "pool", "probe_steps")
        }
        told, path = json.dumps(identity, indent=1), self.folder / "atlas.json"
        if path.exists() and path.read_text() != told:
            raise GenAttnError(
                f"an atlas must be of one model, prompt and strength, got another in {self.folder}; name a new folder"
            )
        write_whole(path, told)

    def path(self, head: Head | None) -> Path:
        """The file of a head's picture; None for the unguided one."""
        return self.folder / ("unguided.png" if head is None else f"L{head[0]:02d}H{head[1]:02d}.png")

    def draw(self) -> list[Path]:
        """Make the pictures that are missing, several heads per batch; returns all paths, the unguided one first."""
        heads: list[Head | None] = [None, *self.hunter.pool]
        missing = [head for head in heads if not self.path(head).exists()]
        size = self.hunter.batch
        parts: list[list[Head | None]] = [[head] for head in missing if head is None]
        named = [head for head in missing if head is not None]
        parts += [list(named[i : i + size]) for i in range(0, len(named), size)]
        for part in parts:
            weights: list[dict[Head, float]] = [{} if head is None else {head: self.hunter.u} for head in part]
            for head, sample in zip(part, self.hunter.guided(self.prompt, weights), strict=True):
                write_picture(sample, self.path(head))
        return [self.path(head) for head in heads]

    def contact_sheet(self, cell: int = 96) -> Path:
        """One PNG with all pictures, `cell` pixels high each; raises GenAttnError if some are missing."""
        absent = [head_name(head) for head in self.hunter.pool if not self.path(head).exists()]
        if absent:
            raise GenAttnError(f"every head needs its picture, got none for {', '.join(absent[:5])}; call draw() first")
        layers = sorted({layer for layer, _ in self.hunter.pool})
        columns = 1 + max(head for _, head in self.hunter.pool)
        width = self._read(None, cell).width
        sheet = Image.new("RGB", (width * (columns + 1), (cell + _MARGIN) * len(layers)), "white")
        pen = ImageDraw.Draw(sheet)
        for row, layer in enumerate(layers):
            shown = [(0, None), *((1 + head, (layer, head)) for head in range(columns) if (layer, head) in self.hunter.pool)]
            for column, head in shown:
                left, top = column * width, row * (cell + _MARGIN)
                sheet.paste(self._read(head, cell), (left, top + _MARGIN))
                pen.text((left + 2, top + 1), "unguided" if head is None else head_name(head), fill="black")
        target = self.folder / "contact_sheet.png"
        return whole_file.write_picture(sheet, target)

    def _read(self, head: Head | None, height: int) -> Image.Image:
        """A head's picture at a height in pixels."""
        with Image.open(self.path(head)) as picture:
            return picture.convert("RGB").resize((round(height * picture.width / picture.height), height))


def write_picture(sample: torch.Tensor, path: str | Path) -> Path:
    """A sample [3, H, W] or the middle frame of [T, 3, H, W], in [0, 1], as PNG; whole or not at all."""
    frame = sample if sample.ndim == 3 else sample[len(sample) // 2]
    pixels = (frame.clamp(0, 1).movedim(0, -1) * 255).round().to(torch.uint8).numpy()
    return whole_file.write_picture(Image.fromarray(pixels), path)


def heat_map(head_set: HeadSet, path: str | Path, scores: Mapping[Head, float] | None = None) -> Path:
    """Score of every head as a layer x head map, chosen heads framed; written to `path`.

    Raises:
        GenAttnError: without scores, or without matplotlib.
    """
    shown: Mapping[Head, float] = head_set.scores if scores is None else scores
    if not shown:
        raise GenAttnError("a heat map needs scores, got none; pass scores or a head set that was hunted")
    figure = _figure(len(head_set.layer_map), max(head_set.layer_map.values()))
    layers = sorted(head_set.layer_map)
    table = np.full((len(layers), max(head_set.layer_map.values())), np.nan)
    for (layer, head), score in shown.items():
        table[layers.index(layer), head] = score
    axes = figure.subplots()
    peak = float(np.nanmax(np.abs(table))) or 1.0
    image = axes.imshow(table, cmap="coolwarm", vmin=-peak, vmax=peak, aspect="auto")
    for layer, head in head_set.heads:
        _frame(axes, layers.index(layer), head)
    axes.set(xlabel="head", ylabel="layer", yticks=range(len(layers)), yticklabels=layers, title=head_set.objective or None)
    figure.colorbar(image, label="score")
    return save_figure(figure, path, 120)


def _figure(rows: int, columns: int) -> Any:
    """Not pyplot's, which would keep it in memory where it cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GenAttnError(f"a heat map needs matplotlib, got {error}; install it: pip install matplotlib") from error
    return Figure(figsize=(2 + 0.3 * columns, 1.5 + 0.25 * rows), layout="tight")


def _frame(axes: Any, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.5))
