"""What attention sites keep from call to call of a sampling run, apart for every pipeline that runs on a shared denoiser."""

import weakref
from collections.abc import Hashable
from typing import Any

from genattn.patterns.pattern import SiteMemory


class Memories:
    """A memory for each site of each pipeline. pipe: the one that runs, None where none is seen; it is not kept alive."""

    def __init__(self) -> None:
        self._of_pipes: weakref.WeakKeyDictionary[Any, dict[Hashable, SiteMemory]] = weakref.WeakKeyDictionary()
        self._bare: dict[Hashable, SiteMemory] = {}

    def __len__(self) -> int:
        return len(self._bare) + sum(len(sites) for sites in self._of_pipes.values())

    def at(self, pipe: Any, site: Hashable) -> SiteMemory:
        """What `site` keeps in the run of `pipe`."""
        sites = self._bare if pipe is None else self._of_pipes.setdefault(pipe, {})
        return sites.setdefault(site, SiteMemory())

    def forget(self, pipe: Any) -> None:
        """A new run of `pipe` starts; those of others go on."""
        self._bare.clear() if pipe is None else self._of_pipes.pop(pipe, None)

    def clear(self) -> None:
        """Forget all."""
        self._bare.clear()
        self._of_pipes.clear()
