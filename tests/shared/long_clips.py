"""Stock models on clips longer than trained, and what decayed logits are by definition."""

import warnings

import torch

from genattn.pipelines.tiny.random.build import build_inputs
from genattn.seam.plugin import Plugin


def answer(model, inputs):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**inputs, return_dict=False)[0]


def longer(family, frames):
    """Inputs with so many latent frames."""
    inputs = build_inputs(family)
    axis = 1 if family.startswith("cogvideox") else 2
    for name in ("hidden_states", "control_hidden_states"):
        if name in inputs:
            shape = [*inputs[name].shape]
            shape[axis] = frames
            inputs[name] = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return inputs


def reference(query, key, value, layout, scale, plugin, mask=None):
    """float64, from the definition: logits outside the window scaled and lowered."""
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    logits = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    index, (frames, height, width) = layout.raster_index, layout.grid3
    frame = torch.where(index >= 0, index // (height * width), -1)
    first = (frame - plugin.trained_frames // 2).clamp(0, frames - plugin.trained_frames)
    inside = (frame[None] >= first[:, None]) & (frame[None] < first[:, None] + plugin.trained_frames)
    inside |= (frame[None] < 0) | (frame[:, None] < 0)
    logits = torch.where(inside, logits, logits * plugin.decay - plugin.penalty)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.double()
    return (logits.softmax(-1) @ v).transpose(1, 2).float()


class Watch(Plugin):
    def __init__(self):
        self.calls = []

    def attention(self, call, inner):
        out = inner(call)
        self.calls.append((call, out))
        return out
