"""Files damaged at random places."""

import json
import random
from typing import Any

STRANGE = [
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    10**30,
    "",
    "x",
    "ä",
    [],
    [[]],
    {},
    {"type": "x"},
    {"type": []},
    ["a", 1],
    {"a": {"b": None}},
]


def damaged(value: Any, generator: random.Random) -> Any:
    """A JSON value with one place replaced, left out or doubled."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    copy = json.loads(json.dumps(value))
    walk(copy)
    node, key = generator.choice(places)
    how = generator.random()
    if how < 0.2:
        del node[key]
    elif how < 0.3 and isinstance(node, dict):
        node["unknown"] = node.pop(key)
    else:
        node[key] = generator.choice(STRANGE)
    return copy


def scrambled(content: bytes, generator: random.Random) -> bytes:
    """Bytes cut short, or with a few of them changed."""
    if generator.random() < 0.3:
        return content[: generator.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        changed[generator.randrange(len(changed))] = generator.randrange(256)
    return bytes(changed)
