"""The text's way through every family, by the name of the denoiser's class."""

from typing import Any

from genattn.guidance.nag import ways_cross, ways_joint
from genattn.guidance.nag.streams import TextWay

WAYS: dict[str, TextWay] = {**ways_joint.WAYS, **ways_cross.WAYS}

# families whose text NAG does not carry, and what stands in the way
NOT_CARRIED: dict[str, str] = {
    "DiTTransformer2DModel": "it is told a class, no text",
    "MiniMaxMusic3Transformer1DModel": "its text is added to the sound before the blocks, and no attention looks at it",
    "GlmImageTransformer2DModel": (
        "its attention sees only the words that the prompt puts in quotation marks; what the prompt asks for comes as tokens "
        "of a language model"
    ),
    "ErnieImageTransformer2DModel": (
        "it turns its image by the length of the prompt, and not by distances alone: no one image stands beside two texts"
    ),
    "Cosmos3OmniTransformer": "its text reads only what stands before it, so a second text behind it would read the first",
    "QwenImage21Transformer2DModel": "its text is read once, in the first step, and kept as keys from then on",
    "OmniGenTransformer2DModel": "its text is token numbers with a mask of their own, which only its own processor makes",
    "Ideogram4Transformer2DModel": "its pipeline fills text and image into one sequence of its own before the model sees them",
    "BriaFibo2Transformer2DModel": "its text stands in the sequence, shortened, and is asked by cross-attention as well",
    "MotifVideoTransformer3DModel": "its blocks ask the text twice, beside the image and alone, and its last blocks see none",
}


def way_of(model: Any) -> TextWay | None:
    """The text's way through a denoiser, by the name of its class or of a base class; None when it is not known."""
    return next((WAYS[base.__name__] for base in type(model).__mro__ if base.__name__ in WAYS), None)


def why_not_carried(model: Any) -> str:
    """Why NAG does not carry this denoiser's text; empty where nothing is known of it."""
    return next((NOT_CARRIED[base.__name__] for base in type(model).__mro__ if base.__name__ in NOT_CARRIED), "")


def register_way(model: str, way: TextWay) -> None:
    """Make NAG know a denoiser class of your own in this process, by the class's name."""
    WAYS[model] = way
