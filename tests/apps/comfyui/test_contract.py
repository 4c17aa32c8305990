"""The ComfyUI nodes as data: what can be held of them where no ComfyUI is. `test_comfy_live` runs them in a real one."""

import ast
import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, strategies as st
from typer.testing import CliRunner

from genattn.apps.cli.root import app
from genattn.apps.comfyui.fields import check_sparse
from genattn.apps.comfyui.help import page, write_pages
from genattn.apps.comfyui.install import install, installed_for, pack_folder, remove
from genattn.apps.comfyui.model_nodes import check_head_set
from genattn.apps.comfyui.nodes import node_specs
from genattn.apps.comfyui.pipe_nodes import check_sizes
from genattn.apps.comfyui.schema import Field, NodeSpec
from genattn.apps.comfyui.settings import blocks_of, guidance_of, pattern_of, schedule_of, sigma_bounds, sparse_of
from genattn.apps.comfyui.workflows import node_definitions, to_workflow, write_workflows
from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.patterns.dense import DensePattern
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern
from genattn.planning.fitted import FittedNeighborhood
from genattn.planning.ladder import Model
from genattn.seam.schedule import Schedule
from genattn.seam.settings_file import save_settings
from genattn.seam.sparse_plugin import SparsePlugin

SPECS = {spec.id: spec for spec in node_specs()}
PACK = pack_folder()
API = sorted((PACK / "api").glob("*.json"))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_node_is_whole(spec: NodeSpec) -> None:
    assert spec.id.startswith("GenAttn_")
    assert spec.category.startswith("GenAttn/")
    assert spec.title.endswith("(GenAttn)")
    assert len(spec.description) > 30
    assert len(spec.search) >= 3
    names = [field.id for field in spec.inputs]
    assert len(set(names)) == len(names)
    assert not {out.id for out in spec.outputs} & set(names), "ComfyUI wants inputs and outputs of different names"
    for field in spec.inputs:
        assert len(field.tooltip) > 5
        if field.is_widget:
            assert field.default is not None
        if field.type in ("INT", "FLOAT"):
            assert field.low is not None
            assert field.high is not None
            assert field.low <= field.default <= field.high
            assert field.step


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_function_takes_the_inputs_and_the_check_some_of_them(spec: NodeSpec) -> None:
    parameters = inspect.signature(spec.run).parameters
    names = {field.id for field in spec.inputs}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert named <= names
    assert open_ended or named == names
    for field in spec.inputs:
        if field.optional:
            assert open_ended or parameters[field.id].default is None
    if spec.check is not None:
        first, *rest = inspect.signature(spec.check).parameters
        assert first == "cls"
        assert set(rest) <= names


def test_widgets_have_one_meaning_everywhere() -> None:
    seen: dict[str, Field] = {}
    for spec in SPECS.values():
        for field in spec.inputs:
            if field.id in ("pattern", "dense_blocks", "heads", "u", "scale", "seed", "height", "steps"):
                assert seen.setdefault(field.id, field) == field


def test_a_field_of_no_known_type_is_refused() -> None:
    with pytest.raises(GenAttnError, match="type must be one of"):
        Field("x", "TENSOR", "nothing")
    with pytest.raises(GenAttnError, match="default must be one of"):
        Field("x", "COMBO", "nothing", "c", options=("a", "b"))


def test_help_pages_are_those_of_the_definitions(tmp_path: Path) -> None:
    written = write_pages(tmp_path)
    assert {path.stem for path in written} == set(SPECS)
    for path in written:
        assert path.read_text() == (PACK / "web" / "docs" / path.name).read_text(), "run `genattn comfyui help-pages`"
    assert "| heads |" in page(SPECS["GenAttn_Guidance"])


@pytest.mark.parametrize("file", API, ids=lambda file: file.stem)
def test_example_graphs_use_the_nodes_as_they_are(file: Path) -> None:
    graph = json.loads(file.read_text())
    for node in graph.values():
        spec = SPECS.get(node["class_type"])
        if spec is None:
            continue
        fields = {field.id: field for field in spec.inputs}
        assert {name for name, field in fields.items() if not field.optional} <= set(node["inputs"]) <= set(fields)
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source = SPECS.get(graph[value[0]]["class_type"])
                assert source is None or source.outputs[value[1]].type == fields[name].type
            elif fields[name].type == "COMBO":
                assert value in fields[name].options
            elif fields[name].type in ("INT", "FLOAT"):
                assert fields[name].low <= value <= fields[name].high


