"""Names of attention heads: `L11H15` is head 15 of layer 11, counted over all blocks in execution order.

    "L11H15,L13H17"        two heads
    "L11H15:0.3"           a head with its own interpolation weight u
    "L2H0-5"  "L7-9H3"     ranges, both ends included
    "L7"                   every head of a layer

The layer index is that of HeadHunter (arXiv 2506.10978): FLUX.1 counts its 19 double-stream blocks first, then its 38
single-stream blocks. A layer map, {layer: number of heads}, says which names a model has.
"""

import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

from genattn.errors import GenAttnError
from genattn.settings import number, refuse

Head = tuple[int, int]
LayerMap = Mapping[int, int]
HeadWeights = dict[Head, float]
HeadsLike = str | Iterable[Head] | Iterable[str] | Mapping[Head, float] | Mapping[str, float]

_RANGE = r"(\d+)(?:-(\d+))?"
_WRITTEN = "heads must be written like L11H15, L2H0-5, L7 or L11H15:0.3"
_NAME = re.compile(rf"L{_RANGE}(?:H(?:{_RANGE}|\*))?(?::([-+.\w]+))?", re.IGNORECASE)


def head_name(head: Head) -> str:
    """(11, 15) -> "L11H15"."""
    return f"L{head[0]}H{head[1]}"


def format_heads(heads: Iterable[Head] | Mapping[Head, float]) -> str:
    """Names in order, with `:u` where a mapping gives weights: what `resolve_heads` reads back."""
    if isinstance(heads, Mapping):
        return ",".join(f"{head_name(head)}:{float(heads[head])!r}" for head in sorted(heads))
    return ",".join(head_name(head) for head in sorted(heads))


def all_heads(layers: LayerMap) -> list[Head]:
    """Every head of a model, layer by layer."""
    return [(layer, head) for layer in sorted(layers) for head in range(layers[layer])]


def check_weight(name: str, value: float, low: float = 0.0, high: float = 1.0) -> float:
    """`value` as a float in [low, high].

    Raises:
        GenAttnError: if it is no finite number in the range.
    """
    return number(name, value, low, high, f"a number in [{low:g}, {high:g}]; choose one in that range")


def resolve_heads(heads: HeadsLike, layers: LayerMap, u: float = 1.0) -> HeadWeights:
    """The heads that a request names, each with its weight.

    Args:
        heads: a string as in the module's docstring, a list of such strings or of (layer, head) pairs, or a mapping from
            either to u.
        layers: heads per layer of the model.
        u: weight of the heads that have none of their own, in [0, 1].

    Returns:
        {(layer, head): u}, sorted.

    Example:
        >>> resolve_heads("L0H1:0.3,L1H0-1", {0: 4, 1: 4}, u=0.5)
        {(0, 1): 0.3, (1, 0): 0.5, (1, 1): 0.5}

    Raises:
        GenAttnError: for an empty selection, an unknown layer or head, a name that cannot be read, a weight outside [0, 1],
            or one head given two weights.
    """
    default = check_weight("u", u)
    found: HeadWeights = {}
    for name, weight in _items(heads):
        named, own = ([name], weight) if isinstance(name, tuple) else _parse(name, layers, weight)
        for head in named:
            _check_head(head, layers)
            value = default if own is None else check_weight(f"u of {head_name(head)}", own)
            if found.setdefault(head, value) != value:
                raise GenAttnError(
                    f"a head must have one u, got {found[head]:g} and {value:g} for {head_name(head)}; drop one of them"
                )
    if not found:
        raise GenAttnError(f"at least one head must be selected, got {heads!r}; name one, e.g. {_example(layers)}")
    return dict(sorted(found.items()))


def parse_head(name: str) -> Head:
    """ "L11H15" -> (11, 15).

    >>> parse_head("L11H15")
    (11, 15)

    Raises:
        GenAttnError: if the text names anything but one head.
    """
    match = re.fullmatch(r"L(\d+)H(\d+)", name.strip(), re.IGNORECASE)
    if match is None:
        raise GenAttnError(f"a head must be written like L11H15, got {name!r}; write layer and head")
    return int(match[1]), int(match[2])


def check_head_names(heads: HeadsLike) -> None:
    """Raise GenAttnError for a name or a weight that no model can have; a model's own heads are looked at when it is there."""
    for name, weight in _items(heads):
        if isinstance(name, str) and not _NAME.fullmatch(name):
            raise GenAttnError(f"{_WRITTEN}, got {name!r}")
        if weight is not None:
            check_weight(f"u of {name if isinstance(name, str) else head_name(name)}", weight)


