"""GenAttn's nodes for ComfyUI: a folder for custom_nodes, which finds everything else in the installed genattn package."""

from genattn.apps.comfyui.extension import comfy_entrypoint

WEB_DIRECTORY = "./web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
