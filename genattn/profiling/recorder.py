"""The plugin behind `profile`: lets every attention call pass and adds up, by relative place, what it gives to whom."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from genattn.errors import GenAttnError, RunFailed
from genattn.functional.masks import key_mask
from genattn.geometry.tiles import best_box
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.layouts.site import AttentionSite
from genattn.patterns.profiled import cells_of, usual_cell
from genattn.reading import whole
from genattn.seam.plugin import AttentionCall, Inner, Plugin, Run
from genattn.selection.cell_mass import cell_mass, share_errors
from genattn.selection.profile_map import VALUES, ProfileHeader, ProfileMap
from genattn.selection.relative_map import CellGrid, Margins, fit, margins
from genattn.whole_file import whole_file

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


class Recorder(Plugin):
    """Lets every call pass and adds up what it gives to whom."""

    def __init__(self, bands: tuple[float, ...], samples: int) -> None:
        self.bands, self.samples = bands, samples
        self.model, self.heads, self.layers = "", 0, 0
        self.layout: TokenLayout | None = None
        self.grid = CellGrid(1, 1, 1)
        self.cells = torch.empty(0, dtype=torch.int64)
        self.sums: dict[tuple[str, int, int], Margins] = {}
        self.tables: dict[tuple[str, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.errors: dict[tuple[str, int, int], tuple[torch.Tensor, float]] = {}
        self.missing = "no self-attention was called"

    # ---- the model

    def attach(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        """One model, the same number of heads everywhere."""
        wanted = [site for site in sites if self.wants(site)]
        name, heads = model.__class__.__name__, {site.heads for site in wanted}
        if not wanted:
            raise GenAttnError(f"{name} has no self or joint attention in its blocks; nothing to profile")
        if len(heads) > 1:
            raise GenAttnError(f"a profile needs the same number of heads in every layer, got {sorted(heads)}; not served yet")
        layers = 1 + max(site.depth for site in sites)
        if self.model and (name, heads, layers) != (self.model, {self.heads}, self.layers):
            raise GenAttnError(f"all denoisers of a pipeline must be alike to share a map, got {self.model} and {name}")
        self.model, self.heads, self.layers = name, heads.pop(), layers

    def wants(self, site: AttentionSite) -> bool:
        """Attention over the grid in the blocks."""
        return site.kind in ("self", "joint") and site.depth >= 0

    # ---- one call

    @torch.no_grad()
    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """The dense answer, looked at."""
        if call.run.extra is None:
            self._look(call)
        return inner(call)

    def _look(self, call: AttentionCall) -> None:
        if call.layout is None or call.layout.grid is None:
            self.missing = call.run.why_no_layout or f"the token grid at {call.site.name} is not known"
            return
        self._set_layout(call.layout)
        hidden, reason = (
            (None, "")
            if call.mask is None
            else key_mask(call.mask, call.query.shape[0], call.query.shape[1], call.key.shape[1])
        )
        if reason:
            self.missing = reason
            return
        if self.tables:
            self._check(call, hidden)
            return
        cells = self.cells.to(call.query.device)
        found = cell_mass(call.query, call.key, cells, call.scale, hidden, self.samples)
        if not all(bool(torch.isfinite(x).all()) for x in found):
            raise RunFailed(
                f"attention at {call.site.name}, step {call.run.step}, holds values that are not finite; nothing was written "
                "(try float32)"
            )
        self._add(call, found)

    def _add(self, call: AttentionCall, found: tuple[torch.Tensor, torch.Tensor]) -> None:
        band = self._band(call.run)
        for value, part in zip(VALUES, found):
            each = torch.zeros(self.heads, *part.shape[1:], dtype=torch.float64)
            each[call.head_offset : call.head_offset + part.shape[0]] = part.cpu()
            slot, sums = (value, call.site.depth, band), margins(each, self.grid)
            self.sums[slot] = self.sums[slot].plus(sums) if slot in self.sums else sums

    def _band(self, run: Run) -> int:
        if run.fraction is None:
            raise GenAttnError(
                "a profile needs to know the sampling step and the number of steps; apply it to a pipeline, or call the bare "
                "model with its num_steps option"
            )
        return next(i for i, end in enumerate(self.bands) if run.fraction < end)

    def _set_layout(self, layout: TokenLayout) -> None:
        if self.layout == layout:
            return
        if self.layout is not None:
            raise GenAttnError(
                f"all prompts of a profile must have the same size, got {self.layout.describe()} and {layout.describe()}"
            )
        block = usual_cell(layout)
        frames, height, width = layout.grid3
        cells, _ = cells_of(layout, block)
        rows, columns = best_box(height, width, block)
        if cells.shape[0] != frames * rows * columns:
            raise GenAttnError(
                f"a frame of {height} x {width} tokens cannot be cut into cells of {block}; profile at a larger size"
            )
        self.layout, self.grid = layout, CellGrid(frames, rows, columns)
        places = layout.grid_positions.numpy()
        self.cells = torch.from_numpy(np.where(cells >= 0, places[np.maximum(cells, 0)], -1))

    def check_seen(self) -> None:
        """Raise GenAttnError unless something was recorded."""
        if not self.sums:
            raise GenAttnError(f"nothing could be profiled: {self.missing}")

    # ---- on disk

    def save(self, path: Path, about: dict[str, Any], done: int) -> None:
        """The sums so far, whole or not at all."""
        from safetensors.torch import save_file

        assert self.layout is not None
        tensors = {
            f"{value}.{layer}.{band}.{part}": getattr(sums, part).contiguous()
            for (value, layer, band), sums in self.sums.items()
            for part in ("offset", "key", "query")
        }
        record = about | {"done": done, "layout": self.layout.describe(), "segments": _segments(self.layout)}
        with whole_file(path) as part:
            save_file(tensors, part, metadata={"record": json.dumps(record)})

    def load(self, path: Path, about: dict[str, Any]) -> int:
        """How many prompts the file holds, 0 without a file. Raises GenAttnError for one of other settings or a damaged one."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return 0
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {})["record"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not isinstance(record, dict):
                raise ValueError("its record is no object")
        except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
            raise GenAttnError(f"the unfinished profile {path} cannot be read ({error}); delete it to start again") from None
        other = sorted(name for name, value in about.items() if record.get(name) != value)
        if other:
            raise GenAttnError(
                f"the unfinished profile {path} was made with other {', '.join(other)}; delete it, or write to another file"
            )
        with whole(f"the unfinished profile {path}"):
            return self._taken_up(record, tensors)

    def _taken_up(self, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> int:
        self._set_layout(TokenLayout(tuple(Segment(**{**s, "shape": tuple(s["shape"])}) for s in record["segments"])))
        cells = (self.heads, self.grid.cells)
        shapes = {"offset": (self.heads, math.prod(self.grid.offset_shape)), "key": cells, "query": cells}
        for name in {name.rsplit(".", 1)[0] for name in tensors}:
            value, layer, band = name.split(".")
            parts = [tensors[f"{name}.{part}"] for part in shapes]
            fit = [tuple(part.shape) for part in parts] == list(shapes.values())
            if not fit or not all(bool(part.isfinite().all()) for part in parts):
                raise ValueError(f"{name} does not fit the model")
            if value not in VALUES or int(layer) not in range(self.layers) or int(band) not in range(len(self.bands)):
                raise ValueError(f"{name} is of no layer of the model")
            self.sums[value, int(layer), int(band)] = Margins(*parts)
        done = record["done"]
        if isinstance(done, bool) or not isinstance(done, int) or not 1 <= done <= len(record["prompts"]):
            raise ValueError(f"it holds {done!r} of {len(record['prompts'])} prompts")
        return done

    # ---- the map

    def fit(self) -> None:
        """End of the first look: the sums become tables. A band that no step fell into takes the nearest one's."""
        for value in VALUES:
            for layer in range(self.layers):
                for band in range(len(self.bands)):
                    self.tables[value, layer, band] = fit(self._sums(value, layer, band), self.grid)

    def _sums(self, value: str, layer: int, band: int) -> Margins:
        """Those of the band, or of the nearest one that was seen; of an even map for a layer that never ran."""
        seen = sorted((abs(b - band), b) for v, n, b in self.sums if (v, n) == (value, layer))
        if seen:
            return self.sums[value, layer, seen[0][1]]
        even = torch.full((self.heads, self.grid.cells, self.grid.cells), 1.0 / self.grid.cells, dtype=torch.float64)
        return margins(even, self.grid)

    def _check(self, call: AttentionCall, hidden: torch.Tensor | None) -> None:
        """Second look: what the map would change at each share, dropped and stood in for."""
        band, heads = self._band(call.run), slice(call.head_offset, call.head_offset + call.query.shape[2])
        cells = self.cells.to(call.query.device)
        for value in VALUES:
            kept = self._kept(value, call.site.depth, band)[:, heads].to(call.query.device)
            found = share_errors(
                call.query, call.key, call.value, cells, kept, value == "loss", call.scale, hidden, self.samples
            )
            slot = value, call.site.depth, band
            error, power = self.errors.get(slot, (torch.zeros(len(SHARES), self.heads, dtype=torch.float64), 0.0))
            error[:, heads] += found[0].cpu()
            self.errors[slot] = error, power + float(found[1].sum())

    def _kept(self, value: str, layer: int, band: int) -> torch.Tensor:
        """Bool [shares, H, N, N]: the map at each share."""
        relative, key, query = self.tables[value, layer, band]
        log = relative.flatten(1)[:, self.grid.offset_index] + key.flatten(1)[:, None] + query.flatten(1)[:, :, None]
        log = log.masked_fill(torch.eye(self.grid.cells, dtype=torch.bool), torch.inf)
        rank = log.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return torch.stack([rank < max(1, round(share * self.grid.cells)) for share in SHARES])

    def map(self, target_density: float, prompts: int) -> ProfileMap:
        """Tables and errors as one map."""
        assert self.layout is not None
        tensors: dict[str, torch.Tensor] = {}
        for value in VALUES:
            for number, part in enumerate(("relative", "key", "query")):
                rows = [[self.tables[value, n, b][number] for b in range(len(self.bands))] for n in range(self.layers)]
                tensors[f"{part}.{value}"] = torch.stack([torch.stack(row, 1) for row in rows]).to(torch.float16)
            curves = [[self._curve(value, n, b) for b in range(len(self.bands))] for n in range(self.layers)]
            tensors[f"error.{value}"] = torch.stack([torch.stack(row, 1) for row in curves]).float()
        grid = self.grid.shape
        header = ProfileHeader(
            self.model, self.layers, self.heads, grid, self.bands, target_density, prompts, SHARES, self.layout.describe()
        )
        return ProfileMap(header, tensors)

    def _curve(self, value: str, layer: int, band: int) -> torch.Tensor:
        """Float64 [H, shares]: squared error over the layer's squared output; of the nearest band that was seen."""
        seen = sorted((abs(b - band), b) for v, n, b in self.errors if (v, n) == (value, layer))
        if not seen:
            return torch.zeros(self.heads, len(SHARES), dtype=torch.float64)
        error, power = self.errors[value, layer, seen[0][1]]
        return error.T / max(power, 1e-30)


def _segments(layout: TokenLayout) -> list[dict[str, Any]]:
    return [{"kind": s.kind, "shape": s.shape, "start": s.start, "stop": s.stop} for s in layout.segments]
