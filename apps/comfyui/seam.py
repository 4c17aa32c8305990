"""How an attention call of ComfyUI's own models comes to GenAttn's plugins, and how it goes back.

1. The patched MODEL is a clone. Its `transformer_options` carry a `Chain` of plugins, and the one slot for an attention
   override holds an `Override`, which keeps whoever stood there before and hands on to it.
2. A wrapper around the model's forward reads step, noise level, pass and latents, and marks the blocks for the time of that
   forward, around whatever replacement of a block stands there already.
3. The override turns a marked block's call into the `AttentionCall` of the diffusers seam, so patterns, heads, schedules and
   reports are the same objects there and here.

Nothing of the model itself changes: an unpatched clone of it gives what it always gave, and unloading leaves nothing behind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from genattn.apps.comfyui.hosts import Entry, Host, call_mask, heads_last, host_of
from genattn.apps.comfyui.tally import Tally
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import AttentionCall, CallRecord, Plugin, Run

KEY = "genattn"
FORWARD = "genattn_forward"
PASS = "genattn_pass"
OVERRIDE = "optimized_attention_override"
APPLY_MODEL, ON_PRE_RUN, ON_CLEANUP = "apply_model", "on_pre_run", "on_cleanup"


class Chain:
    """The plugins on one patched MODEL, and what became of its calls. Shared by the copies that ComfyUI makes of options."""

    def __init__(self, plugins: tuple[Plugin, ...] = ()) -> None:
        self.plugins = plugins
        self.tally = Tally()
        self._model: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Chain":
        return self

    def check(self, model: Any) -> None:
        """Raise GenAttnError now, not in the sampler, when a plugin cannot serve the model."""
        host_of(model)
        self.attach(model)
        self.detach()

    def attach(self, model: Any) -> None:
        """Before a run: give the plugins the model's sites."""
        self.detach()
        sites = host_of(model).sites(model)
        attached: list[Plugin] = []
        try:
            for plugin in self.plugins:
                plugin.attach(model, sites)
                attached.append(plugin)
        except BaseException:
            for plugin in attached:
                plugin.detach(model)
            raise
        self._model = model

    def detach(self) -> None:
        """After a run: forget the model."""
        if self._model is not None:
            for plugin in self.plugins:
                plugin.detach(self._model)
        self._model = None

    def begin_run(self, model: Any) -> None:
        """A sampler starts: counters at zero, plugins at their beginning."""
        self.tally.reset()
        self.attach(model)
        for plugin in self.plugins:
            plugin.begin_run(Run(model=model))

    def plugins_at(self, site: AttentionSite) -> list[Plugin]:
        """Those that act at a site; patterns, which answer themselves, innermost."""
        acting = [p for p in self.plugins if type(p).attention is not Plugin.attention and p.wants(site)]
        return sorted(acting, key=lambda plugin: plugin.answers)


def run_of(model: Any, options: Mapping[str, Any]) -> Run:
    """Step, noise level and pass as `transformer_options` tell them."""
    sigmas, schedule = options.get("sigmas"), options.get("sample_sigmas")
    sigma = None if sigmas is None else float(sigmas.max())
    step, steps = -1, None
    if sigma is not None and schedule is not None and len(schedule) > 1:
        table = schedule.tolist()
        steps = len(table) - 1
        # samplers of second order ask between two steps; that belongs to the step before
        step = max((i for i in range(steps) if table[i] >= sigma * (1 - 1e-5)), default=0)
    names = {(0,): "cond", (1,): "uncond"}
    told = tuple(sorted(set(options.get("cond_or_uncond") or ())))
    name, extra = names.get(told, "cond_uncond" if told else None), options.get(PASS)
    full = f"{name or 'pass'}+{extra}" if extra else name
    return Run(step=step, num_steps=steps, sigma=sigma, pass_name=full, extra=extra, model=model)


@dataclass
class Visit:
    """One block while it runs."""

    site: AttentionSite
    calls: int = 0


