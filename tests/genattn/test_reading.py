"""Files damaged at random places: refused with a line that names them, or read as what they were; never half of each."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged, scrambled
from safetensors.torch import save_file

from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.as_json import load_pattern, save_pattern
from genattn.patterns.combine import PerHead, Union
from genattn.patterns.dense import DensePattern
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern
from genattn.reading import DEFAULTS_FILE, read_defaults, read_json, read_object, whole
from genattn.seam.plugin_config import PluginConfig
from genattn.seam.schedule import Schedule
from genattn.selection.profile_map import (
    _TABLES,
    FORMAT,
    VALUES,
    VERSION,
    CellGrid,
    ProfileHeader,
    ProfileMap,
    read_map,
    write_map,
)


def test_json_of_any_editor_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"ä": 1}, ensure_ascii=False).encode())
    assert read_json(file, "a file") == {"ä": 1}
    for content in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, "ä".encode("latin-1")):
        file.write_bytes(content)
        with pytest.raises(GenAttnError, match="a file must be a readable JSON file"):
            read_json(file, "a file")
    with pytest.raises(GenAttnError, match="a file must be a readable JSON file"):
        read_json(tmp_path, "a file")


def test_defaults_of_a_model(tmp_path: Path) -> None:
    assert read_defaults(tmp_path) == {}
    file = tmp_path / DEFAULTS_FILE
    file.write_text('{"height": 64, "fps": null, "anything": []}')
    assert read_defaults(tmp_path) == {"height": 64, "fps": None, "anything": []}
    for name, value in (("height", 0), ("frames", 2.5), ("steps", True), ("fps", 0), ("width", "64"), ("guidance_scale", "x")):
        file.write_text(json.dumps({name: value}))
        with pytest.raises(GenAttnError, match=f"{name} in .* must be a .*; mend or remove the file"):
            read_defaults(tmp_path)
    file.write_text("[]")
    with pytest.raises(GenAttnError, match="the defaults of a model must hold a JSON object, got list"):
        read_object(file, "the defaults of a model")


def test_settings_that_are_no_object_are_refused(tmp_path: Path) -> None:
    for content, says in (("[]", "must hold an object, got list"), ("{", "must hold a readable genattn_config.json")):
        (tmp_path / "genattn_config.json").write_text(content)
        with pytest.raises(GenAttnError, match=says):
            PluginConfig.from_pretrained(tmp_path)
    with pytest.raises(GenAttnError, match="must hold a readable genattn_config.json"):
        PluginConfig.from_pretrained(tmp_path / "none")


def test_errors_of_values_name_what_is_read() -> None:
    with pytest.raises(GenAttnError, match=r"the set is damaged or was changed by hand \(KeyError: 'a'\)"), whole("the set"):
        {}["a"]
    with pytest.raises(GenAttnError, match="as it is"), whole("the set"):
        raise GenAttnError("as it is")
    with pytest.raises(RuntimeError, match="not ours"), whole("the set"):
        raise RuntimeError("not ours")


def _patterns(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    file = folder / "pattern.json"
    parts = (RadialPattern(decay=(0.2, 0.5)), NeighborhoodPattern((3, 5, 5), stride=(1, 2, 2)))
    save_pattern(PerHead((Union(DensePattern(), parts[1]), parts[0], AdaptivePattern()), (0, 1, 2)), file)
    return file, load_pattern


def _heads(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    file = folder / "heads.json"
    HeadSet({(1, 1): 0.5}, {0: 4, 1: 4}, model="M", scores={(1, 1): 2.0}).save(file)
    return file, HeadSet.load


def _plugins(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    from genattn.guidance.softpag.softpag import SoftPAG

    PluginConfig.of(RadialPattern(), SoftPAG("L1H1"), schedule=Schedule(dense_steps=0.3)).save_pretrained(folder)
    return folder / "genattn_config.json", lambda file: PluginConfig.from_pretrained(file.parent).plugins()


def _defaults(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    file = folder / DEFAULTS_FILE
    file.write_text('{"height": 64, "width": 64, "frames": 29, "steps": 12, "guidance_scale": 4.0, "fps": 16}')
    return file, lambda file: read_defaults(file.parent)


KINDS = {"pattern": _patterns, "head set": _heads, "plugins": _plugins, "defaults": _defaults}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_settings_are_refused_or_whole(kind: str, tmp_path: Path) -> None:
    file, load = KINDS[kind](tmp_path)
    load(file)
    stock, generator = json.loads(file.read_text()), random.Random(kind)
    refused = 0
    for _ in range(300):
        file.write_text(json.dumps(damaged(stock, generator)))
        try:
            load(file)
        except GenAttnError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("kind", KINDS)
def test_scrambled_files_are_refused_or_whole(kind: str, tmp_path: Path) -> None:
    file, load = KINDS[kind](tmp_path)
    content, generator = file.read_bytes(), random.Random(kind)
    refused = 0
    for _ in range(200):
        file.write_bytes(scrambled(content, generator))
        try:
            load(file)
        except GenAttnError:
            refused += 1
    assert refused > 50


def _map() -> ProfileMap:
    header = ProfileHeader("M", 1, 2, (2, 2, 3), (0.5, 1.0), 0.3, 4, (0.2, 1.0))
    first, cells = (1, 2, 2), CellGrid(*header.grid)
    tensors = {
        name: torch.rand(*first, *(cells.offset_shape if name.startswith("relative") else cells.shape)) for name in _TABLES
    }
    return ProfileMap(header, tensors | {f"error.{value}": torch.rand(*first, 2) for value in VALUES})


def test_damaged_maps_are_refused_or_whole(tmp_path: Path) -> None:
    file = write_map(_map(), tmp_path / "map.safetensors")
    assert read_map(file).header == _map().header
    content, generator = file.read_bytes(), random.Random("map")
    start = 8 + int.from_bytes(content[:8], "little")
    for turn in range(150):
        changed = bytearray(content)
        changed[generator.randrange(start)] = generator.randrange(256)
        if generator.random() < 0.3:
            changed = changed[: generator.randrange(len(changed))]
        place = tmp_path / f"{turn}.safetensors"
        place.write_bytes(changed)
        try:
            found = read_map(place)
        except GenAttnError:
            continue
        assert found.cells == CellGrid(*found.header.grid)
        assert 0 < found.header.target_density <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, "model must be a text"),
        ({"layers": 0}, "layers must be made of whole numbers >= 1, got 0"),
        ({"heads": True}, "heads must be made of whole numbers"),
        ({"grid": [2, 2]}, "grid must be made of whole numbers"),
        ({"grid": [2, 2, -3]}, "grid must be made of whole numbers"),
        ({"target_density": 2.0}, r"target_density must lie in \(0, 1\]"),
        ({"target_density": "x"}, "damaged header"),
        ({"bands": [0.5]}, "bands must rise to 1"),
        ({"bands": 1}, "bands must rise to 1"),
        ({"shares": [0.5, 0.2, 1.0]}, "shares must rise to 1"),
        ({"shares": [0.0, 1.0]}, "shares must be > 0"),
    ],
)
def test_headers_that_cannot_be(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    stock = _map()
    about = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(asdict(stock.header) | change)}
    save_file(stock.tensors, tmp_path / "map.safetensors", metadata=about)
    with pytest.raises(GenAttnError, match=message):
        read_map(tmp_path / "map.safetensors")
