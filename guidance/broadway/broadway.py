"""BroadWay (ByTheWay): temporal self-guidance and motion enhancement as a plugin.

    genattn.apply(pipe, BroadWay.preset("animatediff"))        motion modules, as published
    genattn.apply(pipe, BroadWay(energy="+20%", alpha=0.3))    video DiTs, through the frame marginal

In the first steps, the map of every guided attention is pulled towards the map of an early block (self-guidance, steadier
structure) and its high temporal frequencies are amplified (more motion), never ending below the energy it began with.
Bu et al., CVPR 2025. Motion modules: `motion`; full three-dimensional attention: `frame_marginal`.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.functional.masks import key_mask
from genattn.geometry.token_layout import TokenLayout
from genattn.guidance.broadway.blocks import GuidedSites, checked_block, checked_blocks, choose_sites
from genattn.guidance.broadway.calls import (
    clip_shape,
    conditional_part,
    entries,
    picked,
    put_together,
    sample_groups,
    samples_in,
)
from genattn.guidance.broadway.forward_maps import ForwardMaps, batch_of, no_anchor
from genattn.guidance.broadway.frame_marginal import EditedAttention, edited_attention
from genattn.guidance.broadway.frame_marginal_approx import pooled_edit
from genattn.guidance.broadway.key_frames import KeyFrames, key_frames
from genattn.guidance.broadway.motion import motion_attention, motion_map
from genattn.guidance.broadway.neighbours import has_wrapper_outside, neighbours_inside, sparse_plan
from genattn.guidance.broadway.report import BroadWayReport
from genattn.guidance.broadway.temporal_map import EditScalars, MapEdit, mean_scalars, parse_energy
from genattn.guidance.passes.delta import Window
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.layouts.site import AttentionSite
from genattn.patterns.as_json import plain
from genattn.seam.plugin import AttentionCall, Inner, Plugin, Run
from genattn.settings import flag, number

METHODS = ("exact", "pooled")
PRESETS: dict[str, dict[str, Any]] = {
    "animatediff": {"alpha": 0.6, "beta": 1.5, "tau": 7.0},
    "videocrafter2": {"alpha": 0.1, "beta": 10.0, "tau": 7.0},
}


class BroadWay(Plugin):
    """Temporal self-guidance for video models. Per-call options: alpha, beta, energy.

    Args:
        alpha: how far maps are pulled to the anchor's, in [0, 1], or "auto" (from the measured disparity).
        beta: factor of the high temporal frequencies, in [0, 100], or "auto" (only what keeps the energy).
        tau: half-width of that band in bins of a 16-frame clip; scales with the clip unless `tau_frames` is None.
        tau_frames: the clip length tau is counted at, or None for bins as they are.
        energy: "+20%", "-15%" or 0.2: aim at this change of the energy instead of giving beta.
        keep_energy: raise beta where the energy would fall below what it was; off for beta < 1.
        blocks: names, positions or ranges ("14-20") of the guided blocks; None: up_blocks.1 and later on UNets, the second
            half of the blocks on DiTs.
        anchor: "auto", "first", "mean" (DiTs), a block name or position; must run before the guided blocks.
        start, stop: guided part of the run, fractions in [0, 1]; step i of n is guided when start <= i / n < stop.
        sigma_start, sigma_stop: guided noise levels, from sigma_start down to sigma_stop; None for no bound.
        conditional: samples on which energies are measured: "auto" (the second half of an [uncond; cond] batch, all in the
            conditional pass of two), "all", or (first, last) as fractions of the batch. An unconditional pass of its own
            takes over the beta of the conditional one.
        method: DiTs only. "exact", or "pooled": the change estimated from averages and added to the attention's own output.
        pool: for "pooled", side of the cells that keys and values are averaged over, >= 1; at most a whole frame.
        keep_first_frame: leave the first latent frame alone (one frame, not four, in a causal autoencoder).

    Raises:
        GenAttnError: for settings out of range, and, when applied, for models that it cannot guide.
    """

    option_names = frozenset(("alpha", "beta", "energy"))

    def __init__(
        self,
        alpha: float | Literal["auto"] = 0.6,
        beta: float | Literal["auto"] = 1.5,
        tau: float = 7.0,
        *,
        tau_frames: int | None = 16,
        energy: str | float | None = None,
        keep_energy: bool = True,
        blocks: Sequence[str | int] | None = None,
        anchor: str | int = "auto",
        start: float = 0.0,
        stop: float = 0.2,
        sigma_start: float | None = None,
        sigma_stop: float | None = None,
        conditional: str | tuple[float, float] = "auto",
        method: str = "exact",
        pool: int = 2,
        keep_first_frame: bool = False,
    ) -> None:
        self.edit = MapEdit(alpha, beta, tau, tau_frames, parse_energy(energy), keep_energy)
        start, stop = (number(n, v, 0.0, 1.0, "a share of the steps in [0, 1]") for n, v in (("start", start), ("stop", stop)))
        if stop <= start:
            raise GenAttnError(f"stop must be above start, got start={start} and stop={stop}; 0 and 0.2 guide the first fifth")
        # a window keeps both of its ends; a fifth of fifty steps is ten of them, not eleven
        self.window = Window(start, max(start, stop - 1e-8), sigma_start, sigma_stop)
        conditional = tuple(conditional) if isinstance(conditional, list) else conditional  # as JSON gives it
        if conditional not in ("auto", "all") and not (
            isinstance(conditional, tuple) and len(conditional) == 2 and 0.0 <= conditional[0] < conditional[1] <= 1.0
        ):
            raise GenAttnError(
                f"conditional must be 'auto', 'all' or (first, last) with 0 <= first < last <= 1, got {conditional!r}"
            )
        if method not in METHODS:
            raise GenAttnError(f"method must be one of {', '.join(METHODS)}, got {method!r}; 'exact' is the definition")
        if isinstance(pool, bool) or not isinstance(pool, int) or pool < 1:
            raise GenAttnError(f"pool must be an integer >= 1, got {pool!r}; 1 averages nothing")
        self.blocks, self.anchor, self._stop = checked_blocks(blocks), checked_block("anchor", anchor), stop
        self.conditional, self.method, self.pool = conditional, method, pool
        self.keep_first_frame = flag("keep_first_frame", keep_first_frame)
        self.report = BroadWayReport()
        self._guided: WeakKeyDictionary[nn.Module, GuidedSites] = WeakKeyDictionary()
        self._forwards: dict[tuple[int, int], ForwardMaps] = {}
        self._last: dict[tuple[int, int], tuple[int, ForwardMaps]] = {}
        self._betas: dict[tuple[int, int, str, int], tuple[int, list[torch.Tensor]]] = {}
        self._frames: dict[tuple[TokenLayout, torch.device], KeyFrames] = {}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "BroadWay":
        """Published settings of a base model, with changes: `BroadWay.preset("animatediff", beta=1.2)`.

        Raises:
            GenAttnError: for an unknown name.
        """
        if name not in PRESETS:
            raise GenAttnError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}; or give alpha, beta and tau")
        return cls(**{**PRESETS[name], **changes})

    def settings(self) -> dict[str, Any]:
        """See Plugin.settings."""
        names = ("blocks", "anchor", "conditional", "method", "pool", "keep_first_frame")
        own = {name: getattr(self, name) for name in names}
        return plain({**vars(self.edit), **self.window.settings(), "stop": self._stop, **own})

    def attach(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        """Choose the guided attentions of a denoiser.

        Raises:
            GenAttnError: for a model without temporal or full video attention, unknown blocks, split inference.
        """
        split = [name for name, m in model.named_modules() if type(m).__name__ == "SplitInferenceModule"]
        if split:
            raise GenAttnError(
                f"temporal guidance needs whole attention calls, got split inference at {split[0]!r}; "
                "call pipe.disable_free_noise_split_inference() or build the pipeline without it"
            )
        self._guided[model] = choose_sites(sites, self.blocks, self.anchor)

    def wants(self, site: AttentionSite) -> bool:
        """The guided attentions and their anchors."""
        return any(site.name in guided.anchor_of for guided in self._guided.values())

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise GenAttnError for an alpha, beta or energy out of range."""
        self._edit_with(options)

    def describe(self) -> dict[str, Any]:
        """Settings, guided blocks and the means of what was measured."""
        settings = {f.name: getattr(self.edit, f.name) for f in fields(self.edit)}
        names = ("conditional", "method", "pool", "keep_first_frame")
        return {
            "plugin": "BroadWay",
            **settings,
            **{name: getattr(self, name) for name in names},
            "window": self.window.describe(),
            "blocks": list(dict.fromkeys(block for guided in self._guided.values() for block in guided.blocks)) or None,
            "guided_calls": len(self.report),
            "measured": self.report.by_block(),
        }

    def detach(self, model: nn.Module) -> None:
        """Forget the denoiser's blocks."""
        self._guided.pop(model, None)
        self._betas.clear()
        self._last.clear()
        self._frames.clear()

    def _edit_with(self, options: Mapping[str, Any]) -> MapEdit:
        changes = {name: options[name] for name in self.option_names if name in options}
        if not changes:
            return self.edit
        if "energy" in changes:
            changes["energy"] = parse_energy(changes["energy"])
        return replace(self.edit, **changes)

    def why_idle(self, run: Run) -> str:
        """See Plugin.why_idle."""
        return self.window.why_idle(run)

    def begin_run(self, run: Run) -> None:
        """Forget the factors of the last run; what was measured stays in `report`."""
        self._betas.clear()
        self._last.clear()

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Callable[..., Any]) -> Any:
        """Run one forward of the denoiser; maps live as long as it does."""
        guided = None if run.model is None else self._guided.get(run.model)
        if guided is None or not self.window.contains(run):
            return inner(*args, **kwargs)
        clip = clip_shape(args, kwargs)
        batch = clip.batch if clip else batch_of(args, kwargs)
        told = batch if clip or run.copied else None
        part = conditional_part(self.conditional, run.pass_name, told, run.model, run.copied)
        place = _place_of(run)
        step, last = self._last.get(place, (None, None))
        before = last if run.extra else None  # the pass that an extra one belongs to
        shared = before.maps if before is not None and step == run.step else {}
        own = run.samples or len(run.copied) or samples_in(part, run.pass_name, batch)
        samples = own if before is None else before.samples
        self._forwards[place] = state = ForwardMaps(part, clip, guided, maps=dict(shared), samples=samples)
        try:
            return inner(*args, **kwargs)
        finally:
            del self._forwards[place]
            if run.extra is None:
                self._last.pop(place, None)
                if has_wrapper_outside(run, self):
                    self._last[place] = (run.step, state.of_main_pass())

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """Answer one guided attention, [B, S, H, D]; outside the window, hand it on."""
        state = self._forwards.get(_place_of(call.run))
        if state is None or call.site.name not in state.guided.anchor_of:
            self.refuse_recomputed(call.run)
            return inner(call)
        call.run.notes[id(self)] = True
        if call.is_causal:
            raise GenAttnError(
                f"temporal guidance needs attention in both directions, got a causal call at {call.site.name!r}; "
                "leave the block out with `blocks`"
            )
        key = (call.run.extra, call.site.name)
        index = state.calls[key]
        state.calls[key] += 1
        answer = self._motion if state.guided.temporal else self._clip
        call.record.edited = True
        return answer(call, inner, state, index)

    def _motion(self, call: AttentionCall, inner: Inner, state: ForwardMaps, index: int) -> torch.Tensor:
        """A motion module: [B * h * w, F, H, D]."""
        name = call.site.name
        if call.mask is not None or call.query.shape[1] < 2 or call.query.shape[1] != call.key.shape[1]:
            raise GenAttnError(
                f"a frame-to-frame attention needs at least 2 frames and no mask, got {call.query.shape[1]} queries, "
                f"{call.key.shape[1]} keys and mask={call.mask is not None} at {name!r}"
            )
        rows = motion_map(call.query, call.key, call.scale)
        source = state.guided.anchor_of[name]
        anchor = None
        if name == source:
            state.maps[call.run.extra, name, index] = rows
        else:
            anchor = state.motion_anchor(rows, call.run.extra, source, index)
        groups = state.sequences(rows)
        edit = self._edit_with(call.run.options_of(self))
        outs, scalars = [], []
        for place, group in enumerate(groups):
            mine = picked(rows, group)
            assert mine is not None
            out, numbers = motion_attention(
                mine,
                picked(call.value, group),  # type: ignore[arg-type]
                edit,
                anchor=picked(anchor, group),
                conditional=entries(state.measured_part(call.run.extra), mine.shape[0]),
                beta=self._known_beta(call, index, place),
            )
            outs.append(out)
            scalars.append(numbers)
        self._note(call, state, index, rows.shape[-1], scalars)
        return put_together(outs, groups)

    def _clip(self, call: AttentionCall, inner: Inner, state: ForwardMaps, index: int) -> torch.Tensor:
        """Full attention over the clip: [B, S, H, D]."""
        if torch.is_grad_enabled() and call.query.requires_grad:
            raise GenAttnError(
                "BroadWay steers sampling, and has no backward pass through full video attention; use torch.no_grad"
            )
        frames = self._key_frames(call)
        near = neighbours_inside(call, self)
        plan = None if self.method == "pooled" else sparse_plan(call, near.pattern)
        if plan is not None:
            call.record.ran_sparse(plan.density, None if plan.tail is None else plan.tail.kind)
        base = inner(call) if self.method == "pooled" or near.others else None
        anchor, keys = self._clip_anchor(call, state, index), self._key_mask(call, state)
        groups = sample_groups(state.samples, call.query.shape[0], call.query.device)
        results = []
        for place, group in enumerate(groups):
            tensors = [picked(tensor, group) for tensor in (call.query, call.key, call.value)]
            assert tensors[0] is not None
            shared = {
                "anchor": picked(anchor, group),
                "beta": self._known_beta(call, index, place),
                "conditional": entries(state.measured_part(call.run.extra), tensors[0].shape[0]),
                "scale": call.scale,
                "key_mask": picked(keys, group),
            }
            results.append(self._edited(call, tensors, frames, picked(base, group), plan, shared))
        self._keep_rows(call, state, index, put_together([result.rows for result in results], groups))
        self._note(call, state, index, frames.frames, [result.scalars for result in results])
        return put_together([result.out for result in results], groups)

    def _edited(
        self,
        call: AttentionCall,
        tensors: list[Any],
        frames: KeyFrames,
        base: torch.Tensor | None,
        plan: BlockPlan | None,
        shared: dict[str, Any],
    ) -> EditedAttention:
        """The definition, under the pattern further in if there is one; other plugins further in give the base."""
        edit, (query, key, value) = self._edit_with(call.run.options_of(self)), tensors
        if self.method == "pooled":
            assert call.layout is not None
            assert base is not None
            return pooled_edit(query, key, value, frames, call.layout.grid3[1:], edit, base, self.pool, **shared)
        return edited_attention(query, key, value, frames, edit, plan=plan, base=base, **shared)

    def _clip_anchor(self, call: AttentionCall, state: ForwardMaps, index: int) -> torch.Tensor | None:
        guided, extra = state.guided, call.run.extra
        if guided.running_mean:
            total, count = state.mean.get(extra, (None, 1))
            return None if total is None else total / count
        source = guided.anchor_of[call.site.name]
        if source == call.site.name:
            return None
        anchor = state.anchor(extra, source, index)
        if anchor is None:
            raise no_anchor(source)
        batch = call.query.shape[0]
        # an extra pass may run the conditional half alone
        return anchor[-batch:] if extra and anchor.shape[0] > batch else anchor

    def _keep_rows(self, call: AttentionCall, state: ForwardMaps, index: int, rows: torch.Tensor) -> None:
        guided, name, extra = state.guided, call.site.name, call.run.extra
        if guided.running_mean:
            total, count = state.mean.get(extra, (None, 0))
            state.mean[extra] = (rows if total is None else total + rows, count + 1)
        elif name in guided.anchors:
            state.maps[extra, name, index] = rows

    def _key_frames(self, call: AttentionCall) -> KeyFrames:
        layout, tokens = call.layout, call.query.shape[1]
        if layout is None or layout.seqlen != tokens or call.key.shape[1] != tokens:
            told = "none" if layout is None else f"{layout.describe()!r} of {layout.seqlen} tokens"
            raise GenAttnError(
                f"temporal guidance needs the token layout of {call.site.name!r}, got {told} for {tokens} queries and "
                f"{call.key.shape[1]} keys; leave the block out with `blocks`"
            )
        key = (layout, call.query.device)
        if key not in self._frames:
            self._frames[key] = key_frames(layout, self.keep_first_frame).to(call.query.device)
        return self._frames[key]

    def _key_mask(self, call: AttentionCall, state: ForwardMaps) -> torch.Tensor | None:
        """Bool [B, S] or None; read once per forward, since all layers share its content and reading waits for the device."""
        if call.mask is None:
            return None
        shape = getattr(call.mask, "shape", torch.Size())
        if shape not in state.key_masks:
            keys, reason = key_mask(call.mask, call.query.shape[0], call.query.shape[1], call.key.shape[1])
            if reason:
                raise GenAttnError(
                    f"temporal guidance needs a mask that hides the same keys from all queries, got: {reason}, at "
                    f"{call.site.name!r}; leave the block out with `blocks`, or use a model without such a mask"
                )
            state.key_masks[shape] = keys
        return state.key_masks[shape]

    def _known_beta(self, call: AttentionCall, index: int, place: int) -> torch.Tensor | None:
        """The beta of a sample's conditional pass, in an unconditional or extra pass of the same step."""
        if call.run.pass_name != "uncond" and call.run.extra is None:
            return None
        step, betas = self._betas.get((*_place_of(call.run), call.site.name, index), (None, []))
        return betas[place] if step == call.run.step and place < len(betas) else None

    def _note(self, call: AttentionCall, state: ForwardMaps, index: int, frames: int, scalars: list[EditScalars]) -> None:
        name = call.site.name
        if call.run.pass_name != "uncond" and call.run.extra is None:
            self._betas[(*_place_of(call.run), name, index)] = (call.run.step, [numbers.beta for numbers in scalars])
        self.report.add(name, state.guided.block_of[name], frames, call.run, mean_scalars(scalars))


def _place_of(run: Run) -> tuple[int, int]:
    """Thread and denoiser: extra passes have another `Run` but the same place."""
    return threading.get_ident(), id(run.model)
