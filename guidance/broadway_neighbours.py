"""What else acts on a guided attention: plugins further in, which BroadWay must answer for, and patterns further out.

A pattern further in is taken over: the marginal is then that of the sparse map. Any other plugin further in is called as usual
and the change is added to its answer. A pattern further out answers by itself, so that guidance would be lost: refused.
"""

from dataclasses import dataclass

from genattn.denoiser import INJECTION
from genattn.errors import GenAttnError
from genattn.kernels.block_plan import BlockPlan
from genattn.plugin import AttentionCall, AttentionSite, Plugin, Run
from genattn.sparse_plugin import SparsePlugin


@dataclass(frozen=True)
class Neighbours:
    """pattern: the first pattern further in, if one is there. others: whether any other plugin is."""

    pattern: SparsePlugin | None = None
    others: bool = False


def neighbours_inside(call: AttentionCall, plugin: Plugin) -> Neighbours:
    """The enabled plugins between `plugin` and the dense backend at this call."""
    pattern, others = None, False
    for other in _chain(call.run, call.site, plugin)[1]:
        if isinstance(other, SparsePlugin):
            pattern = pattern or other
        else:
            others = True
    return Neighbours(pattern, others)


def sparse_plan(call: AttentionCall, pattern: SparsePlugin | None) -> tuple[BlockPlan | None, float]:
    """(the plan by which `pattern` would answer this call, its density), or (None, 1.0) when it would stay dense."""
    if pattern is None or call.layout is None:
        return None, 1.0
    if _why_dense(pattern, call.run, call.site, call.query.shape[1]) or pattern.why_not(call):
        return None, 1.0
    plan = pattern.plan_at(call)
    return plan, plan.density


def refuse_patterns_outside(run: Run, plugin: Plugin) -> None:
    """Raise GenAttnError where a pattern would answer a guided attention of this forward before `plugin` sees it."""
    injection = None if run.model is None else run.model.__dict__.get(INJECTION)
    if injection is None or run.layout is None:
        return
    for mark in injection.marks:
        for other in _chain(run, mark.site, plugin)[0]:
            if isinstance(other, SparsePlugin) and not _why_dense(other, run, mark.site, run.layout.seqlen):
                name = type(other.pattern).__name__
                raise GenAttnError(
                    f"temporal guidance must come before a pattern on the same layers, got {name} first at {mark.site.name!r}; "
                    f"apply(pipe, BroadWay(...), {name}(...)), or keep the guided steps dense (dense_steps=0.25)"
                )


def has_wrapper_outside(run: Run, plugin: Plugin) -> bool:
    """Whether a plugin applied before `plugin` wraps the denoiser's forward: it may run extra passes of its own."""
    injection = None if run.model is None else run.model.__dict__.get(INJECTION)
    plugins = [] if injection is None else [p for handle in injection.handles for p in handle.plugins]
    before = plugins[: plugins.index(plugin)] if plugin in plugins else []
    return any(type(other).forward is not Plugin.forward for other in before)


def _chain(run: Run, site: AttentionSite, plugin: Plugin) -> tuple[list[Plugin], list[Plugin]]:
    """The enabled plugins at a site (outside of `plugin`, inside of it); both empty where it does not act."""
    injection = None if run.model is None else run.model.__dict__.get(INJECTION)
    marks = [] if injection is None else injection.marks
    chain = next((mark.chain for mark in marks if mark.site == site), ())
    plugins = [p for p, _ in chain if run.options_of(p).get("enabled", True)]
    if plugin not in plugins:
        return [], []
    place = plugins.index(plugin)
    return plugins[:place], plugins[place + 1 :]


def _why_dense(pattern: SparsePlugin, run: Run, site: AttentionSite, tokens: int) -> str | None:
    schedule = pattern.schedule.with_options(run.options_of(pattern))
    blocks = run.model.__dict__[INJECTION].blocks if run.model is not None else 0
    return schedule.why_dense(run, site, tokens, blocks)
