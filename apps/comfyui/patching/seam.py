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
from dataclasses import replace
from typing import Any

import torch

from genattn.apps.comfyui.hosts.call import Attend, RawCall, core_attention, takes_holders
from genattn.apps.comfyui.hosts.families import host_of
from genattn.apps.comfyui.hosts.host import Entry, bare
from genattn.apps.comfyui.patching.chain import Chain
from genattn.apps.comfyui.patching.forward import Forward
from genattn.apps.comfyui.patching.two_texts import TEXTS, TwoTexts
from genattn.seam.plugin import Plugin, Run

KEY = "genattn"
FORWARD = "genattn_forward"
PASS = "genattn_pass"
OVERRIDE = "optimized_attention_override"
APPLY_MODEL, ON_PRE_RUN, ON_CLEANUP = "apply_model", "on_pre_run", "on_cleanup"


def run_of(model: Any, options: Mapping[str, Any], batch: int | None = None) -> Run:
    """Step, noise level, pass and samples as `transformer_options` and the entries of the batch tell them."""
    sigmas, schedule = options.get("sigmas"), options.get("sample_sigmas")
    sigma = None if sigmas is None else float(sigmas.max())
    step, steps = -1, None
    levels: tuple[float, ...] = ()
    if sigma is not None and schedule is not None and len(schedule) > 1:
        table = schedule.tolist()
        steps, levels = len(table) - 1, tuple(table[:-1])
        # samplers of second order ask between two steps; that belongs to the step before
        step = max((i for i in range(steps) if table[i] >= sigma * (1 - 1e-5)), default=0)
    names = {(0,): "cond", (1,): "uncond"}
    chunks = options.get("cond_or_uncond") or ()
    told = tuple(sorted(set(chunks)))
    name, extra = names.get(told, "cond_uncond" if told else None), options.get(PASS)
    full = f"{name or 'pass'}+{extra}" if extra else name
    samples = batch // len(chunks) if batch and chunks and batch % len(chunks) == 0 else None
    return Run(
        step=step, num_steps=steps, sigma=sigma, sigmas=levels, pass_name=full, extra=extra, samples=samples, model=model
    )


_ORDER = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")


class Override:
    """What stands in `optimized_attention_override`; previous: who stood there before, called for everything not ours.

    A call that stays dense ends where it would have ended without us: at `previous`, else at the function that its layer
    prefers, else at ComfyUI's own.
    """

    def __init__(self, previous: Callable[..., torch.Tensor] | None) -> None:
        self.previous = previous

    def __deepcopy__(self, memo: dict[int, Any]) -> "Override":
        return self

    # compile nodes tell torch to look at no guard of transformer_options: traced, the first step's answer would be every step's
    @torch.compiler.disable
    def __call__(self, func: Attend, q: Any, k: Any, v: Any, heads: int, *rest: Any, **options: Any) -> torch.Tensor:
        """One attention call of the model."""
        raw = RawCall(func, self.previous, q, k, v, heads, {**dict(zip(_ORDER, rest)), **options})
        told = options.get("transformer_options") or {}
        texts: TwoTexts | None = told.get(TEXTS)
        if texts is not None:
            out = texts.answer(raw, lambda part, again: self._one(part, told, texts.context if again else None))
            if out is not None:
                return out
        return self._one(raw, told)

    def _one(self, raw: RawCall, told: Mapping[str, Any], text: int | None = None) -> torch.Tensor:
        """A call over one text. text: the call of before, once more over another text of so many tokens."""
        forward: Forward | None = told.get(FORWARD)
        # a node after us may keep us and call us from its own override, above which we stand again
        if forward is None or forward.inside:
            return raw.stock()
        forward.see_index(told)
        preferred = forward.preferred(text is not None) if self.previous is None else None
        return forward.attend(replace(raw, func=preferred or raw.func), text)

    def __getattr__(self, name: str) -> Any:
        """`container_function`, where the one who gets our dense calls takes holders; ComfyUI asks with hasattr."""
        if name == "container_function":
            found = core_attention() if self.__dict__.get("previous") is None else self.previous
            if found is not None and takes_holders(found):
                return lambda *args, **options: self(found, *args, **options)
        raise AttributeError(f"{type(self).__name__} has no {name}")


def stand_in_slot(options: dict[str, Any]) -> None:
    """Our override on top in `transformer_options`, around whoever stands there; once."""
    if not isinstance(options.get(OVERRIDE), Override):
        options[OVERRIDE] = Override(options.get(OVERRIDE))


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
    model = bare(executor.class_obj.diffusion_model)
    if chain._model is not model:
        chain.attach(model)
    host = host_of(model)
    text = None if c_crossattn is None else c_crossattn.shape[1]
    run = run_of(model, options, len(x))
    chain.begin_forward(run)
    forward = Forward(chain, host, model, run, Entry(tuple(x.shape), text, extras), host.sites(model))
    options.pop("block_index", None)  # of a forward before; refiners run before the first block tells its own
    others = dict(options.get("patches_replace") or {})
    options |= {FORWARD: forward, "patches_replace": {**others, "dit": forward.replacements(others.get("dit") or {})}}
    out = executor(x, t, c_concat, c_crossattn, control, options, **extras)
    untold = host.tells_index and forward.visit is None
    chain.tally.forward_ended(forward.calls, options.get(OVERRIDE), forward.missed, untold)
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
    stand_in_slot(options)
    if not patched.get_wrappers(APPLY_MODEL, KEY):
        patched.add_wrapper_with_key(APPLY_MODEL, KEY, around_model)
        patched.add_callback_with_key(ON_PRE_RUN, KEY, _begin)
        patched.add_callback_with_key(ON_CLEANUP, KEY, _end)
    return patched
