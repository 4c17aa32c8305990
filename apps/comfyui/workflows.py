"""ComfyUI workflows from API graphs: what the page needs beside the graph itself (places, sockets, links, widget order).

    {"3": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "steps": 20, ...}}, ...}      ->      a .json for the page

The example workflows are written by `genattn comfyui workflows` from the graphs in the pack's `api` folder, with the node
definitions of a running ComfyUI, so they cannot say anything that ComfyUI would not accept.
"""

import json
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError
from genattn.whole_file import write_whole

Graph = Mapping[str, Mapping[str, Any]]
_WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")
_COLUMN, _ROW, _LINE = 340, 60, 24


def node_definitions(url: str, graph: Graph) -> dict[str, Any]:
    """ComfyUI's own word on every node of a graph; raises GenAttnError when it cannot be asked or does not know one."""
    found: dict[str, Any] = {}
    for kind in sorted({node["class_type"] for node in graph.values()}):
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/object_info/{kind}", timeout=30) as answer:
                found |= json.loads(answer.read())
        except (urllib.error.URLError, ValueError) as error:
            raise GenAttnError(f"{url} must be a running ComfyUI, got {error} when asked for {kind}; start it") from None
        if kind not in found:
            raise GenAttnError(f"the ComfyUI at {url} has no node {kind}; install what it belongs to, or update ComfyUI")
    return found


def write_workflows(url: str, source: Path, target: Path) -> list[Path]:
    """One workflow per API graph in `source`, written to `target`."""
    written = []
    for file in sorted(source.glob("*.json")):
        graph = json.loads(file.read_text(encoding="utf-8"))
        place = target / file.name
        workflow = to_workflow(graph, node_definitions(url, graph), file.stem)
        write_whole(place, json.dumps(workflow, indent=1) + "\n")
        written.append(place)
    return written


def to_workflow(graph: Graph, definitions: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The page's form of an API graph. definitions: as ComfyUI's /object_info gives them; name: makes its id."""
    numbers = {key: place + 1 for place, key in enumerate(_in_order(graph))}
    nodes = {key: _node(numbers[key], graph[key], definitions[graph[key]["class_type"]]) for key in numbers}
    links: list[list[Any]] = []
    for key in numbers:
        for slot, socket in enumerate(nodes[key]["inputs"]):
            source = graph[key]["inputs"].get(socket["name"])
            if isinstance(source, list):
                output = nodes[source[0]]["outputs"][source[1]]
                link = [len(links) + 1, numbers[source[0]], source[1], numbers[key], slot, output["type"]]
                links.append(link)
                socket["link"] = link[0]
                output["links"].append(link[0])
    _place(graph, nodes)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"genattn/{name}")),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _in_order(graph: Graph) -> list[str]:
    """Every node after those that it reads from."""
    order: list[str] = []
    waiting = list(graph)
    while waiting:
        ready = [key for key in waiting if all(source in order for source in _sources(graph[key]))]
        if not ready:
            raise GenAttnError(f"a graph must have no cycle and no missing node, got both or one at {', '.join(waiting)}")
        order += ready
        waiting = [key for key in waiting if key not in ready]
    return order


def _sources(node: Mapping[str, Any]) -> list[str]:
    return [value[0] for value in node["inputs"].values() if isinstance(value, list)]


def _node(number: int, node: Mapping[str, Any], definition: Mapping[str, Any]) -> dict[str, Any]:
    sockets: list[dict[str, Any]] = []
    values: list[Any] = []
    known = {**definition["input"].get("required", {}), **definition["input"].get("optional", {})}
    unknown = sorted(set(node["inputs"]) - set(known))
    if unknown:
        raise GenAttnError(f"{node['class_type']} has no input {', '.join(unknown)}; it has {', '.join(known)}")
    for name, told in known.items():
        kind, options = told[0], told[1] if len(told) > 1 else {}
        combo = isinstance(kind, list)
        given = node["inputs"].get(name)
        widget = (combo or kind in _WIDGETS) and not options.get("forceInput")
        if widget:
            first = (kind if combo else options.get("options", [None]))[:1]
            values.append(options.get("default", *first) if isinstance(given, list) or given is None else given)
            if options.get("control_after_generate"):
                values.append("fixed")
        if not widget or isinstance(given, list):
            socket = {"name": name, "type": "COMBO" if combo else kind, "link": None}
            sockets.append({**socket, "widget": {"name": name}} if widget else socket)
    outputs = [
        {"name": shown, "type": "COMBO" if isinstance(kind, list) else kind, "links": []}
        for shown, kind in zip(definition["output_name"], definition["output"])
    ]
    return {
        "id": number,
        "type": node["class_type"],
        "pos": [0, 0],
        "size": [300, 40 + _LINE * (max(len(sockets), len(outputs)) + len(values))],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": sockets,
        "outputs": outputs,
        "properties": {"Node name for S&R": node["class_type"]},
        "widgets_values": values,
    }


def _place(graph: Graph, nodes: Mapping[str, dict[str, Any]]) -> None:
    """Columns from left to right by the longest way from a start; within a column, from top to bottom."""
    column: dict[str, int] = {}
    for key in _in_order(graph):
        column[key] = 1 + max((column[source] for source in _sources(graph[key])), default=-1)
    bottom: dict[int, int] = {}
    for key, place in column.items():
        top = bottom.get(place, 0)
        nodes[key]["pos"] = [place * _COLUMN, top]
        bottom[place] = top + nodes[key]["size"][1] + _ROW
