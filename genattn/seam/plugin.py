"""What travels along the seam: sites, the state of one denoiser forward, one attention call, and what a plugin may do with it.

    stock processor -> dispatch -> [plugin 1 [plugin 2 [... the user's own dense backend]]]

Plugins form a chain in the order in which they were applied; the first is outermost, except that patterns, which answer a
call themselves, stand inside of all that edit answers, and what changes how the dense backend answers inside of patterns. Each
gets the call and `inner`, which runs the rest of the chain. A pattern answers itself or calls `inner` (dense); SoftPAG calls
`inner` and edits the result.
The forwards of the denoiser form a second chain, in which those that run passes of their own (`Plugin.runs_passes`) stand
outside of all others: whoever prepares or edits a pass then sees every one, whatever was applied first.
"""

import inspect
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from genattn.errors import GenAttnError
from genattn.geometry.frame_decay import FrameDecay
from genattn.geometry.token_layout import TokenLayout
from genattn.layouts.site import AttentionSite

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Run:
    """State of one forward of the denoiser, read at its root; captured per forward, so recomputation sees the same.

    step: 0-based index of the sampling step, -1 when unknown. num_steps: steps of the run, None when unknown.
    timestep: the largest entry, in the model's own scale. sigma: noise level where the pipeline or scheduler tells it.
    sigmas: noise levels of all steps of the run; empty where they are not known before.
    pass_name: "cond", "uncond", "cond_uncond" (one batch) or what the pipeline calls it; None when unknown; an extra pass
    adds its own name: "cond+softpag". extra: that name alone, None in the pipeline's own passes.
    layout: tokens of the self/joint attention, None when the family has no adapter; why_no_layout says why.
    sample_layouts: one layout for each sample, where the grids of the batch differ in size and `layout` is None.
    repeats: forwards at this step before this one.
    samples: of the pipeline, before guidance multiplies them in a batch; None where no pipeline is seen running.
    copied: the samples that a plugin further out has put behind the batch once more, all conditional; empty for the pipeline's
    own batch.
    pass_is_told: whether the pipeline named the pass itself; else the name is what pipelines of this family do.
    in_call: whether a call of `pipe` is going on; in a loop of the user's own, what the pipeline keeps is of an earlier call.
    options: per-call options that hold for every plugin; `options_of` adds those of the plugin's own handle.
    model: the denoiser. pipe: the pipeline, None where plugins were applied to a bare model.
    wants_gradient: whether autograd records this forward, so that blocks of it may be computed again in the backward pass.
    notes: what plugins decided in this pass, by identity, for blocks that are computed again in the backward pass.
    """

    step: int = -1
    num_steps: int | None = None
    timestep: float | None = None
    sigma: float | None = None
    pass_name: str | None = None
    layout: TokenLayout | None = None
    options: dict[str, Any] = field(default_factory=dict)
    extra: str | None = None
    sample_layouts: tuple[TokenLayout, ...] = ()
    repeats: int = 0
    samples: int | None = None
    copied: tuple[int, ...] = ()
    pass_is_told: bool = False
    in_call: bool = True
    wants_gradient: bool = False
    why_no_layout: str = ""
    model: "nn.Module | None" = field(default=None, repr=False, compare=False)
    pipe: Any = field(default=None, repr=False, compare=False)
    scoped: Mapping[int, Mapping[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    notes: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)
    sigmas: tuple[float, ...] = field(default=(), repr=False, compare=False)
    enter_extra: "Callable[[Run, str], AbstractContextManager[Run]] | None" = field(default=None, repr=False, compare=False)

    @property
    def fraction(self) -> float | None:
        """Position in the run, 0 at the first step and below 1 at the last; None when the number of steps is unknown."""
        return None if self.num_steps is None or self.step < 0 else self.step / self.num_steps

    def options_of(self, plugin: "Plugin") -> Mapping[str, Any]:
        """The options that hold for `plugin` in this forward: its handle's, overridden by the call's."""
        return self.scoped.get(id(plugin), self.options)

    def extra_pass(self, name: str) -> "AbstractContextManager[Run]":
        """Around an extra `inner(...)` of `Plugin.forward`: the attention calls inside see pass_name "cond+name".

        The extra pass gets its own cache context, so that First Block Cache and its kin keep separate states.
        """
        if self.enter_extra is not None:
            return self.enter_extra(self, name)
        return nullcontext(replace(self, pass_name=f"{self.pass_name or 'pass'}+{name}", extra=name, notes={}))


@dataclass
class CallRecord:
    """What became of one attention call; plugins write it, `report()` adds it up.

    wants_lse: a plugin further out would like to know the log-sum-exp. lse: [B, Sq, H], where whoever answered could tell it.
    """

    sparse: bool = False
    density: float = 1.0
    reason: str = ""
    edited: bool = False
    tail: str | None = None
    wants_lse: bool = False
    lse: torch.Tensor | None = None

    def ran_sparse(self, density: float, tail: str | None = None) -> None:
        """The call was answered under a pattern that computed `density` of the scores, in (0, 1].

        tail: what stood in for the others.
        """
        self.sparse, self.density, self.tail = True, density, tail

    def stayed_dense(self, reason: str) -> None:
        """The call went to the dense backend, for this reason."""
        self.reason = reason


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention core, heads-last: query [B, Sq, H, D], key and value [B, Sk, Hk, D].

    mask: as the processor gave it (None, bool or additive, [B, Sk], [B, 1, 1, Sk], [B, 1, Sq, Sk], [B, H, Sq, Sk], or flex's
    BlockMask). layout: segments of this call's sequence when known (may differ from run.layout: spatial or temporal sites).
    head_offset: index of the first head, when context parallelism has left this process only some of them.
    decay: what whoever answers without the dense backend must do to the logits; where the dense backend answers, the plugin
        that asks for it does it.
    only_first: the queries are the first Sq of the layout's Sk tokens (ring context parallelism), in a call that would have
        all of them on one process.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    scale: float | None
    is_causal: bool
    enable_gqa: bool
    site: AttentionSite
    run: Run
    layout: TokenLayout | None
    record: CallRecord = field(default_factory=CallRecord)
    head_offset: int = 0
    only_first: bool = False
    decay: FrameDecay | None = None

    @property
    def tokens(self) -> int:
        """Queries of the call as one process would make it."""
        return self.key.shape[1] if self.only_first else self.query.shape[1]

    def with_tensors(self, **changes: Any) -> "AttentionCall":
        """A copy with some fields replaced."""
        return replace(self, **changes)


Inner = Callable[[AttentionCall], torch.Tensor]


class Plugin(ABC):  # noqa: B024
    """What a user applies. Subclasses override what they need; settings are checked in their constructors and in `attach`."""

    option_names: ClassVar[frozenset[str]] = frozenset()
    """Keys that may come in the per-call options, besides `enabled` and `num_steps`."""
    answers: ClassVar[bool] = False
    """Whether `attention` computes the answer itself instead of editing what `inner` gives; such plugins stand innermost."""
    serves_dense: ClassVar[bool] = False
    """Whether `attention` changes how the dense backend answers; such plugins stand inside of those that answer themselves."""
    runs_passes: ClassVar[bool] = False
    """Whether `forward` runs the denoiser more than once for one answer; such forwards stand outermost."""

    def attach(self, model: "nn.Module", sites: Sequence[AttentionSite]) -> None:  # noqa: B027
        """Called once per denoiser before anything is changed; raise GenAttnError if this model cannot be served."""

    def detach(self, model: "nn.Module") -> None:  # noqa: B027
        """Called once per denoiser when the handle is removed; drop what was kept for it."""

    def wants(self, site: AttentionSite) -> bool:
        """Whether `attention` is to be called at `site`; everything else stays untouched."""
        return site.kind in ("self", "joint")

    def check_options(self, options: Mapping[str, Any]) -> None:  # noqa: B027
        """Raise GenAttnError for a per-call option of this plugin whose value is out of range."""

    def begin_run(self, run: Run) -> None:  # noqa: B027
        """Called before the first forward of every sampling run; forget what belongs to the last one."""

    def why_idle(self, run: Run) -> str:
        """Why no step of the run that starts with `run` is one to act at; empty where some is, or where nobody can tell yet."""
        return ""

    @property
    def touches_attention(self) -> bool:
        """Whether `attention` ever does more than hand calls on."""
        return type(self).attention is not Plugin.attention

    def why_not_split(self, split: str) -> str:
        """Why it cannot act where a sequence is split over devices; empty when it can.

        split: "ulysses", all tokens and an equal number of heads on each; "ulysses_anything", tokens and heads that need not
        divide; "ring", some of the queries and all keys (`AttentionCall.only_first`).
        """
        return "" if split == "ulysses" else "it needs whole sequences and as many heads on every device; use plain Ulysses"

    def foresee(self, call: AttentionCall) -> None:  # noqa: B027
        """Called with the first call of a run, also where `stays_out`; raise GenAttnError for what later ones would fail at."""

    def stays_out(self, run: Run, site: AttentionSite, tokens: int) -> str:
        """Why `attention` would only hand a call of `tokens` queries on to `inner`; empty when it has to be asked.

        When every plugin at a site stays out, the stock core is called directly, and the last one's reason is counted.
        """
        return ""

    def decay_at(self, call: AttentionCall) -> FrameDecay | None:
        """What a pattern further out is to do to the logits of a call that it answers; see `AttentionCall.decay`."""
        return None

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """Answer one attention call, [B, Sq, H, D]."""
        return inner(call)

    def refuse_recomputed(self, run: Run) -> None:
        """Raise GenAttnError for a call of a pass that this plugin noted, without what it had in the forward: the call is
        computed again in the backward pass."""
        if id(self) in run.notes:
            raise GenAttnError(
                f"a block that {type(self).__name__} acted on is computed again in a backward pass (activation checkpointing), "
                f"where what it needs is gone; train without {type(self).__name__} or without checkpointing"
            )

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Callable[..., Any]) -> Any:
        """Answer one forward of the denoiser; `inner(*args, **kwargs)` runs it. Guidance adds its passes here."""
        return inner(*args, **kwargs)

    def describe(self) -> dict[str, Any]:
        """Settings and counters for `report()`, JSON-ready."""
        return {"plugin": type(self).__name__}

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-ready, for `PluginConfig`. Raises GenAttnError where a plugin has no saved form."""
        raise GenAttnError(f"{type(self).__name__} cannot be saved: it must name its settings; define settings()")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Plugin":
        """A fresh plugin from what `settings` gave; lists may stand for tuples."""
        return cls(**settings)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy, and what is unpickled in another process, is a fresh plugin of the same settings, on no model."""
        try:
            return type(self).from_settings, (self.settings(),)
        except GenAttnError:  # it names no settings: its own state, as Python copies it
            return super().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        """The constructor's call, with what differs from its defaults."""
        try:
            given = self.settings()
        except GenAttnError:
            return super().__repr__()
        usual = {name: parameter.default for name, parameter in inspect.signature(type(self)).parameters.items()}
        told = [f"{name}={value!r}" for name, value in given.items() if name in usual and value != usual[name]]
        return f"{type(self).__name__}({', '.join(told)})"