@pytest.mark.parametrize("file", API, ids=lambda file: file.stem)
def test_example_workflows_are_the_graphs(file: Path) -> None:
    graph = json.loads(file.read_text())
    flow = json.loads((PACK / "example_workflows" / file.name).read_text())
    assert sorted(node["type"] for node in flow["nodes"]) == sorted(node["class_type"] for node in graph.values())
    links = sum(isinstance(value, list) for node in graph.values() for value in node["inputs"].values())
    assert len(flow["links"]) == links
    for node in flow["nodes"]:
        spec = SPECS.get(node["type"])
        if spec is not None:
            expected = sum(1 + field.seed for field in spec.inputs if field.is_widget)
            assert len(node["widgets_values"]) == expected
            assert [out["type"] for out in node["outputs"]] == [out.type for out in spec.outputs]
    assert {SPECS[s].id for s in SPECS} >= {n["type"] for n in flow["nodes"] if n["type"].startswith("GenAttn_")}


def test_every_node_is_in_an_example() -> None:
    used = {node["class_type"] for file in API for node in json.loads(file.read_text()).values()}
    assert set(SPECS) <= used


def test_a_workflow_from_a_graph() -> None:
    graph = {
        "a": {"class_type": "Sink", "inputs": {"x": ["b", 1], "steps": 3, "mode": "fast"}},
        "b": {"class_type": "Source", "inputs": {"seed": 7}},
    }
    definitions = {
        "Source": {
            "input": {"required": {"seed": ["INT", {"default": 0, "control_after_generate": True}]}},
            "output": ["MODEL", "LATENT"],
            "output_name": ["m", "l"],
        },
        "Sink": {
            "input": {"required": {"x": ["LATENT"], "steps": ["INT", {"default": 1}], "mode": [["slow", "fast"]]}},
            "output": [],
            "output_name": [],
        },
    }
    flow = to_workflow(graph, definitions, "two")
    source, sink = flow["nodes"]
    assert source["widgets_values"] == [7, "fixed"]
    assert sink["widgets_values"] == [3, "fast"]
    assert flow["links"] == [[1, source["id"], 1, sink["id"], 0, "LATENT"]]
    assert source["outputs"][1]["links"] == [1]
    assert sink["inputs"][0]["link"] == 1
    assert sink["pos"][0] > source["pos"][0]
    assert flow == to_workflow(graph, definitions, "two")
    with pytest.raises(GenAttnError, match="has no input speed"):
        to_workflow({"b": {"class_type": "Source", "inputs": {"seed": 1, "speed": 2}}}, definitions, "wrong")
    with pytest.raises(GenAttnError, match="no cycle"):
        to_workflow({"a": {"class_type": "Sink", "inputs": {"x": ["a", 0]}}}, definitions, "cycle")


def test_workflows_need_a_comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GenAttnError, match="must be a running ComfyUI"):
        write_workflows("http://127.0.0.1:9", PACK / "api", tmp_path)
    import io
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **more: io.BytesIO(b"{}"))
    with pytest.raises(GenAttnError, match="has no node Nobody"):
        node_definitions("http://127.0.0.1:9", {"1": {"class_type": "Nobody", "inputs": {}}})


# ---- from widgets to settings


def test_patterns_from_widgets() -> None:
    assert pattern_of("radial", 0.3, "", "", "") == RadialPattern(decay=0.3)
    assert pattern_of("radial", 0.0, "", "", '{"sink": false}') == RadialPattern(sink=False)
    assert pattern_of("neighborhood", 0.0, "3,4,4", "1", "") == NeighborhoodPattern((3, 4, 4), 1)
    assert pattern_of("neighborhood", 0.0, "5", "1,2,2", '{"dilation": 2}') == NeighborhoodPattern(5, (1, 2, 2), 2)
    assert pattern_of("dense", 0.0, "", "", "") == DensePattern()
    assert pattern_of("dense", 0.2, "3", "1", '{"tail": null}', tail="mean") == DensePattern(), "a switch to compare with"