@dataclass
class Forward:
    """One forward of the model."""

    chain: Chain
    host: Host
    model: Any
    run: Run
    entry: Entry
    sites: list[AttentionSite]
    visit: Visit | None = None
    inside: bool = False
    calls: int = 0
    _layouts: dict[int, TokenLayout | str] = field(default_factory=dict)
    _mask: tuple[Any, torch.Tensor] | None = None

    def replacements(self, before: Mapping[Any, Any]) -> dict[Any, Any]:
        """`patches_replace["dit"]` with every block marked, around the replacements that are there."""
        marked = dict(before)
        kinds = {stack.attribute: stack.replace for stack in self.host.stacks}
        for site in self.sites:
            if "." not in site.name.removeprefix(f"{site.stack}."):
                place = (kinds[site.stack], site.layer)
                marked[place] = Marker(self, site, before.get(place))
        return marked

    def site_of(self, queries: int, keys: int) -> AttentionSite | None:
        """Which attention of the running block this call is; None for those that are left alone."""
        if self.visit is None or queries != keys:
            return None
        self.visit.calls += 1
        if self.visit.calls == 1:
            return self.visit.site
        second = f"{self.visit.site.name}.x_block.attn2"
        return next((site for site in self.sites if site.name == second), None) if self.visit.calls == 2 else None

    def layout(self, tokens: int) -> TokenLayout | str:
        """The order of the tokens, or why it is not known."""
        if tokens not in self._layouts:
            try:
                self._layouts[tokens] = self.host.layout(self.model, self.entry, tokens)
            except GenAttnError as error:
                self._layouts[tokens] = str(error)
        return self._layouts[tokens]

    def mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask with four axes; one object per forward, and no inference tensor, whose version nobody may ask for."""
        if mask is None:
            return None
        if self._mask is None or self._mask[0] is not mask:
            with torch.inference_mode(False):
                shaped = call_mask(mask.clone())
            assert shaped is not None
            self._mask = (mask, shaped)
        return self._mask[1]

    def attend(self, raw: "RawCall") -> torch.Tensor:
        """One attention call of a marked block through the plugins."""
        self.calls += 1
        query, key, value = raw.heads_last()
        site = self.site_of(query.shape[1], key.shape[1])
        plugins = [] if site is None else self.chain.plugins_at(site)
        if site is None or not plugins:
            return raw.stock()
        layout = self.layout(query.shape[1])
        run = self.run if isinstance(layout, TokenLayout) else replace(self.run, why_no_layout=layout)
        call = AttentionCall(
            query,
            key,
            value,
            self.mask(raw.options.get("mask")),
            scale=raw.options.get("scale"),
            is_causal=False,
            enable_gqa=key.shape[2] != query.shape[2],
            site=site,
            run=run,
            layout=layout if isinstance(layout, TokenLayout) else None,
            record=CallRecord(),
        )
        self.inside = True
        try:
            out = self.chain.tally.timed(call, lambda: _through(plugins, call, lambda last: raw.dense(call, last)))
        finally:
            self.inside = False
        return raw.as_given(out)


def _through(plugins: list[Plugin], call: AttentionCall, dense: Callable[[AttentionCall], torch.Tensor]) -> torch.Tensor:
    answer = dense
    for plugin in reversed(plugins):
        answer = _wrapped(plugin, answer)
    return answer(call)


def _wrapped(plugin: Plugin, inner: Callable[[AttentionCall], torch.Tensor]) -> Callable[[AttentionCall], torch.Tensor]:
    return lambda call: plugin.attention(call, inner)


@dataclass
class RawCall:
    """One call as ComfyUI makes it: func(q, k, v, heads, **options). under: whoever stood in the slot before us."""

    func: Callable[..., torch.Tensor]
    under: Callable[..., torch.Tensor] | None
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    heads: int
    options: dict[str, Any]

    def heads_last(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as [B, S, H, D]."""
        split = bool(self.options.get("skip_reshape"))
        return tuple(heads_last(t, self.heads, split) for t in (self.q, self.k, self.v))  # type: ignore[return-value]

    def stock(self) -> torch.Tensor:
        """What would have run without us."""
        return self._call(self.q, self.k, self.v, self.options)

    def _call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        if self.under is not None:
            return self.under(self.func, q, k, v, self.heads, **options)
        return self.func(q, k, v, self.heads, **options)

    def dense(self, given: AttentionCall, last: AttentionCall) -> torch.Tensor:
        """Stock attention as [B, S, H, D], on the tensors that the plugins hand on."""
        if last.query is given.query and last.key is given.key and last.value is given.value:
            out = self.stock()
            split = bool(self.options.get("skip_output_reshape"))
            return heads_last(out, self.heads, split)
        changed = [t.transpose(1, 2) for t in (last.query, last.key, last.value)]
        options = {**self.options, "skip_reshape": True, "skip_output_reshape": False}
        return heads_last(self._call(changed[0], changed[1], changed[2], options), self.heads, False)

    def as_given(self, out: torch.Tensor) -> torch.Tensor:
        """An answer [B, S, H, D] in the shape that the caller expects."""
        return out.transpose(1, 2) if self.options.get("skip_output_reshape") else out.flatten(2)


