"""The journal of `genattn tune` and `compare`: a line per finished run, so that a stop loses what is at hand and nothing else.

    {"request": {"model": ..., "prompts": [...], ...}}            what all lines belong to
    {"setting": "radial", "prompt": 0, "seconds": 5.1, ...}       one setting on one prompt, against dense run beside it

A run carries a check of its values: one that was changed is refused. Another goal, or more settings to try, may come back to
the same journal; another model, other weights under its name, another size, prompt or seed may not, nor another machine or
precision: seconds are compared.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError
from genattn.reading import check_of, whole
from genattn.settings import number, whole_number

_WEIGHTS, _MACHINE = "weights", "machine"  # known when the model is open


class Journal:
    """The lines of one request in `path`; `begin` makes the file.

    request: JSON-ready. begun: the one that the file was begun for, None without a file.

    Raises GenAttnError for a file that was begun for another request, or that is no journal.
    """

    def __init__(self, path: Path, request: Mapping[str, Any]) -> None:
        self.path = path
        self.request = json.loads(json.dumps(request))
        self.begun: dict[str, Any] | None = None
        self.samples: list[dict[str, Any]] = []
        lines = _read(path)
        if not lines:
            return
        self.begun = lines[0].get("request")
        if not isinstance(self.begun, dict):
            raise GenAttnError(f"{path} must begin with the request that it belongs to; name another --out, or delete the file")
        self._refuse_others({*self.begun, *self.request} - {_WEIGHTS, _MACHINE})
        self.samples = lines[1:]
        for place, sample in enumerate(self.samples, 2):
            with whole(f"line {place} of {path}"):
                _check(sample)
                if sample.pop("check", None) != check_of(sample):
                    raise ValueError("its values are not those that were written; delete the line, and it runs again")

    def made_with(self, weights: str, machine: str) -> None:
        """Make a fingerprint of the opened model, and what it runs on, part of the request.

        Raises GenAttnError for runs of others.
        """
        self.request |= {_WEIGHTS: weights, _MACHINE: machine}
        self._refuse_others({_WEIGHTS, _MACHINE})

    def _refuse_others(self, names: set[str]) -> None:
        """Raise GenAttnError if the file was begun with another value under one of these."""
        begun = self.request if self.begun is None else self.begun
        other = sorted(name for name in names if begun.get(name) != self.request.get(name))
        if other:
            beside = f" ({begun.get(_MACHINE)}; here {self.request.get(_MACHINE)})" if _MACHINE in other else ""
            raise GenAttnError(
                f"{self.path} belongs to a request with other {', '.join(other)}{beside}; "
                "name another --out, or delete the file"
            )

    def done(self, setting: str, prompt: int) -> bool:
        """Whether this run stands in the journal."""
        return any(s["setting"] == setting and s["prompt"] == prompt for s in self.samples)

    def begin(self) -> None:
        """Make the file where there is none."""
        if not self.path.is_file():
            self._append({"request": self.request})

    def add(self, sample: Mapping[str, Any]) -> None:
        """Append one finished run; it is on the disk when this returns."""
        self._append({**sample, "check": check_of(sample)})
        self.samples.append(dict(sample))

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _check(sample: Mapping[str, Any]) -> None:
    """Refuse a run that is none; the message says of what line."""
    if not isinstance(sample["setting"], str):
        raise ValueError(f"the name of a setting must be a text, got {sample['setting']!r}")
    whole_number("the prompt of a run", sample["prompt"], 0, "its number")
    for name in sample.keys() - {"setting", "prompt", "check"}:
        if sample[name] is not None or name != "oracle":
            number(name, sample[name], -math.inf, math.inf, "a number; delete the line, and it runs again")


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines; a last one that a kill cut off is taken out of the file.

    Raises GenAttnError for a line in the middle that cannot be read.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1]
    if lines != content:
        os.truncate(path, len(lines))  # what is whole must outlast a full disk
    found = []
    for place, line in enumerate(lines.splitlines(), 1):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise GenAttnError(f"line {place} of {path} is damaged ({error}); delete the file to begin anew") from None
    if not all(isinstance(line, dict) for line in found):
        raise GenAttnError(f"{path} must hold one JSON object a line; delete the file to begin anew")
    if not lines:
        path.unlink()
    return found
