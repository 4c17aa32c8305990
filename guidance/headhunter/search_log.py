"""The memory of a search: a JSONL file that a kill at any moment cannot spoil.

The first line holds the search's settings; a file of other settings is refused. Each further line is one chunk of
trials, evaluated in one go, and its scores; it is flushed to disk before the next chunk begins. A line cut short by a
kill is dropped when the file is read, and its chunk is evaluated again: chunks are formed from the trials alone, so a
resumed search batches, and therefore rounds, exactly as an unbroken one. So is a line whose scores are not those that were
written: each carries a check of itself.

Several processes (accelerate) take chunks in turn; each writes a file of its own beside the first, and all see all scores.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError
from genattn.guidance.headhunter.search import Scores, Trial
from genattn.reading import check_of

Chunk = tuple[Trial, ...]
EvaluateChunk = Callable[[Chunk], Sequence[Scores]]
Progress = Callable[[int, int, float], None]
_BEGIN = b'{"settings": '


class SearchLog:
    """Scores by trial, kept in a file.

    Args:
        path: the JSONL file; created if missing.
        settings: JSON-ready description of everything that the scores depend on.
        chunk_size: trials evaluated together, >= 1; all of one prompt and kind. A dict gives one size per kind.
        evaluate: scores of one chunk.
        rank: number of this process.
        gather: collects one object of every process, in order; None for one process.
        world: number of processes.
        progress: called after each chunk with (chunks done, chunks in this request, seconds so far).
    """

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        chunk_size: int | Mapping[str, int],
        evaluate: EvaluateChunk,
        rank: int = 0,
        world: int = 1,
        gather: Callable[[Any], list[Any]] | None = None,
        progress: Progress | None = None,
    ) -> None:
        sizes = dict(chunk_size) if isinstance(chunk_size, Mapping) else {"full": chunk_size, "probe": chunk_size}
        if min(sizes.values()) < 1:
            raise GenAttnError(f"chunk_size must be >= 1, got {chunk_size}; raise it")
        self.path, self.sizes, self.evaluate = Path(path), sizes, evaluate
        self.rank, self.world, self.gather, self.progress = rank, world, gather, progress
        self.settings = json.loads(json.dumps({**settings, "chunk_size": sizes}))
        self.scores: dict[str, list[Scores]] = {}
        self.evaluated = 0
        self._read_all()
        self._meet(None)
        self._open()

    def __call__(self, trials: Sequence[Trial]) -> list[Scores]:
        """Scores of trials, evaluating those that no file holds."""
        chunks = form_chunks(trials, self.sizes)
        missing = [chunk for chunk in chunks if _key(chunk) not in self.scores]
        error, fresh, begun = None, dict[str, list[Scores]](), time.monotonic()
        mine = missing[self.rank :: self.world]
        for done, chunk in enumerate(mine):
            try:
                fresh[_key(chunk)] = self._evaluate(chunk)
            except Exception as caught:
                # the others must not wait for a process that has stopped
                error = caught
                break
            if self.progress is not None:
                self.progress(done + 1, len(mine), time.monotonic() - begun)
        for other, message in self._meet((fresh, None if error is None else f"{type(error).__name__}: {error}")):
            self.scores.update(other)
            if message is not None and error is None:
                error = GenAttnError(f"every process must finish its trials, got one that failed: {message}")
        if error is not None:
            raise error
        found = {t: s for chunk in chunks for t, s in zip(chunk, self.scores[_key(chunk)], strict=True)}
        return [found[trial] for trial in trials]

    def _evaluate(self, chunk: Chunk) -> list[Scores]:
        scores = [dict(s) for s in self.evaluate(chunk)]
        if len(scores) != len(chunk):
            raise GenAttnError(f"a chunk must get one set of scores per trial, got {len(scores)} for {len(chunk)}")
        line = {"trials": [trial.key for trial in chunk], "scores": scores}
        self._write(line | {"check": check_of(line)})
        self.evaluated += len(chunk)
        return scores

    def _meet(self, mine: Any) -> list[Any]:
        return [mine] if self.gather is None else self.gather(mine)

    @property
    def own_file(self) -> Path:
        """Where this process writes."""
        return self.path if self.rank == 0 else self.path.with_name(f"{self.path.stem}.{self.rank}{self.path.suffix}")

    def _read_all(self) -> None:
        files = [self.path, *sorted(self.path.parent.glob(f"{self.path.stem}.[0-9]*{self.path.suffix}"))]
        for file in files:
            if file.exists():
                for line in self._lines(file):
                    self.scores["|".join(line["trials"])] = line["scores"]

    def _lines(self, file: Path) -> list[dict[str, Any]]:
        content = file.read_bytes()
        parsed = [line for line in map(_parsed, content.splitlines()) if line is not None]
        if not parsed:
            # what a kill left of the first line may be begun anew, a file of somebody else's may not
            if content.strip() and not content.startswith(_BEGIN) and not _BEGIN.startswith(content):
                raise GenAttnError(f"{file} must be the log of a search or not be there, got another file; name another")
            return []
        begun = parsed[0].get("settings")
        if begun != self.settings:
            changed = _difference(begun if isinstance(begun, dict) else {}, self.settings)
            raise GenAttnError(
                f"a search must be resumed with the settings it was begun with, got other {', '.join(changed)} than in {file}; "
                "restore them or name another file"
            )
        return [line for line in parsed[1:] if _is_chunk(line)]

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        existing = self.own_file.read_bytes() if self.own_file.exists() else b""
        if existing and not existing.endswith(b"\n"):
            with self.own_file.open("ab") as file:
                file.write(b"\n")
        if not self.own_file.exists() or not self._lines_begin():
            self.own_file.write_text("")
            self._write({"settings": self.settings})

    def _lines_begin(self) -> bool:
        """Whether the file has its first line whole; else it holds nothing yet."""
        with self.own_file.open("rb") as file:
            return "settings" in (_parsed(file.readline()) or {})

    def _write(self, line: dict[str, Any]) -> None:
        with self.own_file.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def form_chunks(trials: Sequence[Trial], sizes: Mapping[str, int]) -> list[Chunk]:
    """Groups of trials of one kind, prompt and base, in order; a trial without heads stands alone."""
    ordered = sorted(trials, key=lambda t: (*_group(t), t.heads, -1.0 if t.u is None else t.u))
    chunks: list[Chunk] = []
    for _, group in groupby(ordered, key=_group):
        together = list(group)
        size = sizes[together[0].kind]
        chunks += [tuple(together[i : i + size]) for i in range(0, len(together), size)]
    return chunks


def _group(trial: Trial) -> tuple[Any, ...]:
    return trial.kind, trial.prompt, trial.base, bool(trial.heads)


def _key(chunk: Chunk) -> str:
    return "|".join(trial.key for trial in chunk)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None for a line that was cut short or damaged."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_chunk(line: Mapping[str, Any]) -> bool:
    """Whether a line holds what `_evaluate` writes."""
    trials, scores = line.get("trials"), line.get("scores")
    if line.get("check") != check_of({"trials": trials, "scores": scores}):
        return False
    if not isinstance(trials, list) or not isinstance(scores, list) or len(trials) != len(scores):
        return False
    return all(isinstance(trial, str) for trial in trials) and all(
        isinstance(found, dict) and all(type(value) in (int, float) and math.isfinite(value) for value in found.values())
        for found in scores
    )


def _difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*old, *new} if old.get(name) != new.get(name)) or ["version"]