class Override:
    """What stands in `optimized_attention_override`; previous: who stood there before, called for everything not ours."""

    def __init__(self, previous: Callable[..., torch.Tensor] | None) -> None:
        self.previous = previous

    def __deepcopy__(self, memo: dict[int, Any]) -> "Override":
        return self

    def __call__(
        self, func: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *rest: Any, **options: Any
    ) -> torch.Tensor:
        """One attention call of the model."""
        named = {**dict(zip(("mask", "attn_precision", "skip_reshape", "skip_output_reshape"), rest)), **options}
        raw = RawCall(func, self.previous, q, k, v, heads, named)
        forward = (options.get("transformer_options") or {}).get(FORWARD)
        # a node after us may keep us and call us from its own override, above which we stand again
        return raw.stock() if forward is None or forward.inside else forward.attend(raw)


class Marker:
    """Replacement of a block that only says which block runs; previous: the replacement that was there."""

    def __init__(self, forward: Forward, site: AttentionSite, previous: Callable[..., Any] | None) -> None:
        self.forward, self.site, self.previous = forward, site, previous

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> Any:
        """Run the block."""
        before, self.forward.visit = self.forward.visit, Visit(self.site)
        try:
            return self.previous(args, extra) if self.previous is not None else extra["original_block"](args)
        finally:
            self.forward.visit = before


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
    """ComfyUI's APPLY_MODEL wrapper: one forward of the model with its blocks marked."""
    options = dict(transformer_options or {})
    chain = options.get(KEY)
    if chain is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **extras)
    model = executor.class_obj.diffusion_model
    if chain._model is not model:
        chain.attach(model)
    host = host_of(model)
    text = None if c_crossattn is None else c_crossattn.shape[1]
    forward = Forward(chain, host, model, run_of(model, options), Entry(tuple(x.shape), text, extras), host.sites(model))
    others = dict(options.get("patches_replace") or {})
    options |= {FORWARD: forward, "patches_replace": {**others, "dit": forward.replacements(others.get("dit") or {})}}
    out = executor(x, t, c_concat, c_crossattn, control, options, **extras)
    chain.tally.forward_ended(forward.calls, options.get(OVERRIDE))
    return out


def _begin(patcher: Any) -> None:
    chain_of(patcher).begin_run(patcher.model.diffusion_model)


def _end(patcher: Any) -> None:
    chain_of(patcher).detach()


def chain_of(model: Any) -> Chain:
    """The plugins on a MODEL, an empty chain when there are none."""
    found: Chain = model.model_options.get("transformer_options", {}).get(KEY) or Chain()
    return found


def patch_model(model: Any, *plugins: Plugin) -> Any:
    """A clone of ComfyUI's MODEL with plugins added to those on it.

    Raises GenAttnError, before anything is done, when the family or the plugin does not fit.
    """
    chain = Chain((*chain_of(model).plugins, *plugins))
    chain.check(model.model.diffusion_model)
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    options[KEY] = chain
    if not isinstance(options.get(OVERRIDE), Override):
        options[OVERRIDE] = Override(options.get(OVERRIDE))
    if not patched.get_wrappers(APPLY_MODEL, KEY):
        patched.add_wrapper_with_key(APPLY_MODEL, KEY, around_model)
        patched.add_callback_with_key(ON_PRE_RUN, KEY, _begin)
        patched.add_callback_with_key(ON_CLEANUP, KEY, _end)
    return patched
