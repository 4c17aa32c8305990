"""One forward of a patched MODEL: which block runs, which of its calls is whose, and the way through the plugins."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from genattn.apps.comfyui.hosts.call import Attend, RawCall, agreed, call_mask, preference, preferred_of
from genattn.apps.comfyui.hosts.host import Entry, Host
from genattn.apps.comfyui.patching.chain import Chain
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import AttentionCall, CallRecord, Plugin, Run, told_of_decay


@dataclass
class Visit:
    """One block while it runs. preferred: the attention functions that its layers ask for. calls: of its self-attention."""

    site: AttentionSite
    preferred: list[Attend | None] = field(default_factory=list)
    calls: int = 0
    place: int = 0


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
    missed: list[str] = field(default_factory=list)
    _layouts: dict[tuple[int, int | None], TokenLayout | str] = field(default_factory=dict)
    _mask: tuple[Any, torch.Tensor] | None = None

    def replacements(self, before: Mapping[Any, Any]) -> dict[Any, Any]:
        """`patches_replace["dit"]` with every block marked, around the replacements that are there."""
        marked = dict(before)
        if self.host.tells_index:
            return marked
        kinds = {stack.attribute: stack.replace for stack in self.host.stacks}
        for site in self.sites:
            if "." not in site.name.removeprefix(f"{site.stack}."):
                place = (kinds[site.stack], site.layer)
                marked[place] = Marker(self, site, before.get(place))
        return marked

    def enter(self, site: AttentionSite) -> Visit:
        """A block starts."""
        block = getattr(self.model, site.stack)[site.layer]
        return Visit(site, preferred_of(block))

    def left(self, visit: Visit) -> None:
        """A block is over; one whose self-attention never came by was answered by somebody else."""
        if not visit.calls and self.chain.plugins_at(visit.site):
            self.missed.append(visit.site.name)

    def see_index(self, options: Mapping[str, Any]) -> None:
        """Follow `block_index`, where ComfyUI tells no more of the running block."""
        index = options.get("block_index")
        if not self.host.tells_index or index is None:
            return
        if self.visit is None or self.visit.site.depth != index:
            if self.visit is not None:
                self.left(self.visit)
            self.visit = next((self.enter(site) for site in self.sites if site.depth == index), None)

    def preferred(self, again: bool = False) -> Attend | None:
        """What the running layer would attend with if nobody stood in the slot. again: the call of before, once more."""
        if self.visit is None:
            return agreed(preferred_of(self.model))
        self.visit.place += not again
        return preference(self.visit.preferred, self.visit.place - 1)

    def site_of(self, queries: int, keys: int, again: bool = False) -> AttentionSite | None:
        """Which attention of the running block this call is; None for those that are left alone."""
        if self.visit is None or queries != keys:
            return None
        self.visit.calls += not again
        if self.visit.calls == 1:
            return self.visit.site
        second = f"{self.visit.site.name}.x_block.attn2"
        return next((site for site in self.sites if site.name == second), None) if self.visit.calls == 2 else None

    def layout(self, tokens: int, text: int | None = None) -> TokenLayout | str:
        """The order of the tokens, or why it is not known. text: context tokens where they are not the entry's."""
        if (tokens, text) not in self._layouts:
            entry = self.entry if text is None else replace(self.entry, text=text)
            try:
                self._layouts[tokens, text] = self.host.layout(self.model, entry, tokens)
            except GenAttnError as error:
                self._layouts[tokens, text] = str(error)
        return self._layouts[tokens, text]

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

    def attend(self, raw: RawCall, text: int | None = None) -> torch.Tensor:
        """One attention call of a marked block through the plugins. text: the same call again, over another text's tokens."""
        self.calls += 1
        query, key, value = raw.heads_last()
        site = self.site_of(query.shape[1], key.shape[1], text is not None)
        plugins = [] if site is None else self.chain.plugins_at(site)
        if site is None or not plugins:
            return self._answer(raw.stock)
        layout = self.layout(query.shape[1], text)
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
        call = told_of_decay(call, plugins)
        through = functools.partial(_through, plugins, call, lambda last: raw.dense(call, last))
        return raw.as_given(self._answer(lambda: self.chain.tally.timed(call, through)))

    def _answer(self, how: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The answer to one call; where it comes by again on the way to stock code, it is no other call of the model's."""
        before, self.inside = self.inside, True
        try:
            return how()
        finally:
            self.inside = before


def _through(plugins: list[Plugin], call: AttentionCall, dense: Callable[[AttentionCall], torch.Tensor]) -> torch.Tensor:
    answer = dense
    for plugin in reversed(plugins):
        answer = _wrapped(plugin, answer)
    return answer(call)


def _wrapped(plugin: Plugin, inner: Callable[[AttentionCall], torch.Tensor]) -> Callable[[AttentionCall], torch.Tensor]:
    return lambda call: plugin.attention(call, inner)


class Marker:
    """Replacement of a block that only says which block runs; previous: the replacement that was there."""

    def __init__(self, forward: Forward, site: AttentionSite, previous: Callable[..., Any] | None) -> None:
        self.forward, self.site, self.previous = forward, site, previous

    @torch.compiler.disable(recursive=False)
    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> Any:
        """Run the block."""
        before, visit = self.forward.visit, self.forward.enter(self.site)
        self.forward.visit = visit
        ran: list[int] = []

        def original(given: dict[str, Any]) -> Any:
            ran.append(1)
            return extra["original_block"](given)

        try:
            out = original(args) if self.previous is None else self.previous(args, {**extra, "original_block": original})
        finally:
            self.forward.visit = before
        if ran or out["img"] is not args["img"]:  # else a node leaves the block out, and there is nothing to attend to
            self.forward.left(visit)
        return out