def checked_heads(heads: HeadsLike) -> HeadsLike:
    """`heads` in a form that can be read again and again. Raises GenAttnError as `check_head_names` does."""
    kept: Any = heads if isinstance(heads, str | Mapping) else tuple(name for name, _ in _items(heads))
    check_head_names(kept)
    if not kept or (isinstance(kept, str) and not _items(kept)):
        raise GenAttnError(f"at least one head must be selected, got {heads!r}; name one, e.g. L0H0")
    read_again: HeadsLike = kept
    return read_again


def plain_heads(heads: HeadsLike) -> str | list[str] | dict[str, float]:
    """A request for heads, JSON-ready and readable again: (layer, head) pairs are written as names."""
    if isinstance(heads, str):
        return heads
    if isinstance(heads, Mapping):
        return {name if isinstance(name, str) else head_name(name): float(u) for name, u in heads.items()}
    return [name if isinstance(name, str) else head_name(name) for name in heads]


def describe_layers(layers: LayerMap) -> str:
    """ "L0-23 with heads H0-23 each", for messages."""
    if not layers:
        return "no layers"
    counts = sorted(set(layers.values()))
    heads = f"heads H0-{counts[0] - 1} each" if len(counts) == 1 else f"H0-{counts[0] - 1} to H0-{counts[-1] - 1}"
    ordered = sorted(layers)
    gapless = ordered == list(range(ordered[0], ordered[-1] + 1))
    names = f"L{ordered[0]}-{ordered[-1]}" if gapless else ",".join(f"L{layer}" for layer in ordered)
    return f"{names} with {heads}"


def _items(heads: HeadsLike) -> list[tuple[str | Head, float | None]]:
    if isinstance(heads, str):
        return [(part.strip(), None) for part in heads.split(",") if part.strip()]
    if isinstance(heads, Mapping):
        return [(_key(name), weight) for name, weight in heads.items()]
    wrong = refuse("heads", heads, "names or (layer, head) pairs; write e.g. 'L11H15,L13H17'")
    if not isinstance(heads, Iterable):
        raise wrong
    try:
        return [(_key(name), None) for name in heads]
    except TypeError:  # a tensor or an array without axes
        raise wrong from None


def _key(name: object) -> str | Head:
    if isinstance(name, str):
        return name.strip()
    if isinstance(name, tuple | list) and len(name) == 2 and all(_is_index(n) for n in name):
        return int(name[0]), int(name[1])
    raise GenAttnError(f"a head must be a name like L11H15 or a (layer, head) pair, got {name!r}; write it so")


def _is_index(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _parse(name: str, layers: LayerMap, weight: float | None) -> tuple[list[Head], float | None]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise GenAttnError(f"{_WRITTEN}, got {name!r}; this model has {describe_layers(layers)}")
    first, last, low, high, own = match.groups()
    chosen = range(int(first), int(last or first) + 1)
    pairs = []
    for layer in chosen:
        _check_layer(layer, layers)
        if low is not None and int(low) <= int(high or low):
            _check_head(
                (layer, max(int(low), min(int(high or low), layers[layer]))), layers
            )  # before a list is made of a mistyped million
        heads = range(layers[layer]) if low is None else range(int(low), int(high or low) + 1)
        pairs += [(layer, head) for head in heads]
    if not pairs:
        raise GenAttnError(f"a range must run upwards, got {name!r}; write the smaller index first")
    return pairs, _number(name, own) if own is not None else weight


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise GenAttnError(f"the weight after ':' must be a number in [0, 1], got {name!r}; write e.g. L11H15:0.5") from error


def _check_layer(layer: int, layers: LayerMap) -> None:
    if layer not in layers:
        raise GenAttnError(f"layer must be one of this model's, got L{layer}; it has {describe_layers(layers)}")


def _check_head(head: Head, layers: LayerMap) -> None:
    _check_layer(head[0], layers)
    if not 0 <= head[1] < layers[head[0]]:
        raise GenAttnError(f"layer {head[0]} has heads H0-{layers[head[0]] - 1}, got {head_name(head)}; choose one of those")


def _example(layers: LayerMap) -> str:
    return head_name((min(layers), 0)) if layers else "L0H0"
