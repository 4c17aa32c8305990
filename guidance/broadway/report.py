"""What BroadWay measured: energies, beta and disparity per block and step, as a table, JSON and a plot.

Numbers stay on the device as they come, one small tensor per guided attention; reading them waits for the device once.
"""

import io
import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from genattn.errors import GenAttnError
from genattn.guidance.broadway.temporal_map import AUTO_DISPARITY, EditScalars
from genattn.seam.plugin import Run
from genattn.whole_file import save_figure, write_whole

NUMBERS = ("alpha", "beta", "e1", "e2", "e3", "disparity")
_LIMIT = 20_000


@dataclass(frozen=True)
class _Record:
    site: str
    block: str
    frames: int
    step: int
    sigma: float | None
    pass_name: str | None
    numbers: torch.Tensor


UNRELATED = 0.25


class BroadWayReport:
    """The guided attentions of the last runs, oldest dropped after 20,000."""

    def __init__(self) -> None:
        self._records: deque[_Record] = deque(maxlen=_LIMIT)

    def __len__(self) -> int:
        return len(self._records)

    def add(self, site: str, block: str, frames: int, run: Run, scalars: EditScalars) -> None:
        """Note one guided attention; does not wait for the device."""
        numbers = torch.stack([getattr(scalars, name).detach() for name in NUMBERS])
        self._records.append(_Record(site, block, frames, run.step, run.sigma, run.pass_name, numbers))

    def clear(self) -> None:
        """Forget everything."""
        self._records.clear()

    def rows(self) -> list[dict[str, Any]]:
        """One dict per guided attention: site, block, frames, step, sigma, pass_name, and the six numbers."""
        if not self._records:
            return []
        values = torch.stack([r.numbers.cpu() for r in self._records]).tolist()
        keys = ("site", "block", "frames", "step", "sigma", "pass_name")
        return [
            {key: getattr(record, key) for key in keys} | dict(zip(NUMBERS, numbers, strict=True))
            for record, numbers in zip(self._records, values, strict=True)
        ]

    def by_block(self) -> list[dict[str, Any]]:
        """Means over the attentions of each block, step and pass, with the number of calls, in the order in which they ran."""
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.rows():
            groups.setdefault((row["block"], row["step"], row["pass_name"]), []).append(row)
        return [
            {"block": block, "step": step, "pass_name": name, "sigma": rows[0]["sigma"], "calls": len(rows)}
            | {number: sum(r[number] for r in rows) / len(rows) for number in NUMBERS}
            for (block, step, name), rows in groups.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """`by_block`, `rows`, the suggestion and the warning, ready for JSON."""
        return {
            "by_block": self.by_block(),
            "rows": self.rows(),
            "suggestion": self.suggest() if len(self) else None,
            "warning": self.warning(),
        }

    def save_json(self, path: str | Path) -> None:
        """Write `to_dict`."""
        write_whole(path, json.dumps(self.to_dict(), indent=1))

    def table(self) -> str:
        """`by_block` as text."""
        table = Table("block", "step", "pass", "calls", *NUMBERS, box=None)
        for row in self.by_block():
            numbers = [f"{row[name]:.4f}" for name in NUMBERS]
            table.add_row(row["block"], str(row["step"]), row["pass_name"] or "-", str(row["calls"]), *numbers)
        text = io.StringIO()
        Console(file=text, width=160, color_system=None).print(table)
        return text.getvalue()

    def suggest(self) -> dict[str, float]:
        """Settings from what was measured, best on a dry run (alpha = 0, beta = 1, an anchor at hand).

        alpha brings the mean disparity down to `AUTO_DISPARITY` of the map's own motion, its distance from the uniform map;
        beta is then what the floor would ask for if anchor and map were unrelated, at least 1. Figures to begin with.

        Raises:
            GenAttnError: when nothing was measured.
        """
        rows = [r for r in self.rows() if r["disparity"] > 0]
        if not rows:
            raise GenAttnError(
                f"a suggestion needs guided attentions with an anchor, got {len(self)} records without; run the pipeline first"
            )
        motion = sum(max(r["e1"] - 1 / r["frames"], 1e-12) for r in rows) / len(rows)
        disparity = (sum(r["disparity"] ** 2 for r in rows) / len(rows)) ** 0.5
        relative = disparity / motion**0.5
        alpha = min(1.0, max(0.0, 1.0 - AUTO_DISPARITY / relative))
        # |M + alpha D|^2 of the moving part, with <M, D> = -|D|^2 / 2: anchor and map have the same energy
        left = max(1.0 - alpha * (1.0 - alpha) * relative**2, 1e-6)
        return {"alpha": round(alpha, 3), "beta": round(max(1.0, left**-0.5), 3), "relative_disparity": round(relative, 4)}

    def warning(self) -> str | None:
        """What speaks against self-guidance here, or None: anchor and guided maps that are nearly unrelated.

        Of two maps of one energy that correlate by r, the squared distance is 2 (1 - r) of the motion of one.
        """
        if not any(r["disparity"] > 0 for r in self.rows()):
            return None
        alike = 1 - self.suggest()["relative_disparity"] ** 2 / 2
        if alike > UNRELATED:
            return None
        return (
            f"anchor and guided maps are nearly unrelated (correlation about {alike:.2f}): self-guidance then swaps a map for "
            "another; take a smaller alpha or another anchor"
        )

    def plot(self, path: str | Path) -> None:
        """Energy kept (E2/E1, E3/E1), beta and disparity over steps, one line per block; written as an image.

        Raises:
            GenAttnError: when nothing was measured, or matplotlib is missing.
        """
        rows = [r for r in self.by_block() if r["pass_name"] != "uncond"]
        if not rows:
            raise GenAttnError(f"a plot needs guided attentions, got {len(self)} records; run the pipeline first")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise GenAttnError("plot() needs matplotlib, which is not installed; run `pip install matplotlib`") from error
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        energy, beta, disparity = figure.subplots(1, 3)
        for block in dict.fromkeys(r["block"] for r in rows):
            mine = [r for r in rows if r["block"] == block]
            steps = [r["step"] for r in mine]
            line = energy.plot(steps, [r["e3"] / r["e1"] for r in mine], marker="o", label=block)[0]
            energy.plot(steps, [r["e2"] / r["e1"] for r in mine], linestyle=":", color=line.get_color())
            beta.plot(steps, [r["beta"] for r in mine], marker="o")
            disparity.plot(steps, [r["disparity"] for r in mine], marker="o")
        for axis, title in ((energy, "E3 / E1 (dotted: E2 / E1)"), (beta, "beta"), (disparity, "disparity")):
            axis.set(title=title, xlabel="step")
        energy.legend(fontsize=7)
        save_figure(figure, path, 120)
