"""NAG on ComfyUI's own models: a negative prompt at CFG 1, inside the attention over text (arXiv 2505.21179).

The negative CONDITIONING is encoded by ComfyUI with the guider's own prompts, so each family gets it as it wants it. In every
guided forward the model's text is followed by the negative one, in the conditional samples the answers of both are joined, and
the model runs once. Formula and released strengths are those of `genattn.guidance.nag`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from genattn.apps.comfyui.hosts.families import HOSTS
from genattn.apps.comfyui.hosts.host import bare, grid_of
from genattn.apps.comfyui.hosts.texts import TextWay, text_stands_first, text_way_of
from genattn.apps.comfyui.patching.known import percents_as_sigmas
from genattn.apps.comfyui.patching.seam import APPLY_MODEL, FORWARD, patch_model, stand_in_slot
from genattn.apps.comfyui.patching.text_blocks import Look, TextBlock, places
from genattn.apps.comfyui.patching.two_texts import TEXTS, TwoTexts
from genattn.errors import GenAttnError
from genattn.guidance.nag.defaults import strength_for
from genattn.guidance.nag.formula import Strength

KEY = "genattn_nag"
OUTER_SAMPLE = "outer_sample"


class Nag:
    """NAG on one MODEL. negative: ComfyUI's CONDITIONING. highest, lowest: noise levels between which it acts."""

    def __init__(self, negative: Any, strength: Strength, highest: float, lowest: float) -> None:
        self.negative, self.strength, self.highest, self.lowest = negative, strength, highest, lowest
        self.forwards = self.guided = self.calls = 0
        self._guider: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Nag":
        return self

    @contextmanager
    def sampling(self, guider: Any) -> Iterator[None]:
        """A sampler runs: ComfyUI encodes the negative text beside the guider's own."""
        from comfy.sampler_helpers import convert_cond

        (text,) = convert_cond(self.negative)
        guider.conds[KEY] = [{**text, "prompt_type": "negative"}]
        self.forwards = self.guided = self.calls = 0
        self._guider = guider
        try:
            yield
        finally:
            self._guider = None

    def acts(self, options: Mapping[str, Any]) -> bool:
        """Whether this forward is guided: its noise level, and whether it holds conditional samples."""
        sigmas = options.get("sigmas")
        within = sigmas is None or self.lowest <= float(sigmas.max()) <= self.highest
        return within and not self.strength.is_off and 0 in (options.get("cond_or_uncond") or (0,))

    def text(self, way: TextWay, batch: int, device: torch.device) -> dict[str, Any]:
        """The negative text as the model's inputs, by name."""
        if self._guider is None:
            raise GenAttnError("NAG must run in one of ComfyUI's samplers, which encode its negative prompt; got a bare call")
        known = self._guider.conds[KEY][0]["model_conds"]
        found = {name: known[name] for name in ("c_crossattn", *way.beside) if name in known}
        told = {name: value.process_cond(batch_size=batch, device=device, area=None).cond for name, value in found.items()}
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in told.items()}

    def describe(self) -> dict[str, Any]:
        """For the report."""
        counts = {"forwards": self.forwards, "guided": self.guided, "calls": self.calls}
        return {"plugin": "NAG", **vars(self.strength), "counts": counts}

    def told(self) -> str:
        """For the report, as a line."""
        strength = self.strength
        values = f"scale {strength.scale:g}, tau {strength.tau:g}, alpha {strength.alpha:g}"
        return f"NAG ({values}): {self.guided} of {self.forwards} forwards guided, {self.calls} attention calls over both texts"


