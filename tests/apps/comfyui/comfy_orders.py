"""Where each family of ComfyUI really puts its tokens; run with ComfyUI's Python: comfy_orders.py COMFYUI_DIR FAMILY...

A tiny random model runs under the node pack's own wrapper. One text token, then one latent is changed, and the first marked
attention call tells which query moved. Prints one JSON line per family: the layout that the pack read, the tokens that the text
moved, and per changed latent the token that moved most.
"""

import json
import sys

FAMILIES = sys.argv[2:]
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[0], "--cpu"]  # ComfyUI reads the command line on import

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

from types import SimpleNamespace  # noqa: E402

import comfy.patcher_extension  # noqa: E402
import torch  # noqa: E402
from comfy_families import filled, made  # noqa: E402

from genattn.apps.comfyui.patching.chain import Chain  # noqa: E402
from genattn.apps.comfyui.patching.seam import KEY, OVERRIDE, Override, around_model  # noqa: E402
from genattn.seam.plugin import Plugin  # noqa: E402


class Recorder(Plugin):
    """Keeps queries and layout of the first call of a forward."""

    answers = True

    def __init__(self):
        self.query = self.layout = None
        self.why = ""

    def wants(self, site):
        return site.kind in ("self", "joint") and site.depth == 0

    def attention(self, call, inner):
        if self.query is None:
            self.query, self.layout, self.why = call.query.flatten(2)[0], call.layout, call.run.why_no_layout or ""
        return inner(call)


def queries(model, latents, context, extras):
    """(queries [S, C], layout, why there is none) of the first block's self-attention, through the node pack's wrapper."""
    recorder = Recorder()
    chain = Chain((recorder,))
    shapes = {"latent_shapes": [list(part.shape) for part in latents]} if isinstance(latents, list) else {}
    packed = torch.cat([part.flatten(1) for part in latents], 1)[:, None] if shapes else latents

    class Executor:
        class_obj = SimpleNamespace(diffusion_model=model)

        def __call__(self, x, t, concat, context, control, options, **more):
            more.pop("latent_shapes", None)
            return model(latents, t, context=context, transformer_options=options, **more)

    options = {KEY: chain, OVERRIDE: Override(None), "sigmas": torch.ones(1), "sample_sigmas": torch.tensor([1.0, 0.0])}
    with torch.inference_mode():
        around_model(Executor(), packed, torch.full((1,), 500.0), None, context, None, options, **extras, **shapes)
    return recorder.query, recorder.layout, recorder.why


def checked(family):
    """What the family's model does, and what the pack read."""
    torch.manual_seed(3)
    model, shape, context_shape, extras = made(family)
    filled(model)
    several = isinstance(shape, list)
    latents = [torch.randn(part) for part in shape] if several else torch.randn(shape)
    context = torch.randn(context_shape)
    base, layout, why = queries(model, latents, context, extras)
    if layout is None:
        return {"family": family, "why": why or "no call came by"}
    other, _, _ = queries(model, latents, context + torch.randn(context_shape), extras)
    text = ((other - base).abs().amax(-1) > 1e-4).nonzero().flatten().tolist()
    clip = latents[0] if several else latents
    places, moved = [], []
    for place in ([0] * (clip.ndim - 2), [n - 1 for n in clip.shape[2:]], [n // 2 for n in clip.shape[2:]]):
        turned = clip.clone()
        turned[(0, slice(None), *place)] += 3 * torch.randn(clip.shape[1])
        now, _, _ = queries(model, [turned, *latents[1:]] if several else turned, context, extras)
        places.append(place)
        moved.append(int((now - base).abs().amax(-1).argmax()))
    segments = [[s.kind, list(s.shape), s.length] for s in layout.segments]
    return {"family": family, "segments": segments, "text": text, "places": places, "moved": moved, "latents": list(clip.shape)}


for name in FAMILIES:
    try:
        print(json.dumps(checked(name)), flush=True)
    except ModuleNotFoundError as error:
        print(json.dumps({"family": name, "absent": str(error)}), flush=True)
    except Exception as error:
        print(json.dumps({"family": name, "why": f"{type(error).__name__}: {error}"}), flush=True)
