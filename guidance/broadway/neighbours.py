"""What else acts on a guided attention, between BroadWay and the dense backend.

A pattern (they stand innermost) is taken over: the marginal is then that of the sparse map. Any other plugin further in is
called as usual and the change is added to its answer.
"""

from dataclasses import dataclass

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.seam.denoiser import INJECTION
from genattn.seam.plugin import AttentionCall, Plugin, Run
from genattn.seam.sparse_plugin import SparsePlugin


@dataclass(frozen=True)
class Neighbours:
    """pattern: the first pattern further in, if one is there. others: whether any other plugin is."""

    pattern: SparsePlugin | None = None
    others: bool = False


def neighbours_inside(call: AttentionCall, plugin: Plugin) -> Neighbours:
    """The enabled plugins between `plugin` and the dense backend at this call."""
    pattern, others = None, False
    for other in _inside(call, plugin):
        if isinstance(other, SparsePlugin):
            pattern = pattern or other
        else:
            others = True
    return Neighbours(pattern, others)


def sparse_plan(call: AttentionCall, pattern: SparsePlugin | None) -> BlockPlan | None:
    """The plan by which `pattern` would answer this call; None when it would stay dense."""
    if pattern is None or call.layout is None:
        return None
    schedule = pattern.schedule.with_options(call.run.options_of(pattern))
    blocks = pattern.blocks_of(call.run.model)
    if schedule.why_dense(call.run, call.site, call.query.shape[1], blocks) or pattern.why_not(call):
        return None
    return pattern.plan_at(call)


def has_wrapper_outside(run: Run, plugin: Plugin) -> bool:
    """Whether a plugin around `plugin` wraps the denoiser's forward: it may run extra passes of its own."""
    injection = None if run.model is None else run.model.__dict__.get(INJECTION)
    plugins = [] if injection is None else [p for handle in injection.handles for p in handle.plugins]
    before = plugins[: plugins.index(plugin)] if plugin in plugins else []
    around = [*before, *(other for other in plugins if other.runs_passes)]
    return any(type(other).forward is not Plugin.forward for other in around)


def _inside(call: AttentionCall, plugin: Plugin) -> list[Plugin]:
    """The enabled plugins at a call that `plugin`'s `inner` leads to."""
    injection = None if call.run.model is None else call.run.model.__dict__.get(INJECTION)
    marks = [] if injection is None else injection.marks
    chain = next((mark.chain for mark in marks if mark.site == call.site), ())
    plugins = [p for p, _ in chain if call.run.options_of(p).get("enabled", True)]
    return plugins[plugins.index(plugin) + 1 :] if plugin in plugins else []