KNOWN = Model("WanTransformer3DModel", 12, 30, 128, (), "cpu", "cpu")
WIDGETS = {
    "pattern": "radial", "decay": 0.0, "window": "5,12,12", "stride": "1", "pattern_options": "", "impl": "auto",
    "dense_steps": 0.25, "dense_blocks": "0",
}  # fmt: skip


def test_later_widgets_have_the_meaning_that_they_had_before_they_came() -> None:
    old, new = sparse_of(KNOWN, **WIDGETS), sparse_of(KNOWN, **WIDGETS, path="", tail="auto", min_tokens=-1)
    assert (old.pattern, old.schedule) == (new.pattern, new.schedule)
    assert old.schedule.min_tokens == 256, "measured on the CPU for half of the scores"
    assert sparse_of(KNOWN, **WIDGETS, min_tokens=0).schedule.min_tokens == 0
    assert sparse_of(KNOWN, **WIDGETS, tail="none").pattern == RadialPattern(tail=None)
    assert sparse_of(KNOWN, **WIDGETS, tail="mean").pattern == RadialPattern(tail="mean")


def test_names_that_the_model_is_asked_about() -> None:
    auto = sparse_of(KNOWN, **{**WIDGETS, "pattern": "auto"})
    assert auto.pattern == RadialPattern(decay=0.2)
    assert "wan-1.3b" in auto.origin
    windows = sparse_of(KNOWN, **{**WIDGETS, "pattern": "gna"}, tail="none").pattern
    assert windows == FittedNeighborhood(0.4, tail=None)
    assert sparse_of(KNOWN, **{**WIDGETS, "pattern": "adaptive"}).schedule.min_tokens == 2048
    with pytest.raises(GenAttnError, match="belong to a pattern that is named"):
        sparse_of(KNOWN, **{**WIDGETS, "pattern": "auto", "pattern_options": '{"decay": 1}'})
    with pytest.raises(GenAttnError, match="tail must be one of auto, none"):
        pattern_of("radial", 0.0, "", "", "", tail="half")
    with pytest.raises(GenAttnError, match="needs the file of a map"):
        pattern_of("profile", 0.0, "", "", "")
    assert isinstance(check_sparse(object, "0", "profile", 0.0, "", "", "", "/nowhere.safetensors"), str)


def test_a_settings_file_says_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    saved = SparsePlugin(RadialPattern(decay=0.3), Schedule(dense_steps=2, dense_layers=3))
    save_settings(file, [saved])
    found = sparse_of(KNOWN, **{**WIDGETS, "pattern": "settings"}, path=str(file))
    assert (found.pattern, found.schedule, found.impl) == (saved.pattern, saved.schedule, WIDGETS["impl"])
    assert found.known_as == KNOWN.name
    with pytest.raises(GenAttnError, match="path must name a settings file of `genattn tune`, got nothing"):
        sparse_of(KNOWN, **{**WIDGETS, "pattern": "settings"})
    with pytest.raises(GenAttnError, match="a settings file must be a readable JSON file"):
        pattern_of("settings", 0, "", "", "", str(tmp_path / "none.json"))


def test_shares_of_the_sampling() -> None:
    schedule = schedule_of(0.1, "", 4, start_percent=0.3, end_percent=0.9)
    assert (schedule.dense_steps, schedule.dense_last_steps) == (0.3, 0.1)
    assert schedule_of(3.0, "", 4, end_percent=1.0).dense_last_steps == 0
    with pytest.raises(GenAttnError, match="must not be above end_percent"):
        schedule_of(0.1, "", 4, start_percent=0.9, end_percent=0.3)