def in_chain(plugin: Plugin) -> int:
    """Where a plugin stands in a chain, outermost first: 0, 1 for one that answers, 2 for one that serves the dense backend."""
    return 2 if plugin.serves_dense else int(plugin.answers)


def told_of_decay(call: AttentionCall, plugins: Sequence[Plugin]) -> AttentionCall:
    """The call with the decay that one of the plugins at its site asks for."""
    asked = (plugin.decay_at(call) for plugin in plugins if not is_off(plugin, call.run))
    decay = next((found for found in asked if found is not None), None)
    return call if decay is None else call.with_tensors(decay=decay)


OFF = "switched off (enabled=False)"


def is_off(plugin: Plugin, run: Run) -> bool:
    """Whether the options of this forward switch `plugin` off."""
    return not run.options_of(plugin).get("enabled", True)


def name_of(plugin: Plugin) -> str:
    """What a user calls it: the pattern of one that applies a pattern, else its class."""
    return type(getattr(plugin, "pattern", plugin)).__name__


def idle_note(plugin: Plugin, run: Run) -> str:
    """What to tell where `plugin` has no step to act at in the run that starts with `run`; empty where it has, or is off."""
    reason = "" if is_off(plugin, run) else plugin.why_idle(run)
    return reason and f"{name_of(plugin)} acts at no step of a run of {run.num_steps}: {reason}"


def why_all_stay_out(plugins: Sequence[Plugin], run: Run, site: AttentionSite, queries: int) -> str:
    """The reason for which none of the plugins at a site has anything to do with a call; empty when one must be asked."""
    reason = ""
    for plugin in plugins:
        reason = OFF if is_off(plugin, run) else plugin.stays_out(run, site, queries)
        if not reason:
            break
    return reason
