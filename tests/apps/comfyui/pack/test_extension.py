"""What the pack gives to ComfyUI, where none is: every field reaches the schema, answers reach what a node shows."""

import asyncio
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from genattn.apps.comfyui.nodes import node_specs
from genattn.apps.comfyui.schema import Answer, Field, NodeSpec, Out

NAMED = ("Model", "Latent", "Conditioning", "Sampler", "Image", "Video", "Int", "Float", "Boolean", "String", "Combo")


class Kind:
    """A type of sockets that writes down what it is asked for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def Input(self, id: str, **given: Any) -> tuple[Any, ...]:
        return "in", self.name, id, given

    def Output(self, id: str, **given: Any) -> tuple[Any, ...]:
        return "out", self.name, id, given


@dataclass
class OldSchema:
    """Of versions without search names."""

    node_id: str
    display_name: str
    category: str
    description: str
    inputs: list[Any]
    outputs: list[Any]
    is_output_node: bool = False


@dataclass
class Schema(OldSchema):
    search_aliases: list[str] = field(default_factory=list)


class NodeOutput:
    def __init__(self, *values: Any, ui: Any = None) -> None:
        self.values, self.ui = values, ui


def load(monkeypatch: pytest.MonkeyPatch, schema: type) -> Any:
    io = SimpleNamespace(
        Schema=schema, NodeOutput=NodeOutput, ComfyNode=object, Custom=lambda name: Kind(f"custom {name}"),
        **{name: Kind(name) for name in NAMED},
    )  # fmt: skip
    shown = SimpleNamespace(PreviewImage=lambda image, cls: ("image", image, cls), PreviewText=lambda text: ("text", text))
    latest = ModuleType("comfy_api.latest")
    vars(latest).update(io=io, ui=shown, ComfyExtension=object)
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    monkeypatch.delitem(sys.modules, "genattn.apps.comfyui.extension", raising=False)
    return importlib.import_module("genattn.apps.comfyui.extension")


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield load(monkeypatch, Schema)
    sys.modules.pop("genattn.apps.comfyui.extension", None)


def spec(*inputs: Field, outputs: tuple[Out, ...] = (), **more: Any) -> NodeSpec:
    more = {"run": lambda **given: tuple(given.values()), **more}
    return NodeSpec("Id", "Title", "genattn/x", "What it does.", ("one", "two"), inputs, outputs, **more)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (Field("m", "MODEL", "tip"), ("Model", {"optional": False})),
        (Field("m", "LATENT", "tip", optional=True), ("Latent", {"optional": True})),
        (Field("m", "CONDITIONING", "tip"), ("Conditioning", {"optional": False})),
        (Field("m", "SAMPLER", "tip"), ("Sampler", {"optional": False})),
        (Field("m", "IMAGE", "tip"), ("Image", {"optional": False})),
        (Field("m", "VIDEO", "tip"), ("Video", {"optional": False})),
        (Field("m", "GENATTN_PIPE", "tip"), ("custom GENATTN_PIPE", {"optional": False})),
        (
            Field("n", "INT", "tip", 3, 1, 9, 2),
            ("Int", {"optional": False, "default": 3, "min": 1, "max": 9, "step": 2}),
        ),
        (
            Field("n", "INT", "tip", 0, 0, 9, 1, seed=True),
            ("Int", {"optional": False, "default": 0, "min": 0, "max": 9, "step": 1, "control_after_generate": True}),
        ),
        (
            Field("n", "FLOAT", "tip", 0.5, 0.0, 1.0, 0.1, optional=True),
            ("Float", {"optional": True, "default": 0.5, "min": 0.0, "max": 1.0, "step": 0.1}),
        ),
        (Field("n", "BOOLEAN", "tip", True), ("Boolean", {"optional": False, "default": True})),
        (Field("n", "STRING", "tip", "a"), ("String", {"optional": False, "default": "a", "multiline": False})),
        (Field("n", "STRING", "tip", "", multiline=True), ("String", {"optional": False, "default": "", "multiline": True})),
        (
            Field("n", "COMBO", "tip", "b", options=("a", "b")),
            ("Combo", {"optional": False, "default": "b", "options": ["a", "b"]}),
        ),
    ],
)
def test_a_field_becomes_the_socket_or_widget_it_says(extension: Any, given: Field, wanted: tuple[str, dict[str, Any]]) -> None:
    (found,) = extension.schema_of(spec(given)).inputs
    assert found == ("in", wanted[0], given.id, {"tooltip": "tip", **wanted[1]})


def test_a_node_has_its_words_and_outputs(extension: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = spec(outputs=(Out("video", "VIDEO", "the film"), Out("heads", "GENATTN_HEADS", "which")), is_output=True)
    outputs = [
        ("out", "Video", "video", {"display_name": "video", "tooltip": "the film"}),
        ("out", "custom GENATTN_HEADS", "heads", {"display_name": "heads", "tooltip": "which"}),
    ]
    wanted = Schema("Id", "Title", "genattn/x", "What it does.", [], outputs, True, ["one", "two"])
    assert extension.schema_of(given) == wanted
    assert not extension.schema_of(spec()).is_output_node
    old = load(monkeypatch, OldSchema).schema_of(given)
    assert old == OldSchema("Id", "Title", "genattn/x", "What it does. Search: one, two.", [], outputs, True)


def test_answers_reach_the_outputs_and_what_the_node_shows(extension: Any) -> None:
    def shown(answer: Any) -> tuple[Any, Any, type]:
        made = extension.node_class(spec(run=lambda **given: answer))
        found = made.execute()
        return found.values, found.ui, made

    assert shown((1, 2))[:2] == ((1, 2), None)
    assert shown(Answer((1,)))[:2] == ((1,), None)
    assert shown(Answer((1,), "told"))[:2] == ((1,), ("text", "told"))
    values, ui, made = shown(Answer((), "told", "picture"))
    assert (values, ui) == ((), ("image", "picture", made))
    echo = extension.node_class(spec(Field("a", "MODEL", ""), Field("b", "MODEL", "")))
    assert echo.execute(b=2, a=1).values == (2, 1)
    assert echo.define_schema().node_id == echo.__name__ == "Id"


def test_a_node_runs_again_when_a_file_that_it_reads_has_changed(extension: Any, tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    path.write_text("a")
    made = extension.node_class(spec(reads=("map", "model")))
    before = made.fingerprint_inputs(map=str(path), model=None, other=1)
    assert before == made.fingerprint_inputs(map=str(path), other=2)
    assert before.endswith("; ")
    path.write_text("another one")
    assert made.fingerprint_inputs(map=str(path)) != before
    assert made.fingerprint_inputs(map="", model="hub/id") == "; hub/id"
    plain = extension.node_class(spec())
    assert not hasattr(plain, "fingerprint_inputs")
    assert not hasattr(plain, "validate_inputs")


def test_a_workflow_is_checked_by_the_node(extension: Any) -> None:
    made = extension.node_class(spec(check=lambda cls, width: width > 3 or f"{cls.__name__}: too narrow"))
    assert made.validate_inputs(width=4) is True
    assert made.validate_inputs(width=3) == "Id: too narrow"


def test_all_nodes_are_given_to_comfyui(extension: Any) -> None:
    found = asyncio.run(asyncio.run(extension.comfy_entrypoint()).get_node_list())
    assert [made.__name__ for made in found] == [each.id for each in node_specs()]
    for made, each in zip(found, node_specs()):
        schema = made.define_schema()
        assert [name for _, _, name, _ in schema.inputs] == [one.id for one in each.inputs]
        assert [name for _, _, name, _ in schema.outputs] == [out.id for out in each.outputs]
        assert all(given["tooltip"] for *_, given in (*schema.inputs, *schema.outputs))
