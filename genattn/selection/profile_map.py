"""The file of a profiled map: safetensors with a header, read whole and checked before anything runs.

    relative.mass, relative.loss      float16 [layers, heads, bands, *offsets]    logarithms, see selection/relative_map.py
    key.mass ...  query.mass ...      float16 [layers, heads, bands, *cells]
    error.mass, error.loss            float32 [layers, heads, bands, shares]       squared, over the layer's squared output

Two maps stand in the file: "mass", by which cells are chosen where skipped ones are dropped, and "loss", where a tail stands
in. From the errors at a few shares a density is spread over layers, heads and parts of the run (selection/budget.py).
"""

import json
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.selection.budget import spread_shares
from genattn.selection.relative_map import CellGrid
from genattn.whole_file import whole_file

FORMAT, VERSION = "genattn-profile", 1
VALUES = ("mass", "loss")
_TABLES = tuple(f"{part}.{value}" for value in VALUES for part in ("relative", "key", "query"))


@dataclass(frozen=True)
class ProfileHeader:
    """What a map was made for. model: class of the denoiser. bands: ends of the parts of the run, rising, the last is 1.

    grid: cells (frames, rows, columns) of the layout it was made on. prompts: how many it saw. target_density: share of the
    grid's scores that it visits unless a pattern asks for another. shares: those at which errors were measured, the last is 1.
    """

    model: str
    layers: int
    heads: int
    grid: tuple[int, int, int]
    bands: tuple[float, ...]
    target_density: float
    prompts: int
    shares: tuple[float, ...]
    layout: str = ""

    def band(self, fraction: float | None) -> int | None:
        """The band at `fraction` of a run in [0, 1); None where it is unknown."""
        if fraction is None:
            return None
        return next((i for i, end in enumerate(self.bands) if fraction < end), len(self.bands) - 1)


