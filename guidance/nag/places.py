"""Where a model's text goes: its attention over text, and the blocks on the text's way."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from genattn.guidance.nag.streams import TextWay
from genattn.guidance.passes.block_swap import Place
from genattn.layouts.site import AttentionSite

_BETWEEN = re.compile(r"_to_|^(va|av)_")  # video asks sound, or sound video


def text_sites(sites: Sequence[AttentionSite]) -> list[AttentionSite]:
    """The attention in blocks that sees text; between video and audio no text is seen."""
    return [
        site
        for site in sites
        if site.depth >= 0 and site.kind in ("joint", "cross") and not _BETWEEN.search(site.name.rsplit(".", 1)[-1])
    ]


def blocks_of(model: nn.Module, way: TextWay, passed: bool) -> Iterator[tuple[Place, nn.Module, tuple[str, ...] | str]]:
    """Every block of the text's way; with `passed`, those too that see none."""
    stacks: dict[str, tuple[str, ...] | str] = {stream.stack: stream.gives for stream in way.streams}
    named = dict(model.named_modules())
    for stack, gives in {**stacks, **(way.passed if passed else {})}.items():
        blocks: Any = named.get(stack, [])
        for index, block in enumerate(blocks):
            yield (stack, index), block, gives
