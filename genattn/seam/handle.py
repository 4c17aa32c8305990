"""apply(pipe, plugins...) and the handle that controls, reports and removes them."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.layouts.site import AttentionSite
from genattn.patterns.pattern import Pattern
from genattn.seam.denoiser import INJECTION
from genattn.seam.explain import Explanation, FirstForward, explain_run, without_bar
from genattn.seam.injection import Injection
from genattn.seam.named import named_plugin
from genattn.seam.plugin import CallRecord, Plugin, Run, idle_note, name_of
from genattn.seam.report import GenAttnWarning, Report, SiteStats
from genattn.seam.schedule import Schedule
from genattn.seam.settings_file import PREFIX, loaded_for
from genattn.seam.sites import denoisers, head_dims, unwrapped
from genattn.seam.sparse_plugin import SparsePlugin
from genattn.seam.steps import StepTracker, unwatch_parts, watch_parts
from genattn.settings import refuse

_COMMON = frozenset({"enabled", "num_steps"})
_SCOPED: ContextVar[Mapping[int, Mapping[str, Any]]] = ContextVar("genattn_options", default={})  # noqa: B039


def apply(
    target: Any, *plugins: Plugin | Pattern | str, schedule: Schedule | None = None, impl: str = "auto", **settings: Any
) -> "Handle":
    """Put plugins on a stock pipeline or denoiser, in the order given (the first is outermost), until `handle.remove()`.

    target: a pipeline (all its denoisers, both experts of Wan 2.2 included) or one model. A Pattern becomes a SparsePlugin
    with `schedule`, or with settings of Schedule by name: `apply(pipe, RadialPattern(), dense_steps=0.25, dense_layers=1)`.
    A name stands for the model's own preset: "radial", "gna", "adaptive", "profile:PATH" (or a path that ends in .safetensors),
    or "auto", dense where a sparse call would not be faster; settings by name win over the preset's. "sol", "sparge"
    and "svg2" are published rules of choice. "settings:PATH" (or a path that ends in .json) stands for all plugins in a file
    of `genattn tune` or of `PluginConfig`. impl: backend of the patterns, as in `genattn.attention`.

    Raises GenAttnError, before anything is changed, when a plugin cannot serve one of the models.
    """
    if schedule is not None and not isinstance(schedule, Schedule):
        raise refuse("schedule", schedule, "a Schedule or None; e.g. Schedule(dense_steps=0.25)")
    if not plugins:
        raise GenAttnError("apply needs at least one plugin or pattern, got none; e.g. apply(pipe, RadialPattern())")
    if schedule is not None and settings:
        raise GenAttnError(f"give either schedule=... or its settings by name, got both: schedule and {sorted(settings)}")
    unknown = set(settings) - Schedule.names()
    if unknown:
        raise GenAttnError(f"unknown settings {sorted(unknown)}; a schedule has {', '.join(sorted(Schedule.names()))}")
    if (schedule is not None or settings) and not any(isinstance(p, Pattern | str) for p in plugins):
        raise GenAttnError("a schedule belongs to a pattern, and none was given; other plugins have windows of their own")
    plan = schedule or Schedule(**settings)
    found = denoisers(target)
    parts = tuple(getattr(target, "components", None) or ())
    ready: list[Plugin] = []
    for p in plugins:
        if isinstance(p, str) and (p.startswith(PREFIX) or p.endswith(".json")):
            ready += loaded_for(p.removeprefix(PREFIX), schedule, settings, impl)
        elif isinstance(p, str):
            ready.append(named_plugin(p, found, parts, schedule, settings, impl))
        else:
            ready.append(SparsePlugin(p, plan, impl) if isinstance(p, Pattern) else p)
    for plugin in ready:
        if not isinstance(plugin, Plugin):
            if isinstance(plugin, type):
                raise GenAttnError(f"plugins must be objects, got the class {plugin.__name__}; write {plugin.__name__}(...)")
            raise GenAttnError(f"plugins must be Pattern or Plugin objects, got {type(plugin).__name__}: {plugin!r}")
    return Handle(target, ready)


def remove(target: Any) -> int:
    """Take everything off a pipeline or model, also where the handles are lost; the number of handles removed."""
    found = _handles_on(denoisers(target).values())
    for handle in found:
        handle.remove()
    return len(found)


class Handle:
    """Plugins on a pipeline. `with apply(...) as handle:` removes them at the end."""

    def __init__(self, target: Any, plugins: list[Plugin]) -> None:
        self.target: Any = target
        self.plugins = plugins
        self._options: dict[str, Any] = {}
        self._stats: dict[tuple[str, str], SiteStats] = {}
        self._forwards = self._runs = 0
        self._calls_at_run = 0
        self._told = self._stop_first = self._ended = False
        self._notes: list[str] = []
        self._device = "cpu"
        self._injections = _injections(target)
        self._models = ", ".join(sorted({type(injection.model).__name__ for injection in self._injections}))
        self._sites: list[AttentionSite] | None = None
        attached: list[tuple[Plugin, Injection]] = []
        joined: list[Injection] = []
        for injection in self._injections:
            injection.refuse_split(plugins)
        replaced = _replaced(self._injections, plugins)
        try:
            for injection in self._injections:
                for plugin in plugins:
                    plugin.attach(injection.model, [site for _, site in injection.found])
                    attached.append((plugin, injection))
            for handle in replaced:
                handle.remove()
            for injection in self._injections:
                injection.join(self)
                joined.append(injection)
        except BaseException:
            for injection in joined:
                injection.leave(self)
            for plugin, injection in attached:
                plugin.detach(injection.model)
            raise
        self._active = True
        if not isinstance(target, nn.Module):
            watch_parts(target, self._part_given)
        for handle in replaced:
            warnings.warn(
                f"genattn: {handle._names()} was on this model already and is replaced; one model has one pattern. "
                "handle.remove() or genattn.remove(pipe) takes it off",
                GenAttnWarning,
                stacklevel=3,
            )

    def __repr__(self) -> str:
        """What is on what, and how it fared."""
        state = self.report().verdict if self._active else "removed"
        return f"<genattn {self._names()} on {self._models}: {state}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise GenAttnError: what a copy would be on is not told."""
        raise GenAttnError(
            "a handle belongs to the model that it is on and is not copied or pickled; copy the pipeline, whose copy starts "
            "without plugins, and apply them anew"
        )

    def _names(self) -> str:
        return " + ".join(map(name_of, self.plugins))

    # ---- control

    @property
    def active(self) -> bool:
        """Whether the plugins are on."""
        return self._active

    @property
    def sites(self) -> list[AttentionSite]:
        """The sites at which at least one plugin acts."""
        if self._sites is not None:
            return self._sites
        found = [site for injection in self._injections for _, site in injection.found]
        return [site for site in found if any(plugin.wants(site) for plugin in self.plugins)]

    def remove(self) -> None:
        """Take the plugins off; the last handle to leave restores the model exactly. A second call does nothing.

        The report can still be read. The handle lets go of the pipeline, so that it can be freed.
        """
        if not self._active:
            return
        self._active = False
        self._sites = self.sites
        for injection in self._injections:
            injection.leave(self)
            for plugin in self.plugins:
                plugin.detach(injection.model)
        if not isinstance(self.target, nn.Module):
            unwatch_parts(self.target, self._part_given)
        self._tell_if_blind()
        self.target, self._injections = None, []  # the report stays readable; the model is the user's to drop

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._told = self._told or kind is not None  # an exception on its way out says more
        self.remove()

    @contextlib.contextmanager
    def options(self, **options: Any) -> Iterator["Handle"]:
        """Options for the calls inside, for pipelines without attention kwargs: `with handle.options(dense_steps=0.5): ...`.

        They hold for this thread or task alone, as a context variable does; a thread that is started inside begins without.
        """
        self.check_options(options)
        before = _SCOPED.get().get(id(self))
        _SCOPED.set({**_SCOPED.get(), id(self): {**(before or {}), **options}})
        try:
            yield self
        finally:
            others = {key: held for key, held in _SCOPED.get().items() if key != id(self)}
            _SCOPED.set(others if before is None else {**others, id(self): before})

    def set(self, **options: Any) -> "Handle":
        """Options for all further calls of all threads; inside of `options`, for those to its end."""
        self.check_options(options)
        scoped = _SCOPED.get().get(id(self))
        if scoped is None:
            self._options = {**self._options, **options}
        else:
            _SCOPED.set({**_SCOPED.get(), id(self): {**scoped, **options}})
        return self

    @property
    def current_options(self) -> Mapping[str, Any]:
        """The options of `set` and `options` that hold now, in this thread."""
        return {**self._options, **_SCOPED.get().get(id(self), {})}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise GenAttnError for an option that no plugin on the same model knows, or whose value is out of range."""
        handles = {id(h): h for injection in self._injections for h in (*injection.handles, self)}
        known = _COMMON.union(*(p.option_names for h in handles.values() for p in h.plugins))
        unknown = sorted(set(options) - known)
        if unknown:
            raise GenAttnError(f"unknown options {unknown}; the plugins here know {', '.join(sorted(known))}")
        steps = options.get("num_steps", 1)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise GenAttnError(f"num_steps must be a whole number of steps >= 1, got {steps!r}")
        for plugin in self.plugins:
            plugin.check_options(options)

    # ---- what the injection tells

    def begin_run(self, run: Run) -> None:
        """A sampling run starts."""
        if self._stop_first:
            return
        self._tell_if_blind()
        self._runs += 1
        self._calls_at_run, self._ended = self._calls, False
        for plugin in self.plugins:
            plugin.begin_run(run)
            note = idle_note(plugin, run)
            if note:
                self._note(note)

    def before_forward(self, injection: Injection, run: Run) -> None:
        """A forward of the denoiser starts."""
        if self._stop_first:
            weight = next(injection.model.parameters())
            raise FirstForward(run, injection.family, weight.dtype, weight.device)
        self._forwards += 1

    def after_forward(self, injection: Injection, run: Run) -> None:
        """A forward of the denoiser has ended."""
        self._ended = True
        if run.num_steps is not None and run.step == run.num_steps - 1:
            self._tell_if_blind()

    def count(
        self, site: AttentionSite, query: torch.Tensor, keys: int, record: CallRecord, seconds: float, events: Any = None
    ) -> None:
        """One attention call at a site has ended: query [B, Sq, H, D] on `keys` keys."""
        key = (site.model, site.name)
        if key not in self._stats:
            self._stats[key] = SiteStats(site)
        self._stats[key].add(query, keys, record, seconds, events)
        self._device = query.device.type

    @property
    def _calls(self) -> int:
        return sum(stats.calls for stats in self._stats.values())

    def _tell_if_blind(self) -> None:
        """Say once when forwards went by and no selected attention was reached."""
        acts = any(type(plugin).attention is not Plugin.attention for plugin in self.plugins)
        if acts and self._ended and self._calls == self._calls_at_run and not self._told:
            self._told = True
            warnings.warn(f"genattn: {self.report().verdict}", GenAttnWarning, stacklevel=2)

    def _part_given(self, name: str) -> None:
        """The pipeline was given a part; say so when it is another denoiser, on which nothing is applied."""
        there = getattr(self.target, name, None)
        known = [injection.model for injection in self._injections if injection.name == name]
        if known and isinstance(there, nn.Module) and unwrapped(there) is not known[0]:
            self._note(
                f"pipe.{name} is another model now and runs without {self._names()}, which stays on the one before; "
                "call handle.remove() and apply to the pipeline again"
            )

    def _note(self, text: str) -> None:
        """Warn of something once, and keep it for the report."""
        if text not in self._notes:
            self._notes.append(text)
            warnings.warn(f"genattn: {text}", GenAttnWarning, stacklevel=2)

    # ---- what the user reads

    def explain(self, **call: Any) -> Explanation:
        """What a call would do, for one guidance pass: `handle.explain(prompt="a cat", height=480, num_inference_steps=50)`.

        The target is called with `call` and stopped before its first forward; a bare model takes its inputs. Raises
        GenAttnError when no pattern is on, or when the call never comes to the denoiser.
        """
        plugin = next((p for p in self.plugins if isinstance(p, SparsePlugin)), None)
        if plugin is None or not self._active:
            raise GenAttnError("explain needs an active handle with a pattern on it; apply(pipe, RadialPattern()) gives one")
        self._stop_first = True
        try:
            with contextlib.ExitStack() as forgotten:
                for tracker in {id(i.tracker): i.tracker for i in self._injections}.values():
                    forgotten.enter_context(tracker.untouched())
                forgotten.enter_context(without_bar(self.target))
                self.target(**call)
        except FirstForward as stop:
            injection = next(i for i in self._injections if i.model is stop.run.model)
            sites = [site for _, site in injection.found if plugin.wants(site)]
            return explain_run(stop, sites, plugin, head_dims(injection.found))
        finally:
            self._stop_first = False
        raise GenAttnError(f"{type(self.target).__name__} returned without a forward of its denoiser; nothing to explain")

    def report(self) -> Report:
        """What ran since `apply`: print it, or take `.to_dict()`, `.to_json()`, `.table()`."""
        rows = []
        for site in self.sites:
            rows.append(self._stats.get((site.model, site.name), SiteStats(site)).row())
        stats = self._stats.values()
        return Report(
            plugins=[plugin.describe() for plugin in self.plugins],
            sites=rows,
            forwards=self._forwards,
            runs=self._runs,
            flops=sum(s.flops for s in stats),
            flops_dense=sum(s.flops_dense for s in stats),
            device=self._device,
            notes=list(self._notes),
        )


def _handles_on(models: Iterable[nn.Module]) -> list[Handle]:
    injections = [model.__dict__[INJECTION] for model in models if INJECTION in model.__dict__]
    return list(dict.fromkeys(handle for injection in injections for handle in injection.handles))


def _replaced(injections: list[Injection], plugins: list[Plugin]) -> list[Handle]:
    """The handles whose pattern gives way to a new one: a call is answered once. Raises GenAttnError for those with more."""
    if not any(_answers(plugin) for plugin in plugins):
        return []
    found = [h for h in _handles_on(i.model for i in injections) if any(_answers(plugin) for plugin in h.plugins)]
    kinds = {type(plugin) for plugin in plugins}
    for handle in found:
        if not {type(plugin) for plugin in handle.plugins} <= kinds:
            raise GenAttnError(
                f"a model has one pattern, and {handle._names()} is on this one already; take it off with handle.remove() or "
                "genattn.remove(pipe), or apply all plugins together"
            )
    return found


def _answers(plugin: Plugin) -> bool:
    return isinstance(plugin, SparsePlugin) and plugin.touches_attention


def _injections(target: Any) -> list[Injection]:
    """One injection per denoiser, those that exist joined; denoisers of one pipeline share the step count."""
    models = denoisers(target)
    existing = [m.__dict__[INJECTION] for m in models.values() if INJECTION in m.__dict__]
    pipe = None if isinstance(target, nn.Module) else target
    tracker = next((i.tracker for i in existing if i.tracker.has_pipe or pipe is None), None) or StepTracker(pipe)
    found = []
    for name, model in models.items():
        injection = model.__dict__.get(INJECTION)
        if injection is None:
            injection = Injection(model, name, tracker)
        else:
            injection.tracker = tracker
        if not injection.found:
            raise GenAttnError(f"{type(model).__name__} has no attention module with a processor; nothing can be applied to it")
        found.append(injection)
    return found
