"""All of GenAttn's ComfyUI nodes."""

from functools import cache

from genattn.apps.comfy_nodes_model import MODEL_NODES
from genattn.apps.comfy_nodes_pipe import PIPE_NODES
from genattn.apps.comfy_schema import NodeSpec


@cache
def node_specs() -> tuple[NodeSpec, ...]:
    """Nodes on ComfyUI's own MODEL, then those over diffusers."""
    return (*MODEL_NODES, *PIPE_NODES)
