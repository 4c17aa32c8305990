"""GenAttn's nodes for ComfyUI. What ComfyUI itself loads is the folder `pack`."""
