"""All of GenAttn's ComfyUI nodes."""

from functools import cache

from genattn.apps.comfyui.model_nodes import MODEL_NODES
from genattn.apps.comfyui.pipe_nodes import PIPE_NODES
from genattn.apps.comfyui.schema import NodeSpec


@cache
def node_specs() -> tuple[NodeSpec, ...]:
    """Nodes on ComfyUI's own MODEL, then those over diffusers."""
    return (*MODEL_NODES, *PIPE_NODES)
