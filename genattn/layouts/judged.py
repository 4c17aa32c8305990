"""The attention models of diffusers that have no layout here, each with the reason.

    known      a family of `genattn.layouts.families`: patterns and guidance act on it
    refused    listed here: nothing to make sparse, or a rule of the model's own that a pattern must not replace
    stays      listed here: no layout yet, so it runs dense and says so

A class of diffusers in none of the three fails a test, so that a new release is looked at.
"""

_LINEAR = "linear attention: there is no score matrix to make sparse or to edit"
_PART = "attends over a few frames of one place, a part of video UNets: too short to make sparse"

REFUSED: dict[str, str] = {
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": "linear attention but for every fourth block, which calls no processor that could be reached",
    "Kandinsky6SRTransformer3DModel": "every call goes to FlexAttention under a block mask chosen by content (NABLA)",
    "MiniMaxMusic3RVQDepthDecoder": "causal over at most 16 codes: no grid",
    "PriorTransformer": "causal over the tokens of one embedding: no grid",
    "T5FilmDecoder": "attends over a spectrogram of at most 256 frames: too short to make sparse",
    "RFD4ProteinaTransformer": "every pair of residues adds a bias to the scores, and a chain of residues is no raster",
    "TransformerTemporalModel": _PART,
}
"""Transformers of diffusers/models/transformers, by class."""

STAYS: dict[str, str] = {
    "UNet1DModel": "attends by modules of its own, without processors",
    "UNet2DModel": "no layout yet: unconditional, and attends in its lowest levels alone",
    "UNet3DConditionModel": "no layout yet: frames and places in turn, as AnimateDiff",
    "I2VGenXLUNet": "no layout yet: frames and places in turn, as AnimateDiff",
    "Kandinsky3UNet": "no layout yet: a UNet of its own blocks",
    "UNetSpatioTemporalConditionModel": "no layout yet: frames and places in turn, as AnimateDiff",
    "StableCascadeUNet": "no layout yet: attends in feature maps together with the embedding of the image",
    "UVit2DModel": "no layout yet: attends over the codes of one small image",
    "MotionAdapter": "weights to be loaded into UNetMotionModel; has no forward of its own",
}
"""UNets of diffusers/models/unets, by class: they run dense."""


def judged() -> dict[str, str]:
    """Reason by class name for every class of diffusers that is known to have no layout."""
    return {**REFUSED, **STAYS}
