"""What the app's server lets a visitor ask for; checked before any work starts, whatever the browser sent.

A public server sets the numbers (`genattn app --max-pixels ...`); every check says the limit, what came and what to do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Limits:
    """Most of each thing that one request may have.

    pixels: height x width. frames: of a clip. long_frames: of a long video. steps: denoising steps. tokens: of a drawn pattern.
    prompt_chars: of all prompts of a request together. hunt_pictures: pictures that a hunt makes. upload_bytes: of one file.
    queue: requests waiting. disk_bytes: of all runs kept; the oldest go first.
    """

    pixels: int = 1280 * 720
    frames: int = 129
    long_frames: int = 2000
    steps: int = 100
    tokens: int = 200_000
    prompt_chars: int = 4000
    hunt_pictures: int = 2000
    upload_bytes: int = 5_000_000
    queue: int = 32
    disk_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise GenAttnError(f"limit {name} must be a whole number >= 1, got {value!r}; raise it")

    def check_clip(self, height: int, width: int, frames: int | None, steps: int) -> None:
        """Raise GenAttnError if a clip is larger or longer, or takes more steps, than this server makes."""
        if height * width > self.pixels:
            raise GenAttnError(
                f"this server makes at most {self.pixels:,} pixels a frame, got {height} x {width} = {height * width:,}; "
                "ask for a smaller picture"
            )
        self.at_most("frames", frames or 1, self.frames)
        self.at_most("steps", steps, self.steps)

    def at_most(self, name: str, value: int, limit: int) -> None:
        """Raise GenAttnError if `value` is above `limit`."""
        if value > limit:
            raise GenAttnError(f"this server takes at most {limit:,} {name}, got {value:,}; ask for fewer")

    def check_prompts(self, *prompts: str | None) -> None:
        """Raise GenAttnError for a first prompt without words, or for prompts that are too long together."""
        if not isinstance(prompts[0], str) or not prompts[0].strip():
            raise GenAttnError("the prompt must say what to show, got an empty text; write something")
        self.at_most("characters of prompt", sum(len(p or "") for p in prompts), self.prompt_chars)

    def check_upload(self, path: str | Path, suffixes: Sequence[str]) -> Path:
        """An uploaded file of one of `suffixes` and not too large, as a Path; raises GenAttnError otherwise."""
        file = Path(path)
        if file.suffix.lower() not in suffixes or not file.is_file():
            raise GenAttnError(f"the upload must be a file ending in {', '.join(suffixes)}, got {file.name!r}; choose another")
        if file.stat().st_size > self.upload_bytes:
            raise GenAttnError(
                f"this server takes files of at most {self.upload_bytes:,} bytes, got {file.stat().st_size:,}; make it smaller"
            )
        return file


def whole(name: str, value: Any, low: int, default: int | None = None) -> int:
    """A whole number >= `low` from what a form sends (12, 12.0, None for the default); raises GenAttnError otherwise."""
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise GenAttnError(f"{name} must be a whole number, got {value!r}; write one")
    if value < low:
        raise GenAttnError(f"{name} must be >= {low}, got {int(value)}; raise it")
    return int(value)


def number(name: str, value: Any, default: float | None = None) -> float:
    """A finite number from what a form sends, None for the default; raises GenAttnError otherwise."""
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise GenAttnError(f"{name} must be a finite number, got {value!r}; write one")
    return float(value)


def read_picture(path: Path, limits: Limits, size: tuple[int, int]) -> Any:
    """An uploaded picture as a PIL image of `size` (height, width), cut to its shape about the middle.

    The content decides, not the name: a file that is no PNG, JPEG or WebP is refused, and so is one that unpacks to more
    than sixteen times the server's pixels. Raises GenAttnError.
    """
    from PIL import Image, ImageOps

    from genattn.picture_file import upright_rgb

    try:
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            if picture.width * picture.height > 16 * limits.pixels:
                raise GenAttnError(
                    f"this server reads pictures of at most {16 * limits.pixels:,} pixels, "
                    f"got {picture.width} x {picture.height}; make it smaller"
                )
            return ImageOps.fit(upright_rgb(picture), (size[1], size[0]))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, GenAttnError):
            raise
        raise GenAttnError(
            f"the picture must be a whole {', '.join(PICTURE_FORMATS)} file, got {path.name!r} ({error})"
        ) from None
