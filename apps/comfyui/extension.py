"""The node specifications as ComfyUI's V3 nodes. Imported by ComfyUI only: `comfy_api` comes with it."""

import dataclasses
from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

from genattn.apps.comfyui.changed import fingerprint
from genattn.apps.comfyui.nodes import node_specs
from genattn.apps.comfyui.schema import Answer, Field, NodeSpec

_TYPES = {
    "MODEL": io.Model,
    "LATENT": io.Latent,
    "CONDITIONING": io.Conditioning,
    "SAMPLER": io.Sampler,
    "IMAGE": io.Image,
    "VIDEO": io.Video,
    "INT": io.Int,
    "FLOAT": io.Float,
    "BOOLEAN": io.Boolean,
    "STRING": io.String,
}
_KNOWN = {f.name for f in dataclasses.fields(io.Schema)}


def _type(name: str) -> Any:
    return _TYPES.get(name) or io.Custom(name)


def _input(spec: Field) -> Any:
    given: dict[str, Any] = {"optional": spec.optional, "tooltip": spec.tooltip}
    if not spec.is_widget:
        return _type(spec.type).Input(spec.id, **given)
    given["default"] = spec.default
    if spec.type == "COMBO":
        return io.Combo.Input(spec.id, options=list(spec.options), **given)
    if spec.type in ("INT", "FLOAT"):
        given |= {"min": spec.low, "max": spec.high, "step": spec.step}
    if spec.type == "STRING":
        given["multiline"] = spec.multiline
    if spec.seed:
        given["control_after_generate"] = True
    return _type(spec.type).Input(spec.id, **given)


def schema_of(spec: NodeSpec) -> Any:
    """ComfyUI's schema of a node; versions without search names find them in the description."""
    given: dict[str, Any] = {
        "node_id": spec.id,
        "display_name": spec.title,
        "category": spec.category,
        "description": spec.description,
        "inputs": [_input(field) for field in spec.inputs],
        "outputs": [_type(out.type).Output(out.id, display_name=out.id, tooltip=out.tooltip) for out in spec.outputs],
        "is_output_node": spec.is_output,
    }
    if "search_aliases" in _KNOWN:
        given["search_aliases"] = list(spec.search)
    else:
        given["description"] += f" Search: {', '.join(spec.search)}."
    return io.Schema(**given)


def node_class(spec: NodeSpec) -> type:
    """The V3 class of a node."""

    def execute(cls: type, /, **inputs: Any) -> Any:
        answer = spec.answer(**inputs)
        if not isinstance(answer, Answer):
            return io.NodeOutput(*answer)
        shown = None
        if answer.image is not None:
            shown = ui.PreviewImage(answer.image, cls=cls)
        elif answer.text is not None:
            shown = ui.PreviewText(answer.text)
        return io.NodeOutput(*answer.values, ui=shown)

    members: dict[str, Any] = {
        "define_schema": classmethod(lambda cls: schema_of(spec)),
        "execute": classmethod(execute),
        "__module__": __name__,
    }
    if spec.reads:
        members["fingerprint_inputs"] = classmethod(
            lambda cls, **inputs: "; ".join(fingerprint(str(inputs.get(name) or "")) for name in spec.reads)
        )
    if spec.check is not None:
        members["validate_inputs"] = classmethod(spec.check)
    return type(spec.id, (io.ComfyNode,), members)


class GenAttnExtension(ComfyExtension):  # type: ignore[misc]
    """All nodes."""

    async def get_node_list(self) -> list[type]:
        """Called once by ComfyUI."""
        return [node_class(spec) for spec in node_specs()]


async def comfy_entrypoint() -> GenAttnExtension:
    """ComfyUI's way in."""
    return GenAttnExtension()