def nag_model(
    model: Any,
    negative: Any,
    scale: float | None = None,
    tau: float | None = None,
    alpha: float | None = None,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> Any:
    """A clone of ComfyUI's MODEL with a negative prompt inside its attention.

    Args:
        model: ComfyUI's MODEL of a family in `hosts.texts`.
        negative: CONDITIONING of one text.
        scale, tau, alpha: as in `genattn.guidance.nag.nag.NAG`; None for the family's released value.
        start_percent, end_percent: share of the sampling in which it acts.

    Raises:
        GenAttnError: the family cannot take a second text, or NAG is on the MODEL already, or a value is out of range.
    """
    way = text_way_of(model.model.diffusion_model)
    strength = strength_for(way.diffusers, {"scale": scale, "tau": tau, "alpha": alpha})
    if start_percent > end_percent:
        raise GenAttnError(f"start_percent must not be above end_percent, got {start_percent} and {end_percent}")
    if len(negative) != 1:
        raise GenAttnError(f"the negative of NAG must be one text, got {len(negative)} combined; connect one encoded prompt")
    if nag_of(model) is not None:
        raise GenAttnError("this MODEL has NAG already; put all that is unwanted into one negative prompt")
    highest, lowest = percents_as_sigmas(model, start_percent, end_percent)
    patched = model.clone() if way.kind == "unet" else patch_model(model)
    options = patched.model_options.setdefault("transformer_options", {})
    stand_in_slot(options)
    options[KEY] = Nag(negative, strength, highest, lowest)
    patched.add_wrapper_with_key(OUTER_SAMPLE, KEY, around_sampler)
    patched.add_wrapper_with_key(APPLY_MODEL, KEY, around_model)
    return patched


def nag_of(model: Any) -> Nag | None:
    """The NAG on a MODEL."""
    found: Nag | None = model.model_options.get("transformer_options", {}).get(KEY)
    return found


def around_sampler(executor: Any, *args: Any, **named: Any) -> Any:
    """ComfyUI's OUTER_SAMPLE wrapper: the negative text is encoded with the others."""
    nag = executor.class_obj.model_options.get("transformer_options", {}).get(KEY)
    if nag is None:
        return executor(*args, **named)
    with nag.sampling(executor.class_obj):
        return executor(*args, **named)


def around_model(
    executor: Any,
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **extras: Any,
) -> Any:
    """ComfyUI's APPLY_MODEL wrapper: one forward with both texts, where NAG acts."""
    options = dict(transformer_options or {})
    nag: Nag | None = options.get(KEY)
    if nag is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **extras)
    nag.forwards += 1
    if not nag.acts(options):
        return executor(x, t, c_concat, c_crossattn, control, options, **extras)
    model = bare(executor.class_obj.diffusion_model)
    way = text_way_of(model)
    _refuse(way, c_crossattn, extras)
    theirs = nag.text(way, len(x), x.device)
    texts = TwoTexts(nag.strength, guided_rows(options, len(x)), way.kind == "joint", context=theirs["c_crossattn"].shape[1])
    lengthened = lengthened_masks(way, extras, theirs, c_crossattn.shape[1])
    if way.kind == "joint":
        texts.text_first = text_stands_first(model)
        seen = _look(executor, (x, t, c_concat, theirs["c_crossattn"], options), model, way, extras, theirs)
        options["patches_replace"] = _replaced(options, dict.fromkeys(places(model), seen), texts)
    else:
        c_crossattn = _both(texts, c_crossattn, theirs["c_crossattn"], _lengths(model, x, extras), way)
        lengthened = {name: _padded(mask, texts.keys) for name, mask in lengthened.items()}
        if way.kind == "unet":
            texts.announced = False
            options["patches"] = _announcing(options, texts, theirs["c_crossattn"])
        else:
            options["patches_replace"] = _replaced(options, dict.fromkeys(places(model)), texts)
    options[TEXTS] = texts
    out = executor(x, t, c_concat, c_crossattn, control, options, **{**extras, **lengthened})
    if not texts.calls or texts.announced:
        raise GenAttnError(
            "NAG must see the attention over the text, and no call of it came by: a node after it took the attention override; "
            "put the NAG node after that node"
        )
    nag.guided += 1
    nag.calls += texts.calls
    return out


