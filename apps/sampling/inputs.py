"""What goes into a run beside its prompt: LoRA files and pictures, checked before the model is opened."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError, first_line
from genattn.picture_file import open_picture


def lora_of(text: str) -> tuple[str, float]:
    """`style.safetensors:0.8` as (file or hub id, weight); without a number the weight is 1.

    Raises GenAttnError for a file that is not there or is no safetensors file.
    """
    source, colon, weight = text.rpartition(":")
    try:
        found = (source, float(weight)) if colon else (text, 1.0)
    except ValueError:
        found = (text, 1.0)
    path = Path(found[0])
    if path.suffix and path.suffix != ".safetensors":
        raise GenAttnError(f"--lora must be a .safetensors file or a hub id, got {found[0]!r}; other formats are not loaded")
    if not path.exists() and (path.suffix or found[0].startswith((".", "/", "~")) or found[0].count("/") != 1):
        raise GenAttnError(f"--lora must be a .safetensors file or a hub id (owner/name), and there is no file {found[0]!r}")
    if not math.isfinite(found[1]):
        raise GenAttnError(f"the weight of --lora must be a finite number, got {text!r}; 1 is the usual one")
    if path.is_file():
        _check_whole(path)
    return found


def _check_whole(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise GenAttnError(
            f"--lora {str(path)!r} must be a whole safetensors file: {first_line(error)}; copy it again"
        ) from None


def add_loras(pipe: Any, texts: Sequence[str]) -> None:
    """Load LoRAs into the pipeline and set their weights.

    Raises GenAttnError when the pipeline takes none, peft is missing, or a file does not fit.
    """
    if not texts:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise GenAttnError(f"{type(pipe).__name__} takes no LoRA; leave --lora out")
    names, weights = [], []
    for i, text in enumerate(texts):
        source, weight = lora_of(text)
        path = Path(source)
        place = (str(path.parent), {"weight_name": path.name}) if path.is_file() else (source, {})
        try:
            with warnings.catch_warnings():  # peft warns of every adapter after the first; several were asked for
                warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                pipe.load_lora_weights(place[0], adapter_name=f"lora_{i}", use_safetensors=True, **place[1])
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            raise GenAttnError(f"--lora {source!r} cannot be used: {first_line(error)}") from None
        names.append(f"lora_{i}")
        weights.append(weight)
    pipe.set_adapters(names, weights)


def read_picture(path: Path) -> Any:
    """A picture as PIL, upright and in RGB. Raises GenAttnError when it cannot be read."""
    return open_picture(path, "--image")
