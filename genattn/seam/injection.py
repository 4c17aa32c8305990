"""One denoiser with plugins on it: its marks, its chain, the run that is going on, and the way back to stock."""

import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import SegmentKind, TokenLayout
from genattn.layouts.families import family_of
from genattn.seam.context_parallel import Part, gathered, has_text_apart, held_by_each, places_of, shared_attention, split_of
from genattn.seam.cores import MARK, Mark, StockCore
from genattn.seam.denoiser import (
    CacheContexts,
    RootCalls,
    current_run,
    other_caches,
    run_of,
    same_objects,
    stock_state,
    wrapped,
)
from genattn.seam.plugin import OFF, AttentionCall, CallRecord, Plugin, Run, in_chain, is_off, told_of_decay, why_all_stay_out
from genattn.seam.processors import (
    Claim,
    FunctionProcessor,
    abandon_processors,
    acquire_processor,
    refresh_processor,
    release_processors,
)
from genattn.seam.recompute import Recorded
from genattn.seam.report import event_pair
from genattn.seam.root_inputs import RootInputs
from genattn.seam.sites import TheirRows, asking_layout, find_sites, gather_queries, layout_at, spread_queries
from genattn.seam.steps import StepTracker

if TYPE_CHECKING:
    from genattn.seam.handle import Handle

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_READING = threading.RLock()  # what a forward reads at the root is of one pipeline, whichever run in other threads


