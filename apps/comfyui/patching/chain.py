"""The plugins on one patched MODEL, and when they get to know and forget it."""

import logging
from typing import Any

from genattn.apps.comfyui.hosts.families import host_of
from genattn.apps.comfyui.patching.tally import Tally
from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import Plugin, Run, idle_note, in_chain

_LOG = logging.getLogger("genattn")


class Chain:
    """The plugins on one patched MODEL, and what became of its calls. Shared by the copies that ComfyUI makes of options."""

    def __init__(self, plugins: tuple[Plugin, ...] = ()) -> None:
        self.plugins = plugins
        self.tally = Tally()
        self._model: Any = None
        self._told = False

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
        self._told = False
        self.attach(model)
        for plugin in self.plugins:
            plugin.begin_run(Run(model=model))

    def begin_forward(self, run: Run) -> None:
        """The first forward whose step is known tells which plugins have no step to act at."""
        if self._told or run.num_steps is None:
            return
        self._told = True
        for note in filter(None, (idle_note(plugin, run) for plugin in self.plugins)):
            self.tally.notes.append(note)
            _LOG.warning("%s", note)

    def plugins_at(self, site: AttentionSite) -> list[Plugin]:
        """Those that act at a site; patterns, which answer themselves, innermost."""
        acting = [p for p in self.plugins if type(p).attention is not Plugin.attention and p.wants(site)]
        return sorted(acting, key=in_chain)
