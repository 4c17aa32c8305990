"""What a node is, apart from ComfyUI: its sockets, widgets, words and the function behind it.

Specifications are plain data, so they can be read, checked and turned into help and workflows where no ComfyUI is; the V3 node
classes are built from them in `extension`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from genattn.errors import GenAttnError

WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")
SOCKETS = ("MODEL", "LATENT", "CONDITIONING", "SAMPLER", "IMAGE", "VIDEO", "GENATTN_PIPE", "GENATTN_HEADS", *WIDGETS[:4])


@dataclass(frozen=True)
class Field:
    """One input. type: a socket's or widget's type. options: of a COMBO. seed: an INT that the page may change by itself."""

    id: str
    type: str
    tooltip: str
    default: Any = None
    low: float | None = None
    high: float | None = None
    step: float | None = None
    options: tuple[str, ...] = ()
    optional: bool = False
    multiline: bool = False
    seed: bool = False

    def __post_init__(self) -> None:
        if self.type not in (*SOCKETS, *WIDGETS):
            raise GenAttnError(f"input {self.id}: type must be one of {', '.join((*SOCKETS, *WIDGETS))}, got {self.type!r}")
        if self.type == "COMBO" and self.default not in self.options:
            raise GenAttnError(f"input {self.id}: default must be one of {self.options}, got {self.default!r}")

    @property
    def is_widget(self) -> bool:
        """Whether the input has a value of its own when nothing is connected."""
        return self.type in WIDGETS

    def check(self, value: Any) -> None:
        """Raise GenAttnError for a value that the widget would not take: ComfyUI looks at no NaN, and not at what a link gives.

        Seeds of other nodes may be larger than ours, which is no harm.
        """
        if self.type == "COMBO" and value not in self.options:
            raise GenAttnError(f"{self.id} must be one of {', '.join(self.options)}, got {value!r}")
        if self.type == "STRING" and (not isinstance(value, str) or "\0" in value):
            raise GenAttnError(f"{self.id} must be a text, got {value!r}")
        if self.type in ("INT", "FLOAT") and not self.seed:
            least, most = self.low, self.high
            if not isinstance(value, int | float) or not least <= value <= most:  # type: ignore[operator]
                raise GenAttnError(f"{self.id} must be a number from {least:g} to {most:g}, got {value!r}")


@dataclass(frozen=True)
class Out:
    """One output."""

    id: str
    type: str
    tooltip: str


@dataclass
class Answer:
    """What a node's function gives: the outputs, and what the node itself shows."""

    values: tuple[Any, ...]
    text: str | None = None
    image: Any = None


@dataclass(frozen=True)
class NodeSpec:
    """One node. run(**inputs) gives a tuple of outputs or an `Answer`.

    check: asked when a workflow is submitted, True or what is wrong; after `cls` its parameters are the inputs it looks at.
    reads: inputs that name a file or a folder; the node runs again when what stands there has changed.
    """

    id: str
    title: str
    category: str
    description: str
    search: tuple[str, ...]
    inputs: tuple[Field, ...]
    outputs: tuple[Out, ...]
    run: Callable[..., Any]
    is_output: bool = False
    check: Callable[..., bool | str] | None = None
    reads: tuple[str, ...] = ()

    def answer(self, **inputs: Any) -> Any:
        """What `run` gives. Raises GenAttnError before that for a widget's value that is none."""
        for field in self.inputs:
            if field.is_widget and inputs.get(field.id) is not None:
                field.check(inputs[field.id])
        return self.run(**inputs)
