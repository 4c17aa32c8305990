"""In which order each family of ComfyUI puts its tokens, as read in its models.

Wan            references, grid, references      (which of them, the variant tells)
HunyuanVideo   grid, text                        (or text, grid: the double blocks tell)
FLUX, Chroma   text, grid, references            references after the picture (Kontext)
Qwen-Image     text, grid, references
Krea           text, grid, references
Z-Image        text, references, grid, registers the picture is filled up to a multiple
SD3            text, grid                        SD3.5 medium has a second attention, over the picture alone
LTX            grid, references                  keyframes stand as further frames behind the clip
MiniMax H3     text, references, audio, grid     as its own packed layout says
Cosmos, Kandinsky 5   grid
"""

import math
from typing import Any

from genattn.apps.comfyui.hosts.host import Entry, grid_of
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, SegmentKind, TokenLayout

_AFTER = ("WanModel_S2V", "HumoWanModel")  # Wan variants whose references stand behind the clip


def patches(model: Any) -> tuple[int, ...]:
    """`patch_size` of a video model, one number per axis."""
    return tuple(model.patch_size)


def square(model: Any) -> tuple[int, ...]:
    """`patch_size` of a picture model, one number for both axes."""
    return (int(model.patch_size),) * 2


def flat(model: Any) -> tuple[int, ...]:
    """The patch of a model that takes pictures as clips: frames are not gathered."""
    return (1, *square(model))


def _text(length: int) -> list[Segment]:
    return [Segment("text", (length,))] if length else []


def _rest(kind: SegmentKind, length: int) -> list[Segment]:
    return [Segment(kind, (length,))] if length else []


def _picture(grid: tuple[int, ...]) -> tuple[int, ...]:
    """A clip of one frame is a picture."""
    return grid[1:] if len(grid) == 3 and grid[0] == 1 else grid


def _text_beside(host: str, entry: Entry, tokens: int, others: int, exact: bool) -> int:
    """Text tokens that are left when `others` are taken away."""
    text = tokens - others
    if text < 0 or (exact and entry.text is not None and text != entry.text):
        raise GenAttnError(
            f"{host}: {tokens} tokens are not {others} of the picture and {entry.text or 0} of text; another node adds some"
        )
    return text