def guided_rows(options: Mapping[str, Any], batch: int) -> torch.Tensor:
    """bool [batch]: the conditional samples, as ComfyUI's list of chunks tells them; all where it tells nothing."""
    chunks = options.get("cond_or_uncond") or (0,)
    return torch.tensor([chunk == 0 for chunk in chunks]).repeat_interleave(batch // len(chunks))


def _refuse(way: TextWay, context: Any, extras: Mapping[str, Any]) -> None:
    if context is None:
        raise GenAttnError("NAG needs a positive prompt in this pass, got none")
    if extras.get("guiding_frame_index") is not None:
        raise GenAttnError("NAG cannot go along here: this HunyuanVideo tells its first frame by its place behind the text")


def _look(executor: Any, call: tuple[Any, ...], model: Any, way: TextWay, extras: Mapping[str, Any], theirs: Any) -> Look:
    """The negative text as it enters the blocks: a run past all blocks, and past other nodes' wrappers."""
    x, t, concat, context, options = call
    seen = Look()
    patches = {name: found for name, found in (options.get("patches") or {}).items() if name == "post_input"}
    bare = {name: value for name, value in options.items() if name not in (FORWARD, TEXTS, "wrappers", "callbacks")}
    bare |= {"patches": patches, "patches_replace": {"dit": dict.fromkeys(places(model), seen)}}
    others = {name: value for name, value in extras.items() if name not in way.beside}
    beside = {name: theirs[name] for name in way.beside if name in theirs}
    executor.original(x, t, concat, context, None, bare, **others, **beside)
    return seen


def _replaced(options: Mapping[str, Any], seen: Mapping[Any, Look | None], texts: TwoTexts) -> dict[str, Any]:
    others = dict(options.get("patches_replace") or {})
    before = others.get("dit") or {}
    blocks = {place: TextBlock(texts, look, before.get(place)) for place, look in seen.items()}
    return {**others, "dit": {**before, **blocks}}


def _both(texts: TwoTexts, mine: torch.Tensor, theirs: torch.Tensor, taken: set[int], way: TextWay) -> torch.Tensor:
    """The context of both texts. Filled up, with tokens that nobody is shown, to a length that no other sequence has."""
    texts.own, texts.other = mine.shape[1], theirs.shape[1]
    texts.keys = texts.own + texts.other
    if way.kind == "unet":  # lengthened at each attention instead
        return mine
    while texts.keys in taken:
        texts.keys += 1
    fill = mine.new_zeros(len(mine), texts.keys - texts.own - texts.other, mine.shape[2])
    return torch.cat([mine, theirs.to(mine), fill], 1)


def _lengths(model: Any, x: torch.Tensor, extras: Mapping[str, Any]) -> set[int]:
    """Lengths of the model's own sequences, as far as its inputs tell them."""
    shapes = [tuple(shape) for shape in extras.get("latent_shapes") or ()] or [tuple(x.shape)]
    host = next((HOSTS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in HOSTS), None)
    taken = {size for shape in shapes for size in (*shape, math.prod(shape[2:]))}
    return taken if host is None else taken | {math.prod(grid_of(shapes[0], host.patch(model)))}


def lengthened_masks(way: TextWay, extras: Mapping[str, Any], theirs: Mapping[str, Any], own: int) -> dict[str, torch.Tensor]:
    """Masks over both texts, where one of them has one: everything of the other is text."""
    made = {}
    for name in way.lengthened:
        mine, other = extras.get(name), theirs.get(name)
        like = mine if mine is not None else other
        if like is None:
            continue
        mine = _open(like, own) if mine is None else mine
        other = _open(like, theirs["c_crossattn"].shape[1]) if other is None else other
        made[name] = torch.cat([mine, other.to(mine).expand(*mine.shape[:-1], -1)], -1)
    return made


def _open(like: torch.Tensor, tokens: int) -> torch.Tensor:
    """A mask that hides nothing: ones, or zeros to be added."""
    shape = (*like.shape[:-1], tokens)
    return like.new_zeros(shape) if like.is_floating_point() else like.new_ones(shape)


def _padded(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.cat([mask, _open(mask, tokens - mask.shape[-1])], -1)


def _announcing(options: Mapping[str, Any], texts: TwoTexts, theirs: torch.Tensor) -> dict[str, Any]:
    """ComfyUI's patches of a UNet with one more, last, which lengthens the text and says that its attention comes next."""

    def lengthen(n: Any, context: Any, value: Any, told: Any) -> tuple[Any, Any, Any]:
        if texts.announced:
            raise GenAttnError(
                "NAG must see the attention over the text, and another node answered it: leave one of them out (IP-Adapter and "
                "other replacements of attn2 are such nodes)"
            )
        if len(context) != len(theirs) or context.shape[1] != texts.own:
            raise GenAttnError(
                f"NAG needs the text of the prompt at every cross-attention, {len(theirs)} x {texts.own} tokens, got "
                f"{len(context)} x {context.shape[1]}; another node changes it, or this UNet asks a picture"
            )
        texts.announced = True
        mine, other = theirs.to(context), theirs.to(value)
        return n, torch.cat([context, mine], 1), torch.cat([value, other], 1)

    patches = dict(options.get("patches") or {})
    return {**patches, "attn2_patch": [*patches.get("attn2_patch", ()), lengthen]}