class Injection:
    """State of one injected model. Handles join and leave; the last one to leave puts the model back."""

    def __init__(self, model: nn.Module, name: str, tracker: StepTracker) -> None:
        self.model, self.name, self.tracker = model, name, tracker
        self.family = family_of(model)
        self.inputs = RootInputs(type(model), self.family)
        self.handles: list[Handle] = []
        self.cache = CacheContexts()
        self.found = find_sites(model, name, self.family)
        self.blocks = 1 + max((site.depth for _, site in self.found), default=-1)
        self.marks: list[Mark] = []
        self.recorded = Recorded()
        self._unseen: set[int] = set()
        self._cut: tuple[Any, bool] | None = None
        self.root: RootCalls | None = None
        self._plugins: list[Plugin] = []
        self._wrappers: list[Plugin] = []
        self._claims: dict[int, Claim] = {}
        # a model that is dropped with its plugins on leaves nothing open
        weakref.finalize(self, abandon_processors, self._claims).atexit = False

    def join(self, handle: "Handle") -> None:
        """Add a handle; the first one changes the model, or leaves it as it was."""
        self.handles.append(handle)
        try:
            if len(self.handles) == 1:
                self._install()
            self._chain_up()
        except BaseException:
            self.leave(handle)
            raise

    def leave(self, handle: "Handle") -> None:
        """Take a handle away; the last one restores the model."""
        self.handles.remove(handle)
        (self._chain_up if self.handles else self._uninstall)()

    def _install(self) -> None:
        self.root = RootCalls(self.model, self)
        for module, site in self.found:
            mark = Mark(site, self)
            module.__dict__[MARK] = mark
            module.__dict__["__getstate__"] = functools.partial(stock_state, module, {}, {})
            self.marks.append(mark)
        self.sync()

    def _uninstall(self) -> None:
        if self.root is not None:
            self.root.remove()
        for module, _ in self.found:
            module.__dict__.pop(MARK, None)
            module.__dict__.pop("__getstate__", None)
            processor: Any = module.__dict__.get("processor")
            if isinstance(processor, FunctionProcessor):
                module.__dict__["processor"] = processor.function
        release_processors(self._claims)
        self.marks.clear()
        self.recorded.clear()

    def refuse_split(self, plugins: Iterable[Plugin], config: Any = None) -> None:
        """Raise GenAttnError where attention is split over devices in a way that one of the plugins cannot follow.

        config: what a processor was told; the model's own where none is given.
        """
        if config is None:
            config = self.model.__dict__.get("_parallel_config")
            if getattr(config, "context_parallel_config", None) is None:
                return
        split = split_of(config)
        why = {type(p).__name__: p.why_not_split(split) for p in plugins if p.touches_attention} if split else {}
        name, reason = next(((name, reason) for name, reason in why.items() if reason), ("", ""))
        if reason:
            raise GenAttnError(
                f"{name} on {self.model.__class__.__name__} cannot act under {split} context parallelism: {reason}"
            )

    def sync(self) -> None:
        """Mark processors that came after us (fused projections, IP-Adapter, set_attn_processor), let go of those that went,
        and follow those whose class was patched."""
        gone = dict(self._claims)
        for module, _ in self.found:
            processor = module.processor
            claim = self._claims.get(id(processor))
            if claim is None or claim.processor() is not processor:
                claim = self._claim(module, processor)
            else:
                refresh_processor(claim)
            gone.pop(claim.key, None)
        for key in gone:
            del self._claims[key]
        release_processors(gone)

    def _claim(self, module: Any, processor: Any) -> Claim:
        stale = self._claims.pop(id(processor), None)
        if stale is not None:  # its place in memory has a new owner
            release_processors({stale.key: stale})
        claim = acquire_processor(processor)
        if claim is None:
            processor = FunctionProcessor(processor)
            module.__dict__["processor"] = processor
            claim = acquire_processor(processor)
        assert claim is not None
        self._claims[claim.key] = claim
        return claim

    def _chain_up(self) -> None:
        pairs = [(plugin, handle) for handle in self.handles for plugin in handle.plugins]
        self._plugins = [plugin for plugin, _ in pairs]
        outside_first = sorted(self._plugins, key=lambda plugin: not plugin.runs_passes)
        self._wrappers = [plugin for plugin in outside_first if type(plugin).forward is not Plugin.forward]
        editors = [(plugin, handle) for plugin, handle in pairs if type(plugin).attention is not Plugin.attention]
        editors.sort(key=lambda pair: in_chain(pair[0]))
        for mark in self.marks:
            mark.chain = tuple((plugin, handle) for plugin, handle in editors if plugin.wants(mark.site))
            mark.handles = tuple(dict.fromkeys(handle for _, handle in mark.chain))

    def forward(self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The whole of one forward: read the root, run the plugins' wrappers, then stock."""
        self.sync()
        kwargs, told = self.inputs.take_options(kwargs)
        again = self.recorded.run_of_backward(known_only=True)
        run = again or self._begun(args, kwargs, told)
        self.refuse_split(p for p in self._plugins if not is_off(p, run))
        for handle in self.handles if again is None else ():
            handle.before_forward(self, run)
        chain = self._stock_with_layout(stock, args, kwargs) if self._wrappers else stock
        for plugin in reversed(self._wrappers):
            if not is_off(plugin, run):
                chain = wrapped(plugin, chain)
        with current_run(run), self.recorded.recording(run):
            result = chain(*args, **kwargs)
        for handle in self.handles if again is None else ():
            handle.after_forward(self, run)
        return result

    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any], told: Mapping[str, Any]) -> Run:
        with _READING:
            run, is_new = self._read(args, kwargs, told)
            if is_new:
                self._unseen = {id(plugin) for plugin in self._plugins if type(plugin).foresee is not Plugin.foresee}
                for handle in self.handles:
                    handle.begin_run(run)
        return run

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any], told: Mapping[str, Any]) -> tuple[Run, bool]:
        """(what the root tells of this forward, whether it is the first of a run)."""
        merged: dict[str, Any] = {}
        for handle in self.handles:
            merged.update(handle.current_options)
        merged.update(told)
        for handle in self.handles if told else ():
            handle.check_options(told)
        bound = self.inputs.bind(args, kwargs)
        pass_name, cache_told = self.cache.innermost()
        timestep = self.inputs.timestep(bound)
        rising = self.family is not None and self.family.rising
        position = self.tracker.observe(timestep, cache_told, merged.get("num_steps"), rising, self.model)
        layout, why = self.inputs.layout(self.model, bound)
        run = Run(
            step=position.step,
            num_steps=position.num_steps,
            timestep=timestep,
            sigma=position.sigma,
            sigmas=position.sigmas,
            pass_name=pass_name or self.tracker.guess_pass(self.family.cfg if self.family else None),
            layout=layout,
            options=merged,
            sample_layouts=self.inputs.of_samples,
            repeats=position.repeats,
            samples=self.tracker.samples,
            pass_is_told=pass_name is not None,
            in_call=self.tracker.in_call,
            wants_gradient=torch.is_grad_enabled(),
            why_no_layout=why,
            model=self.model,
            pipe=self.tracker.pipe,
            scoped={id(p): {**h.current_options, **told} for h in self.handles for p in h.plugins},
            enter_extra=self._extra_pass,
        )
        return run, position.is_new_run

    def _stock_with_layout(
        self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        """Stock forward; a plugin that passes other inputs (one half of the batch, a longer text) gets their layout."""

        def call(*given: Any, **named: Any) -> Any:
            run = run_of(self.model)
            if run is None or same_objects(given, args, named, kwargs):
                return stock(*given, **named)
            with _READING:
                layout, why = self.inputs.layout(self.model, self.inputs.bind(given, named))
                samples = self.inputs.of_samples
            if layout == run.layout and samples == run.sample_layouts:
                return stock(*given, **named)
            run = replace(run, layout=layout, why_no_layout=why, sample_layouts=samples)
            with current_run(run), self.recorded.recording(run):
                return stock(*given, **named)

        return call

    @contextlib.contextmanager
    def _extra_pass(self, run: Run, name: str) -> Iterator[Run]:
        extra = replace(run, pass_name=f"{run.pass_name or 'pass'}+{name}", extra=name, notes={})
        with contextlib.ExitStack() as stack:
            stack.enter_context(other_caches(self.model, self.cache.open(), name, str(extra.pass_name)))
            stack.enter_context(self.recorded.recording(extra))
            yield stack.enter_context(current_run(extra))

    def attend(self, mark: Mark, tensors: Tensors, mask: Any, flags: dict[str, Any], core: StockCore) -> torch.Tensor:
        """Run the chain of `mark` over one call of the core."""
        if not mark.chain:
            return core(*tensors, mask, **flags)
        run = run_of(self.model) or self.recorded.run_of_backward()
        if run is None:
            run = Run(model=self.model, why_no_layout="the block was called outside of the denoiser's forward")
        if core.parallel_config is not None:
            return self._attend_parallel(mark, tensors, mask, flags, core, run)
        queries, keys = tensors[0].shape[1], tensors[1].shape[1]
        if self._unseen:
            self._foresee(mark, tensors, mask, flags, run)
        reason = why_all_stay_out([plugin for plugin, _ in mark.chain], run, mark.site, queries)
        if reason:
            return _untouched(mark, tensors, mask, flags, core, reason)
        whole = None if flags["is_causal"] else asking_layout(mark.site, self.family, run, queries, keys)
        if whole is not None and self.family is not None:
            return _asked_by_some(mark, run, whole, self.family.queries, tensors, mask, flags, core)
        layout = None if flags["is_causal"] else layout_at(mark.site, self.family, run, queries, keys)
        call = AttentionCall(*tensors, mask, site=mark.site, run=run, layout=layout, record=CallRecord(), **flags)
        return _timed(mark, call, core)

    def _foresee(self, mark: Mark, tensors: Tensors, mask: Any, flags: dict[str, Any], run: Run) -> None:
        """Show the first call of the run to the plugins that want to see it."""
        wanting = [plugin for plugin, _ in mark.chain if id(plugin) in self._unseen and not is_off(plugin, run)]
        layout = layout_at(mark.site, self.family, run, tensors[0].shape[1], tensors[1].shape[1])
        call = AttentionCall(*tensors, mask, site=mark.site, run=run, layout=layout, record=CallRecord(), **flags)
        call = told_of_decay(call, [plugin for plugin, _ in mark.chain])
        for plugin in wanting:
            self._unseen.discard(id(plugin))
            plugin.foresee(call)

    def _attend_parallel(
        self,
        mark: Mark,
        tensors: Tensors,
        mask: Any,
        flags: dict[str, Any],
        core: StockCore,
        run: Run,
    ) -> torch.Tensor:
        """The chain on what this process answers of the whole sequence; stock code where no plugin acts."""
        acting = [plugin for plugin, _ in mark.chain if plugin.touches_attention and not is_off(plugin, run)]
        split = split_of(core.parallel_config)
        if not acting or not split or flags["is_causal"]:  # stock has its own words for causal calls
            reason = (
                "every plugin leaves it to stock code" if split else "the parallel config is not diffusers' context parallelism"
            )
            return _untouched(mark, tensors, mask, flags, core, reason)
        self.refuse_split(acting, core.parallel_config)
        apart, known = self._text_apart(core.parallel_config), run.layout

        def chain(joined: Tensors, given: Any, part: Part) -> torch.Tensor:
            tokens, world = joined[1].shape[1], len(part.sizes)
            whole = None
            if known is not None and held_by_each(known, world, apart) == part.sizes:
                whole = gathered(known, world, apart, part.first)
            asking = tokens if part.only_first else joined[0].shape[1]
            layout = layout_at(mark.site, self.family, replace(run, layout=whole), asking, tokens)
            call = AttentionCall(
                *joined,
                given,
                site=mark.site,
                run=replace(run, sample_layouts=()) if run.sample_layouts else run,
                layout=layout,
                record=CallRecord(),
                head_offset=part.head_offset,
                only_first=part.only_first,
                **flags,
            )
            return _timed(mark, call, StockCore(core.number, core.backend, None))

        def order(part: Part) -> torch.Tensor | None:
            return None if known is None else places_of(known, len(part.sizes), apart, part.first)

        return shared_attention(tensors, mask, core.parallel_config, chain, order)

    def _text_apart(self, config: Any) -> bool:
        if self._cut is None or self._cut[0] is not config:
            self._cut = (config, has_text_apart(self.model))
        return self._cut[1]


def _untouched(mark: Mark, tensors: Tensors, mask: Any, flags: dict[str, Any], core: StockCore, reason: str) -> torch.Tensor:
    """The call as stock would have it, counted."""
    events, began = event_pair(tensors[0]), time.perf_counter()
    out = core(*tensors, mask, **flags)
    _count(mark, tensors[0], tensors[1].shape[1], CallRecord(reason=reason), began, events)
    return out


def _asked_by_some(
    mark: Mark,
    run: Run,
    whole: TokenLayout,
    kinds: tuple[SegmentKind, ...],
    tensors: Tensors,
    mask: Any,
    flags: dict[str, Any],
    core: StockCore,
) -> torch.Tensor:
    """A call whose keys are the whole sequence and whose queries are some of it: plugins see all rows, stock code only its own.

    The rows that nobody asked for are zero queries; what a plugin answers there is dropped.
    """
    query, key, value = tensors
    everywhere = spread_queries(query, whole, kinds)
    call = AttentionCall(everywhere, key, value, mask, site=mark.site, run=run, layout=whole, record=CallRecord(), **flags)
    return gather_queries(_timed(mark, call, TheirRows(core, whole, kinds)), whole, kinds)


def _timed(mark: Mark, call: AttentionCall, core: StockCore | TheirRows) -> torch.Tensor:
    """The call through the chain, counted by every handle that has a plugin in it."""
    events, began = event_pair(call.query), time.perf_counter()
    call = told_of_decay(call, [plugin for plugin, _ in mark.chain])
    out = _through(mark.chain, 0, call, core)
    _count(mark, call.query, call.key.shape[1], call.record, began, events)
    return out


def _count(mark: Mark, query: torch.Tensor, keys: int, record: CallRecord, began: float, events: Any) -> None:
    seconds = time.perf_counter() - began
    if events is not None:
        events[1].record()
    for handle in mark.handles:
        handle.count(mark.site, query, keys, record, seconds, events)


def _through(chain: tuple[Any, ...], place: int, call: AttentionCall, core: StockCore | TheirRows) -> torch.Tensor:
    """The call through the plugins from `place` on, then to the user's own backend."""
    if place == len(chain):
        return core.answer(call)
    plugin = chain[place][0]
    if is_off(plugin, call.run):
        call.record.stayed_dense(OFF)
        return _through(chain, place + 1, call, core)
    return plugin.attention(call, lambda inner: _through(chain, place + 1, inner, core))