@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "previous").glob("[!a]*.json")), ids=lambda f: f.stem)
def test_workflows_of_the_previous_version_load(file: Path) -> None:
    """The page hands out saved values by place, so old widgets must keep theirs; what came later takes its default."""
    for node in json.loads(file.read_text())["nodes"]:
        spec = SPECS.get(node["type"])
        if spec is None:
            continue
        widgets = [field for field in spec.inputs if field.is_widget for _ in range(1 + field.seed)]
        saved, later = node["widgets_values"], widgets[len(node["widgets_values"]) :]
        assert len(saved) <= len(widgets)
        assert all(field.optional for field in later), "an optional one may be missing in a saved graph"
        for field, value in zip(widgets, saved):
            if field.type == "COMBO":
                assert value in field.options
            elif field.type in ("INT", "FLOAT") and not field.seed:
                assert field.low <= value <= field.high
        # a socket that was there keeps its name and type
        sockets = {field.id: field.type for field in spec.inputs}
        assert all(sockets[socket["name"]] == socket["type"] for socket in node["inputs"] if socket["name"] in sockets)


@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "previous").glob("api_*.json")), ids=lambda f: f.stem)
def test_graphs_of_the_previous_version_have_all_that_is_required(file: Path) -> None:
    for node in json.loads(file.read_text()).values():
        spec = SPECS.get(node["class_type"])
        if spec is not None:
            required = {field.id for field in spec.inputs if not field.optional}
            assert required <= set(node["inputs"]) <= {field.id for field in spec.inputs}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("neighborhood", 0.0, "a,b", "1", ""), "window must be tokens per axis"),
        (("neighborhood", 0.0, "1,2,3,4", "1", ""), "window must be tokens per axis"),
        (("radial", 0.0, "", "", "{"), "must be a JSON object"),
        (("radial", 0.0, "", "", "[1]"), "must be a JSON object"),
        (("spiral", 0.0, "", "", ""), "must be one of"),
    ],
)
def test_wrong_widgets_are_refused(given: Any, reason: str) -> None:
    with pytest.raises(GenAttnError, match=reason):
        pattern_of(*given)
    name, decay, window, stride, options = given
    told = check_sparse(object, "0", name, decay, window, stride, options)
    assert isinstance(told, str)


def test_right_widgets_pass_the_check() -> None:
    assert check_sparse(object, "0-2,-1", "radial", 0.0, "5", "1", "") is True
    assert check_sparse(object, "0", "profile", 0.0, "5", "1", "", path=None) is True, (
        "a linked path comes when the map is made"
    )
    assert isinstance(check_sparse(object, "0", "profile", 0.0, "5", "1", "", path=""), str)
    assert isinstance(check_sparse(object, "x", "profile", 0.0, "5", "1", "", path=None), str)
    assert check_sizes(object, 480, 832) is True
    assert "multiple of 8" in str(check_sizes(object, 481, 832))
    assert "readable JSON" in str(check_head_set(object, "/nowhere.json"))


@given(blocks=st.integers(1, 60), data=st.data())
def test_blocks_from_text(blocks: int, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.integers(0, blocks - 1)))
    text = ",".join(str(n if data.draw(st.booleans()) else n - blocks) for n in chosen)
    assert blocks_of(text, blocks) == tuple(sorted(chosen))
    assert blocks_of(f"0-{blocks - 1}", blocks) == tuple(range(blocks))


@pytest.mark.parametrize("text", ["x", "3-", "7", "-6", "2-1", "0;1"])
def test_blocks_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(GenAttnError, match="blocks must"):
        blocks_of(text, 5)


def test_schedules_from_widgets() -> None:
    assert schedule_of(0.25, "0,-1", 4).dense_layers == (0, 3)
    assert schedule_of(3.0, "", 4).dense_steps == 3
    assert schedule_of(0.5, "", 4).sigma is None
    assert schedule_of(0.5, "", 4, 0.8, 0.2).sigma == (0.2, 0.8)
    assert sigma_bounds(1.0, 0.0) == {"sigma_start": None, "sigma_stop": None}
    assert sigma_bounds(0.9, 0.1) == {"sigma_start": 0.9, "sigma_stop": 0.1}


