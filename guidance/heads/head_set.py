"""HeadSet: a file that says which heads to perturb in which model, how strongly, and how that was found out.

    {"format": "genattn-head-set", "version": 1, "heads": {"L11H15": 0.5, ...}, "model": "SD3Transformer2DModel",
     "layer_map": {"0": 24, ...}, "scale": 3.0, "start": 0.0, "stop": 1.0, "objective": "pickscore", "scores": {...}}

Sets are joined and cut like sets (`a | b`, `a - b`); a set is refused by a model whose layers or heads differ from the
model it was found on.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError
from genattn.guidance.heads.names import (
    Head,
    HeadsLike,
    HeadWeights,
    LayerMap,
    describe_layers,
    format_heads,
    head_name,
    parse_head,
    resolve_heads,
)
from genattn.reading import read_json, whole
from genattn.settings import number, refuse, whole_number
from genattn.whole_file import write_whole

FORMAT = "genattn-head-set"
VERSION = 1


@dataclass(frozen=True)
class HeadSet:
    """Heads with their weights, and where they come from.

    Attributes:
        heads: {(layer, head): u}, u in [0, 1].
        layer_map: heads per layer of the model.
        model: class of the denoiser, e.g. "SD3Transformer2DModel".
        model_id: checkpoint, a path or hub name; "" when unknown.
        target: what the heads' maps are drawn towards, see `genattn.guidance.softpag.perturbation.TARGETS`.
        scale: guidance scale w; any finite number.
        start: first moment of guidance, fraction of the steps in [0, 1].
        stop: last moment, fraction of the steps in [0, 1].
        objective: what was maximised, for people.
        scores: {head: score}, higher is better; of any heads, also such as are not in the set.
        versions: {"genattn": "0.1.0", ...} of the run that found the set.
        notes: anything JSON-ready.
    """

    heads: HeadWeights
    layer_map: dict[int, int]
    model: str = ""
    model_id: str = ""
    target: str = "identity"
    scale: float = 3.0
    start: float = 0.0
    stop: float = 1.0
    objective: str = ""
    scores: dict[Head, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_map", _checked_layers(self.layer_map))
        object.__setattr__(self, "heads", resolve_heads(self.heads, self.layer_map))
        most = sys.float_info.max
        object.__setattr__(
            self, "scale", number("scale", self.scale, -most, most, "a finite number; the usual range is 1 to 8")
        )
        for name in ("model", "model_id", "target", "objective"):
            if not isinstance(getattr(self, name), str):
                raise GenAttnError(f"{name} of a head set must be a text, got {getattr(self, name)!r}")
        for name in ("start", "stop"):
            number(name, getattr(self, name), 0.0, 1.0, "a fraction of the steps in [0, 1]")
        if self.start > self.stop:
            raise GenAttnError(f"start and stop must be fractions with start <= stop, got {self.start} and {self.stop}")
        for name in ("scores", "versions", "notes"):
            if not isinstance(getattr(self, name), Mapping):
                raise refuse(f"{name} of a head set", getattr(self, name), "a dict")
        if not all(isinstance(head, tuple) and len(head) == 2 for head in self.scores):
            raise refuse("scores of a head set", self.scores, "a dict of (layer, head): score")
        scores = {head: number(f"the score of {head_name(head)}", s, -most, most, "finite") for head, s in self.scores.items()}
        object.__setattr__(self, "scores", scores)

    def __hash__(self) -> int:
        """Of what the set does: scores, versions and notes, which equality looks at too, may hold what has no hash."""
        settings = (self.model, self.model_id, self.target, self.scale, self.start, self.stop, self.objective)
        return hash((frozenset(self.heads.items()), frozenset(self.layer_map.items()), settings))

    @classmethod
    def from_names(cls, heads: HeadsLike, layers: LayerMap, u: float = 1.0, **settings: Any) -> "HeadSet":
        """A set from names such as "L11H15,L13H17"."""
        return cls(resolve_heads(heads, layers, u), dict(layers), **settings)

    def check_model(self, layers: LayerMap, model: str = "") -> None:
        """Raise GenAttnError unless a model has the layers and heads that this set was made for."""
        if dict(layers) != self.layer_map or (model and self.model and model != self.model):
            raise GenAttnError(
                f"a head set must be used on a model of the same layers, got one for {self.model or 'a model'} "
                f"({describe_layers(self.layer_map)}) on {model or 'a model'} ({describe_layers(layers)}); "
                "hunt for heads on this model"
            )

    def __or__(self, other: "HeadSet") -> "HeadSet":
        """All heads of both; where both hold a head, the stronger u. Everything else is taken from the left."""
        other.check_model(self.layer_map, self.model)
        heads = {head: max(self.heads.get(head, 0.0), other.heads.get(head, 0.0)) for head in {*self.heads, *other.heads}}
        return replace(self, heads=heads, scores={**other.scores, **self.scores})

    def __sub__(self, other: "HeadSet") -> "HeadSet":
        """The heads of the left that the right does not hold; raises GenAttnError when none remain."""
        other.check_model(self.layer_map, self.model)
        return replace(self, heads={head: u for head, u in self.heads.items() if head not in other.heads})

    def names(self) -> str:
        """The heads with their weights as one string, e.g. "L11H15:0.5,L13H17:0.5"."""
        return format_heads(self.heads)

    def with_u(self, u: float) -> "HeadSet":
        """The same heads, all with weight u."""
        return replace(self, heads=resolve_heads(list(self.heads), self.layer_map, u))

    def top(self, count: int) -> "HeadSet":
        """The `count` best heads of the set by score; raises GenAttnError where scores are missing."""
        missing = [head_name(head) for head in self.heads if head not in self.scores]
        if missing or count < 1:
            raise GenAttnError(f"top needs count >= 1 and a score for every head, got {count} and none for {missing}")
        best = sorted(self.heads, key=lambda head: (-self.scores[head], head))[:count]
        return replace(self, heads={head: self.heads[head] for head in best})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = asdict(self)
        plain["heads"] = {head_name(head): u for head, u in self.heads.items()}
        plain["scores"] = {head_name(head): score for head, score in sorted(self.scores.items())}
        plain["layer_map"] = {str(layer): count for layer, count in self.layer_map.items()}
        return {"format": FORMAT, "version": VERSION, **plain}

    def save(self, path: str | Path) -> Path:
        """Write the set as JSON, whole or not at all; returns the path.

        Raises GenAttnError for notes that JSON does not hold.
        """
        try:
            text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise GenAttnError(f"notes of a head set must be what JSON holds, got others ({error}); leave them out") from None
        return write_whole(path, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "HeadSet":
        """Read a set.

        Raises:
            GenAttnError: if the file is missing, is no head set, or is of another version.
        """
        return cls.from_dict(read_json(path, "a head set"), str(path))

    @classmethod
    def from_dict(cls, plain: Any, source: str = "a dict") -> "HeadSet":
        """The inverse of `to_dict`; raises GenAttnError as `load` does."""
        if not isinstance(plain, Mapping) or plain.get("format") != FORMAT:
            raise GenAttnError(f"a head set must have format {FORMAT!r}, got {source}; save it with HeadSet.save")
        if plain.get("version") != VERSION:
            raise GenAttnError(
                f"a head set must be of version {VERSION}, got {plain.get('version')!r} in {source}; "
                "use the genattn that wrote it, or hunt again"
            )
        known = {name: plain[name] for name in cls.__dataclass_fields__ if name in plain}
        try:
            known["heads"] = {parse_head(name): u for name, u in plain["heads"].items()}
            known["scores"] = {parse_head(name): score for name, score in plain.get("scores", {}).items()}
            known["layer_map"] = {int(layer): count for layer, count in plain["layer_map"].items()}
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise GenAttnError(f"a head set needs heads and layer_map, got {source} ({error}); save it again") from error
        with whole(f"the head set in {source}"):
            return cls(**known)


def _checked_layers(layers: object) -> dict[int, int]:
    """Heads per layer, sorted. Raises GenAttnError for anything else."""
    what = "heads per layer, {0: 24, 1: 24}, all of them whole numbers"
    if not isinstance(layers, Mapping):
        raise refuse("layer_map", layers, what)
    found = {
        whole_number("a layer of layer_map", layer, 0, what): whole_number(f"layer_map[{layer!r}]", heads, 1, what)
        for layer, heads in layers.items()
    }
    return dict(sorted(found.items()))
