"""Pictures as people's cameras and programs save them, read as a viewer shows them."""

import warnings
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError, first_line


def open_picture(path: str | Path, what: str) -> Any:
    """A picture file as PIL, upright and in RGB. what: for the message, as "--image".

    Raises GenAttnError for a file that is missing, is no whole picture, or is too large to be unpacked.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # said of what is large and read all the same
            with Image.open(path) as picture:
                return upright_rgb(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise GenAttnError(f"{what} {str(path)!r} cannot be read as a picture: {first_line(error)}; check the file") from None
    except Image.DecompressionBombError:
        raise GenAttnError(f"{what} {str(path)!r} must have fewer pixels than can fill the memory; make it smaller") from None


def upright_rgb(picture: Any) -> Any:
    """A PIL picture as a viewer shows it: turned as its camera was held, on white where it is transparent, grey of 16 bits or
    of floats scaled to 8."""
    import numpy as np
    from PIL import Image, ImageOps

    turned = ImageOps.exif_transpose(picture)
    if turned.mode.startswith("I") or turned.mode == "F":  # Pillow itself would cut off what lies above 255
        grey: np.ndarray = np.nan_to_num(np.asarray(turned).astype(np.float32))
        whole = turned.mode == "F" and (grey.max(initial=0.0) > 1.0 or not grey.any())
        grey = grey * np.float32(1 if whole else 255 if turned.mode == "F" else 1 / 257)
        turned = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if turned.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in turned.info:
        over = turned.convert("RGBA")  # what lies under the transparent parts is seen by nobody
        turned = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return turned.convert("RGB")