def wan(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    """References of the full-control variants before the clip, of speech and in-context variants behind it."""
    shape = list(entry.shape)
    beside = entry.extras.get("time_dim_concat")
    if beside is not None:
        shape[-3] += beside.shape[-3]
    grid = grid_of(shape, patches(model))
    others = tokens - math.prod(grid)
    if not others:  # also where an older version takes no references in
        return TokenLayout((Segment("grid", grid),))
    within = [Segment("reference", grid_of(ref.shape, patches(model))) for ref in entry.extras.get("context_latents") or ()]
    before = others - sum(segment.length for segment in within)
    if before > 0 and entry.extras.get("reference_latent") is not None and not within:
        behind = {cls.__name__ for cls in type(model).__mro__} & set(_AFTER)
        found = [Segment("grid", grid), Segment("reference", (before,))]
        return TokenLayout(tuple(found if behind else found[::-1]))
    if before:
        raise GenAttnError(f"Wan: {tokens} tokens are not the grid {grid}; this variant adds others, whose order is not known")
    return TokenLayout((Segment("grid", grid), *within))


def hunyuan(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    """The text's side is told by the double blocks; all of its parts (two encoders, a vision model) count as text."""
    picture = [Segment("grid", grid_of(entry.shape, patches(model)))]
    reference = entry.extras.get("ref_latent")
    if reference is not None:
        picture.insert(0, Segment("reference", grid_of(reference.shape, patches(model))))
    text = _text(_text_beside("HunyuanVideo", entry, tokens, sum(s.length for s in picture), exact=False))
    picture_first = getattr(model.double_blocks[0], "flipped_img_txt", False)
    return TokenLayout(tuple([*picture, *text] if picture_first else [*text, *picture]))


def flux(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    """FLUX, FLUX.2 and Chroma."""
    return _text_first("FLUX", square(model), entry, tokens)


def qwen(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    """Qwen-Image and its edits; layers of a layered picture are frames."""
    return _text_first("Qwen-Image", flat(model), entry, tokens)


def krea(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    """Krea 2; frames are folded into the batch."""
    return _text_first("Krea", (int(model.patch),) * 2, entry, tokens)


def _text_first(host: str, patch: tuple[int, ...], entry: Entry, tokens: int) -> TokenLayout:
    references = [Segment("reference", _picture(grid_of(ref.shape, patch))) for ref in entry.extras.get("ref_latents") or ()]
    picture = [Segment("grid", _picture(grid_of(entry.shape, patch))), *references]
    text = _text(_text_beside(host, entry, tokens, sum(s.length for s in picture), exact=True))
    return TokenLayout((*text, *picture))


def z_image(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    """Text and picture are each filled up to a multiple with learned tokens, which are attended like all others."""
    grid = Segment("grid", grid_of(entry.shape, square(model)))
    multiple = getattr(model, "pad_tokens_multiple", None) or 1
    filled = -grid.length % multiple
    before = _text_beside("Z-Image", entry, tokens, grid.length + filled, exact=False)
    return TokenLayout((*_text(before), grid, *_rest("register", filled)))


def sd3(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    """SD3.5 medium's second attention has no text."""
    grid = Segment("grid", grid_of(entry.shape, tuple(model.x_embedder.patch_size)))
    if tokens == grid.length:
        return TokenLayout((grid,))
    text = _text(_text_beside("SD3", entry, tokens, grid.length, exact=not getattr(model, "register_length", 0)))
    return TokenLayout((*text, grid))


def ltx(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    """Keyframes are the last frames of the latents, with positions of their own."""
    frames, *plane = grid_of(_first_shape(entry), (1, 1, 1))
    keyframes = entry.extras.get("keyframe_idxs")
    guides = 0 if keyframes is None else int(keyframes.shape[2])
    if guides % math.prod(plane) or guides >= tokens:
        raise GenAttnError(f"LTX: {guides} tokens of keyframes are no whole frames of {plane[0]}x{plane[1]} tokens")
    grid = (frames - guides // math.prod(plane), *plane)
    return TokenLayout((Segment("grid", grid), *_rest("reference", guides)))


def grid_alone(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    """Kandinsky 5."""
    return TokenLayout((Segment("grid", _picture(grid_of(entry.shape, patches(model)))),))


def cosmos_patch(model: Any) -> tuple[int, ...]:
    """Cosmos tells its patch in two numbers."""
    return (int(model.patch_temporal), int(model.patch_spatial), int(model.patch_spatial))


def cosmos(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    """Cosmos-Predict 2 and Anima."""
    return TokenLayout((Segment("grid", _picture(grid_of(entry.shape, cosmos_patch(model)))),))


_H3: dict[str, SegmentKind] = {
    "text": "text", "cond": "reference", "ref_img": "reference", "cond_audio": "audio", "ref_audio": "audio", "audio": "audio",
}  # fmt: skip


def minimax(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    """Clip and sound in one sequence; the run's packed layout tells what stands before them."""
    shape = _first_shape(entry)
    grid = Segment("grid", grid_of(shape, patches(model)))
    packed = (entry.extras.get("minimax_payload") or {}).get("layout")
    if packed is None:
        return TokenLayout((*_text(_text_beside("MiniMax H3", entry, tokens, grid.length, exact=False)), grid))
    found: list[Segment] = []
    for start, stop, kind in packed.segments:
        found += [grid] if kind == "video" else _rest(_H3.get(kind, "reference"), stop - start)
    return TokenLayout(tuple(found))


def _first_shape(entry: Entry) -> tuple[int, ...]:
    """Of the clip, where clip and sound come packed in one tensor."""
    shapes = entry.extras.get("latent_shapes")
    return tuple(shapes[0]) if shapes else entry.shape