def test_guidance_from_widgets() -> None:
    assert guidance_of("softpag", "L1H0", 0.3, 2.0, target="uniform").target == "uniform"
    pag, seg = guidance_of("pag", "L1", 0.3, 2.0, target="zero"), guidance_of("seg", "L1", 0.3, 2.0)
    assert (pag.u, pag.target) == (1.0, "identity")
    assert (seg.u, seg.target) == (1.0, "mean_query")
    found = HeadSet.from_names("L1H0", {0: 2, 1: 2})
    assert guidance_of("softpag", "", 0.3, 2.0, found).heads is found
    with pytest.raises(GenAttnError, match="belongs to softpag"):
        guidance_of("pag", "L1", 0.3, 2.0, found)
    with pytest.raises(GenAttnError, match="method must be one of"):
        guidance_of("cfg", "L1", 0.3, 2.0)
    assert math.isclose(guidance_of("softpag", "L1", 0.3, 2.0).rule.scale, 2.0)


# ---- the pack


def test_the_pack_is_what_comfyui_and_its_registry_read() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML by itself")
    told = tomllib.loads((PACK / "pyproject.toml").read_text())
    ours = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
    assert told["project"]["name"] == ours["name"]
    assert told["project"]["version"] == ours["version"]
    assert told["tool"]["comfy"]["PublisherId"]
    assert told["tool"]["comfy"]["DisplayName"] == "GenAttn"
    entry = ast.parse((PACK / "__init__.py").read_text())
    names = {t.id for node in entry.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)}
    assert "NODE_CLASS_MAPPINGS" not in names, "with it ComfyUI would never ask for the V3 nodes"
    assert "WEB_DIRECTORY" in names


def test_install_and_remove(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="is not a ComfyUI"):
        install(tmp_path)
    nodes = tmp_path / "custom_nodes"
    nodes.mkdir()
    assert not remove(tmp_path)
    place = install(tmp_path)
    assert place == nodes / "genattn"
    assert (place / "web" / "docs" / "GenAttn_Report.md").is_file()
    assert (place / "example_workflows").is_dir()
    assert install(nodes, link=True).is_symlink()
    assert remove(tmp_path)
    assert not place.exists()
    assert PACK.is_dir()
    place.mkdir()
    (place / "__init__.py").write_text("somebody's")
    with pytest.raises(GenAttnError, match="is not this pack"):
        install(tmp_path)
    (place / "__init__.py").unlink()
    place.rmdir()
    place.symlink_to(tmp_path)
    with pytest.raises(GenAttnError, match="is a link to"):
        remove(tmp_path)


def test_an_installation_without_the_pack_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("genattn.__path__", [str(tmp_path)])
    with pytest.raises(GenAttnError, match="no ComfyUI node pack"):
        pack_folder()


def test_another_python_is_pointed_out(tmp_path: Path) -> None:
    assert installed_for(tmp_path) == ""
    (tmp_path / "venv").mkdir()
    assert "Python of its own" in installed_for(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "custom_nodes").mkdir()
    call = CliRunner().invoke
    told = json.loads(call(app, ["comfyui", "install", str(tmp_path), "--json"]).stdout)
    assert Path(told["installed"]).is_dir()
    assert "restart ComfyUI" in call(app, ["comfyui", "install", str(tmp_path)]).stdout
    assert json.loads(call(app, ["comfyui", "remove", str(tmp_path), "--json"]).stdout) == {"removed": True}
    assert "nothing to remove" in call(app, ["comfyui", "remove", str(tmp_path)]).stdout
    written = json.loads(call(app, ["comfyui", "help-pages", "--out", str(tmp_path / "docs"), "--json"]).stdout)["files"]
    assert len(written) == len(SPECS)
    refused = call(app, ["comfyui", "workflows", "--url", "http://127.0.0.1:9", "--out", str(tmp_path / "flows")])
    assert isinstance(refused.exception, GenAttnError)


def test_pipes_are_checked_before_they_sample() -> None:
    from genattn.apps.comfyui.pipes import Pipe, sample

    class Painter:
        def __call__(self, prompt: str, height: int = 8) -> None: ...

    holder = Pipe(SimpleNamespace(__call__=None))
    with pytest.raises(GenAttnError, match="must be a pipeline"):
        holder.with_plugins(guidance_of("pag", "L0", 0.5, 1.0))
    with pytest.raises(GenAttnError, match="Sample Image"):
        sample(Pipe(Painter()), "x", "", 0, video=True)
