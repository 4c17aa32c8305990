"""NAG: a negative prompt inside the attention over text (arXiv 2505.21179), for distilled models and guidance scale 1.

`genattn.apply(pipe, NAG("red"))`: wherever the image looks at the text, it looks at the negative text as well, and the two
answers are joined by `formula.guide`. Cross-attention gets a few more keys; in joint attention the negative text runs along
as a second text (`carriers`). The model itself runs once.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.guidance.heads.names import HeadsLike, checked_heads, plain_heads, resolve_heads
from genattn.guidance.nag import answer
from genattn.guidance.nag.carriers import HERE, Carried, Carrier, Passer, carrying, own_caches
from genattn.guidance.nag.cut import Cut
from genattn.guidance.nag.defaults import strength_for
from genattn.guidance.nag.encode import Texts, count_of, encode, for_samples
from genattn.guidance.nag.negative import check_names, checked_prompts, samples_of
from genattn.guidance.nag.places import blocks_of, text_sites
from genattn.guidance.nag.streams import TextWay
from genattn.guidance.nag.ways import way_of, why_not_carried
from genattn.guidance.passes.block_swap import swapped
from genattn.guidance.passes.delta import Window
from genattn.guidance.passes.pass_role import PassReader, PassRole, role_among_others
from genattn.layouts.families import family_of
from genattn.layouts.site import AttentionSite
from genattn.seam.denoiser import INJECTION, is_compiled_whole, without_cache_dit
from genattn.seam.plugin import AttentionCall, Inner, Plugin, Run
from genattn.seam.processors import stock_class
from genattn.seam.report import GenAttnWarning
from genattn.seam.root_inputs import RootInputs
from genattn.settings import flag, refuse

Denoise = Callable[..., Any]


@dataclass
class _Model:
    """One denoiser.

    way: of its text. inputs: reader of its arguments. reader: of its passes. heads: bool [H] per depth. doubled: see
    `Carried`. verified: whether a guided forward has reached its attention.
    """

    way: TextWay
    inputs: RootInputs
    reader: PassReader
    heads: dict[int, torch.Tensor]
    doubled: bool
    verified: bool = False


class NAG(Plugin):
    """Normalized attention guidance on any denoiser with text.

    Args:
        negative_prompt: what is to be kept out, or one such text per prompt.
        scale: s, at least 1; 1 changes nothing. None for the family's released value.
        tau: the most by which a token's answer may grow, at least 1. None for the released value, 2.5.
        alpha: share of the guided answer, in [0, 1]. None for the family's released value.
        start: first moment, fraction of the steps in [0, 1].
        stop: last moment, fraction of the steps, included.
        heads: guide these heads only, e.g. "L3,L7H2"; None for all.
        negative_embeds: instead of a prompt, the encoded text: [n, T, C], or denoiser inputs by name, n texts each.
        encode: further arguments of the pipeline's `encode_prompt`, such as its template.
        layout: which samples are conditional, "auto" or one of `genattn.guidance.passes.pass_role.LAYOUTS`.
        share: in joint attention let the image look at itself once for both texts, where the backend tells its log-sum-exp;
            False asks twice, the definition word for word.
    """

    option_names: ClassVar[frozenset[str]] = frozenset(("nag_scale",))

    def __init__(
        self,
        negative_prompt: str | Sequence[str] | None = None,
        scale: float | None = None,
        tau: float | None = None,
        alpha: float | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        heads: HeadsLike | None = None,
        *,
        negative_embeds: torch.Tensor | Mapping[str, Any] | None = None,
        encode: Mapping[str, Any] | None = None,
        layout: str = "auto",
        share: bool = True,
    ) -> None:
        self.prompts = checked_prompts(negative_prompt, negative_embeds)
        self.given = {"scale": scale, "tau": tau, "alpha": alpha}
        strength_for("", self.given)
        self.window = Window(start, stop)
        self.heads = None if heads is None else checked_heads(heads)
        if encode is not None and not isinstance(encode, Mapping):
            raise refuse("encode", encode, "a dict of arguments of the pipeline's encode_prompt, or None")
        self.embeds, self.encode, self.layout = negative_embeds, dict(encode or {}), layout
        PassReader(layout)
        self.share, self._alone = flag("share", share), set[tuple[str, str]]()
        self.counts: Counter[str] = Counter()
        self._models: WeakKeyDictionary[nn.Module, _Model] = WeakKeyDictionary()
        self._texts: dict[Any, Texts] = {}
        self._sites: set[tuple[str, str]] = set()
        self._used: dict[str, dict[str, float]] = {}
        self._told = False

    # ---- the plugin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """See Plugin: fresh, with encoded texts too."""
        if self.embeds is None:
            return super().__reduce_ex__(protocol)
        rest: dict[str, Any] = {**self.given, "start": self.window.start, "stop": self.window.stop, "heads": self.heads}
        rest |= {"negative_embeds": self.embeds, "encode": self.encode, "layout": self.layout, "share": self.share}
        return partial(type(self), **rest), ()

    def settings(self) -> dict[str, Any]:
        """See Plugin.settings; raises GenAttnError for encoded texts, which no file of settings holds."""
        if self.embeds is not None:
            raise GenAttnError("NAG with negative_embeds cannot be saved: settings hold no tensors; name negative_prompt")
        prompts: Any = self.prompts[0] if len(self.prompts) == 1 else list(self.prompts)
        window = {"start": self.window.start, "stop": self.window.stop}
        heads = None if self.heads is None else plain_heads(self.heads)
        rest = {"heads": heads, "encode": self.encode or None, "layout": self.layout, "share": self.share}
        return {"negative_prompt": prompts, **self.given, **window, **rest}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise GenAttnError for a scale below 1."""
        if "nag_scale" in options:
            strength_for("", {**self.given, "scale": options["nag_scale"]})

    def attach(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        """Find where the text goes; raises GenAttnError if this model has none, or none that is known."""
        name, way = model.__class__.__name__, way_of(model)
        texts = text_sites(sites)
        if way is None or not texts:
            has = why_not_carried(model) or ("where its text goes is not known" if texts else "its attention sees no text")
            raise GenAttnError(
                f"NAG needs a model whose image looks at text, got {name}: {has}; see docs/nag.md for the families"
            )
        if all(site.unreachable for site in texts):
            raise GenAttnError(f"NAG cannot reach the text of {name}: {texts[0].unreachable}")
        layers = {site.depth: site.heads for site in reversed(texts)}
        heads: dict[int, torch.Tensor] = {}
        if self.heads is not None:
            for layer, head in resolve_heads(self.heads, layers):
                heads.setdefault(layer, torch.zeros(layers[layer], dtype=torch.bool))[head] = True
            texts = [site for site in texts if site.depth in heads]
        check_names(self.embeds, model, name)
        self._models[model] = _Model(
            way,
            RootInputs(stock_class(model), family_of(model)),
            PassReader(self.layout),
            heads,
            any(stream.images_before for stream in way.streams)
            and any(getattr(model.get_submodule(site.name), "add_k_proj", None) is not None for site in texts),
        )
        self._used[name] = vars(strength_for(name, self.given))
        # in joint attention the negative text needs every layer to go on; heads that are not meant keep their answer
        self._sites |= {(site.model, site.name) for site in text_sites(sites)}

    def detach(self, model: nn.Module) -> None:
        """Forget it."""
        self._models.pop(model, None)

    def wants(self, site: AttentionSite) -> bool:
        """Attention over text."""
        return (site.model, site.name) in self._sites

    def why_idle(self, run: Run) -> str:
        """See Plugin.why_idle."""
        return self.window.why_idle(run)

    def begin_run(self, run: Run) -> None:
        """Forget the last run's texts and passes."""
        self._texts.clear()
        self._alone.clear()
        for known in self._models.values():
            known.reader, known.verified = PassReader(self.layout), False

    def stays_out(self, run: Run, site: AttentionSite, tokens: int) -> str:
        """Outside of a forward that carries the negative text there is nothing to do."""
        if HERE.carried is not None:
            return ""
        self.refuse_recomputed(run)
        return "NAG is not at work in this pass"

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """The answers for both texts, joined."""
        carried = HERE.carried
        if carried is None:
            self.refuse_recomputed(call.run)
            return inner(call)
        call.run.notes[id(self)] = True
        if not answer.is_carried(call, carried):
            return answer.untouched(call, inner)
        assert carried.here is not None
        known = self._models[call.run.model]  # type: ignore[index]
        strength = strength_for(type(call.run.model).__name__, self._given(call.run))
        heads = known.heads.get(call.site.depth, torch.zeros(call.site.heads, dtype=torch.bool)) if known.heads else None
        guided = carried.guided
        if carried.here.one_by_one:
            sample = carried.calls.get(call.site.name, 0) % len(guided)
            carried.calls[call.site.name] = sample + 1
            guided = guided[sample : sample + 1]
        blend = answer.blender(call, guided, strength, heads, answer.total_of(call))
        carried.hits += 1
        call.record.edited = True
        if carried.here.cross:
            return answer.cross(call, inner, carried, blend)
        if carried.here.one_by_one:
            return answer.one_by_one(call, inner, carried, sample, blend)
        place = (call.site.model, call.site.name)
        asked = answer.keys_only if carried.here.keys_only else answer.joint
        out = asked(call, inner, carried, blend, self.share and place not in self._alone)
        if call.site.name in carried.twice:
            self._alone.add(place)  # nobody tells the log-sum-exp here: do not ask again in this run
        return out

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Denoise) -> Any:
        """The pipeline's forward, with the negative text carried along in the conditional samples."""
        if strength_for(type(run.model).__name__, self._given(run)).is_off or not self.window.contains(run):
            return inner(*args, **kwargs)
        assert run.model is not None
        self._refuse_company(run.model)
        known = self._models[run.model]
        told = known.inputs.bind(args, kwargs)
        reason = known.way.refuses(run.model, told) if known.way.refuses is not None else ""
        if reason:
            raise GenAttnError(f"NAG cannot carry a second text through {type(run.model).__name__} here: {reason}")
        role = role_among_others(known.reader, run, args, kwargs)
        if role.kind != "cond":
            self._tell_if_same(run, known, told, role)
            return inner(*args, **kwargs)
        mine = told.get(known.way.inputs[0])
        if self.embeds is None:
            samples_of(role, len(self.prompts), mine)  # a wrong number is refused before anything is encoded
        texts = self._encoded(run, known, told)
        samples = samples_of(role, count_of(texts, known.way), mine)
        self._tell_if_same(run, known, told, role)
        theirs = for_samples(texts, samples, told, known.way)
        theirs |= known.way.prepare(run.model, told, theirs) if known.way.prepare is not None else {}
        theirs = {name: value for name, value in theirs.items() if name in known.inputs.names}
        guided = torch.zeros(role.batch, dtype=torch.bool)
        guided[role.rows] = True
        carried = Carried(known.way, guided, {}, told, known.way.fresh({**told, **theirs}), known.doubled)
        carried.image = known.way.image_tokens(run.model, told) if known.way.image_tokens is not None else None
        with own_caches(run, self.window.always):
            if known.way.streams[0].stack == "":
                out = self._through_root(known, carried, theirs, args, kwargs, inner)
            else:
                out = self._through_blocks(run, known, carried, theirs, args, kwargs, inner)
        self._verify(run, known, carried)
        return out

    # ---- the two ways

    def _through_root(
        self, known: _Model, carried: Carried, theirs: Texts, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Denoise
    ) -> Any:
        """UNets hand the text on as it is: it is made longer where it comes in."""
        stream = known.way.streams[0]
        mine, own = carried.inputs["encoder_hidden_states"], theirs["encoder_hidden_states"]
        carried.cut = Cut(mine.shape[1], mine.shape[1], own.shape[1], mine.shape[1], True)
        carried.here = stream
        changed = {"encoder_hidden_states": torch.cat([mine, own], 1)}
        for name, extend in stream.extend.items():
            changed[name] = extend(carried.inputs.get(name), theirs.get(name), carried.cut)
        changed = {name: value for name, value in changed.items() if value is not None}
        with carrying(carried):
            return _called(inner, known.inputs.names, args, kwargs, changed)

    def _through_blocks(
        self,
        run: Run,
        known: _Model,
        carried: Carried,
        theirs: Texts,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inner: Denoise,
    ) -> Any:
        assert run.model is not None
        _refuse_whole_compile(run.model)
        carried.layout, _ = known.inputs.layout(run.model, {**carried.inputs, **theirs})
        passers = {place: Passer(block, gives) for place, block, gives in blocks_of(run.model, known.way, passed=True)}
        with run.extra_pass("nag"), without_cache_dit(run.model), swapped(run.model, passers):
            _called(inner, known.inputs.names, args, kwargs, theirs)
        carried.theirs = {place: passer.__dict__["seen"] for place, passer in passers.items()}
        streams = {stream.stack: stream for stream in known.way.streams}
        carriers = {
            place: Carrier(block, place, streams[place[0]], carried)
            for place, block, _ in blocks_of(run.model, known.way, passed=False)
        }
        with swapped(run.model, carriers):
            return inner(*args, **kwargs)

    # ---- parts

    def _given(self, run: Run) -> dict[str, Any]:
        return {**self.given, "scale": run.options_of(self).get("nag_scale", self.given["scale"])}

    def _encoded(self, run: Run, known: _Model, told: Mapping[str, Any]) -> Texts:
        if isinstance(self.embeds, torch.Tensor):
            return {known.way.inputs[0]: self.embeds}
        if self.embeds is not None:
            return dict(self.embeds)
        mine = told.get(known.way.inputs[0])
        key = (type(run.model).__name__, mine.shape[1] if isinstance(mine, torch.Tensor) else None)
        if key not in self._texts:
            self._texts[key] = encode(run.pipe, run.model, self.prompts, told, self.encode)
            self.counts["encoded"] += 1
        return self._texts[key]

    def _tell_if_same(self, run: Run, known: _Model, told: Mapping[str, Any], role: PassRole) -> None:
        """Warn once when the pipeline's own guidance already steers away from this very text."""
        if self._told or (role.kind == "cond" and not len(role.others)) or run.extra is not None:
            return
        rows = role.others if role.kind == "cond" else torch.arange(role.batch)
        mine = told.get(known.way.inputs[0])
        own = self._encoded(run, known, told)[known.way.inputs[0]]
        if not isinstance(mine, torch.Tensor) or not isinstance(own, torch.Tensor) or mine.shape[1:] != own.shape[1:]:
            return
        if torch.equal(mine[rows[0]], own[0].to(mine)):
            self._told = True
            warnings.warn(
                "genattn: the pipeline's classifier-free guidance already has this negative prompt; with NAG it acts twice. "
                "Use guidance scale 1, or another text for NAG",
                GenAttnWarning,
                stacklevel=2,
            )

    def _refuse_company(self, model: nn.Module) -> None:
        """Refuse, before any work, plugins on the same model that NAG cannot act beside, and blocks that run twice."""
        if getattr(model, "gradient_checkpointing", False) and torch.is_grad_enabled():
            raise GenAttnError(
                f"the negative text is gone when a block is computed again in a backward pass, got {type(model).__name__} "
                "with gradient checkpointing; train without NAG, or call disable_gradient_checkpointing()"
            )
        injection = model.__dict__.get(INJECTION)
        for plugin in [p for handle in injection.handles for p in handle.plugins] if injection is not None else []:
            if getattr(plugin, "mode", None) == "replace_uncond":
                raise GenAttnError(
                    f"NAG must not be combined with {type(plugin).__name__}(mode='replace_uncond'): that one gives up the "
                    "unconditional pass in which NAG has no say; use mode='extra'"
                )
            if isinstance(plugin, NAG) and plugin is not self:
                raise GenAttnError("a model takes one NAG, got two; name both texts in one negative prompt")

    def _verify(self, run: Run, known: _Model, carried: Carried) -> None:
        """Raise if nothing was guided in the first such forward; caches may leave out blocks later."""
        self.counts["guided_forwards"] += 1
        if not known.verified and not carried.hits:
            raise GenAttnError(
                f"NAG must reach attention over text, got no such call in {type(run.model).__name__}; "
                "a processor or cache of another kind may stand in its place"
            )
        known.verified = True
        self.counts["guided_calls"] += carried.hits

    def describe(self) -> dict[str, Any]:
        """Settings and what happened so far, JSON-ready."""
        return {
            "plugin": "NAG",
            "negative_prompt": list(self.prompts),
            "strength": self._used,
            "window": self.window.describe(),
            "heads": None if self.heads is None else plain_heads(self.heads),
            "image_asked_twice_at": sorted(name for _, name in self._alone),
            "counts": dict(self.counts),
        }


def _called(inner: Denoise, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], changed: Texts) -> Any:
    """`inner` with some arguments exchanged."""
    given = tuple(changed.get(name, value) for name, value in zip(names, args))
    rest = {name: value for name, value in changed.items() if name not in names[: len(args)]}
    return inner(*given, **{**kwargs, **rest})


def _refuse_whole_compile(model: nn.Module) -> None:
    if is_compiled_whole(model):
        raise GenAttnError(
            f"NAG stands around the blocks, got {type(model).__name__} compiled as a whole; "
            "compile its blocks instead (compile_repeated_blocks)"
        )