@dataclass(frozen=True, eq=False)
class ProfileMap:
    """Header and tensors of a file."""

    header: ProfileHeader
    tensors: dict[str, torch.Tensor]
    _spread: dict[tuple[str, float, float], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def cells(self) -> CellGrid:
        """Cells of the layout it was made on."""
        return CellGrid(*self.header.grid)

    def at(self, value: str, layer: int, band: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(relative, key, query) tables of one layer, float32, heads first; the mean over the bands where none is known."""
        found = [self.tensors[f"{part}.{value}"][layer].float() for part in ("relative", "key", "query")]
        return tuple(t.mean(1) if band is None else t[:, band] for t in found)  # type: ignore[return-value]

    def spread(self, value: str, density: float, least: float = 0.0) -> torch.Tensor:
        """Float64 [layers, heads, bands]: share per head such that the mean is `density` and the summed error least.

        least: what a head takes in any case, one cell of however few the layout has.
        """
        slot = value, density, least
        if slot not in self._spread:
            known = self.header.shares
            shares = (*([least] if least > known[0] else []), *(s for s in known if s > least))
            columns = [self._error_at(value, torch.tensor(s, dtype=torch.float64)) for s in shares]
            flat = torch.stack(columns, -1).permute(0, 2, 1, 3)
            found = spread_shares(flat.flatten(0, 1), shares, max(density, shares[0]))
            self._spread[slot] = found.unflatten(0, flat.shape[:2]).permute(0, 2, 1)
        return self._spread[slot]

    def expected_error(self, value: str, density: float) -> torch.Tensor:
        """Float64 [layers, heads, bands]: squared error at the spread shares, over the layer's squared output."""
        return self._error_at(value, self.spread(value, density))

    def _error_at(self, value: str, share: torch.Tensor) -> torch.Tensor:
        """The measured errors [layers, heads, bands] at a share, one or per head, straight between the measured ones."""
        known = torch.tensor(self.header.shares, dtype=torch.float64)
        errors = self.tensors[f"error.{value}"].double()
        share = share.expand(errors.shape[:-1])
        right = torch.searchsorted(known, share.contiguous()).clamp(1, len(known) - 1)
        low, high = known[right - 1], known[right]
        part = ((share - low) / (high - low)).clamp(0, 1)
        at = [errors.gather(-1, i[..., None])[..., 0] for i in (right - 1, right)]
        return at[0] + part * (at[1] - at[0])


def write_map(found: ProfileMap, path: str | Path) -> Path:
    """Write the file, whole or not at all."""
    from safetensors.torch import save_file

    target = Path(path)
    about = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(asdict(found.header))}
    with whole_file(target) as part:
        save_file({name: t.contiguous() for name, t in found.tensors.items()}, part, metadata=about)
    return target


def read_map(path: str | Path) -> ProfileMap:
    """The map in `path`.

    Raises GenAttnError for a file that is missing, damaged, newer than this version, or something else.
    """
    target = Path(path)
    if not target.is_file():
        raise GenAttnError(f"a profiled map must be a file written by `genattn profile`, but there is no {str(path)!r}")
    stat = target.stat()
    return _read(target.resolve(), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, _modified: int, _size: int) -> ProfileMap:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
            _check_format(path, about)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise GenAttnError(
            f"{path} must be a whole safetensors file, but it cannot be read ({error}); copy or profile it again"
        ) from None
    header = _header(path, about)
    _check_tensors(path, header, tensors)
    return ProfileMap(header, tensors)


def _check_format(path: Path, about: dict[str, str]) -> None:
    if about.get("format") != FORMAT:
        raise GenAttnError(
            f"{path} must be a map written by `genattn profile`, got a safetensors file of format {about.get('format')!r}"
        )
    if about.get("version") != str(VERSION):
        raise GenAttnError(
            f"{path} has version {about.get('version')!r} of the map's format, this genattn reads {VERSION}; "
            "update genattn, or profile again"
        )


def _header(path: Path, about: dict[str, str]) -> ProfileHeader:
    try:
        given: dict[str, Any] = json.loads(about["header"])
        unknown = set(given) - {f.name for f in fields(ProfileHeader)}
        if unknown:
            raise ValueError(f"unknown entries {sorted(unknown)}")
        entries: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        header = ProfileHeader(**entries)
        reason = _why_no_header(header)
        if reason is not None:
            raise ValueError(reason)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise GenAttnError(f"{path} has a damaged header ({error}); copy or profile it again") from None
    return header


def _why_no_header(header: ProfileHeader) -> str | None:
    """What in a header's entries cannot be; None where all can."""
    for name in ("model", "layout"):
        if not isinstance(getattr(header, name), str):
            return f"{name} must be a text"
    numbers = {"layers": header.layers, "heads": header.heads, "prompts": header.prompts}
    grid = header.grid if isinstance(header.grid, tuple) and len(header.grid) == 3 else (None,)
    for name, value in (*numbers.items(), *(("grid", size) for size in grid)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return f"{name} must be made of whole numbers >= 1, got {value!r}"
    if isinstance(header.target_density, bool) or not 0 < header.target_density <= 1:
        return f"target_density must lie in (0, 1], got {header.target_density!r}"
    for name, rising in (("bands", header.bands), ("shares", header.shares)):
        if not isinstance(rising, tuple) or not rising or rising[-1] != 1 or list(rising) != sorted(set(rising)):
            return f"{name} must rise to 1, got {rising!r}"
        if not rising[0] > 0:
            return f"{name} must be > 0, got {rising!r}"
    return None


def _check_tensors(path: Path, header: ProfileHeader, tensors: dict[str, torch.Tensor]) -> None:
    first = (header.layers, header.heads, len(header.bands))
    grid = CellGrid(*header.grid)
    wanted: dict[str, tuple[int, ...]] = {
        name: (*first, *(grid.offset_shape if name.startswith("relative") else grid.shape)) for name in _TABLES
    }
    wanted |= {f"error.{value}": (*first, len(header.shares)) for value in VALUES}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != wanted:
        wrong = sorted(name for name in wanted if found.get(name) != wanted[name])
        raise GenAttnError(f"{path} is damaged: {', '.join(wrong) or 'extra tensors'} do not fit its header; profile it again")
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise GenAttnError(f"{path} is damaged: it holds values that are not finite; profile it again")
