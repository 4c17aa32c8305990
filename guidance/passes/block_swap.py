"""Blocks of a denoiser replaced for one forward: to remember what they gave, to repeat it, or to be left out.

Prefix reuse: in the extra pass of a guided step, the blocks before the first perturbed one get the inputs that they had
in the clean pass, so they are not run again. The clean pass remembers what the last of them gave; in the extra pass
those blocks do nothing and hand that on. Exact wherever only the last block's output goes on (no long skips), which is
tested per family; the extra pass then costs the share of blocks that remain.

The blocks are exchanged in their lists, not the blocks' forwards, so compiled blocks stay as they are.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.guidance.passes.prediction import take_rows
from genattn.layouts.site import AttentionSite
from genattn.seam.denoiser import held_by_cache_dit, is_compiled_whole
from genattn.seam.sites import unwrapped

# denoisers whose blocks form one chain, as tests/guidance/softpag/test_softpag_families.py shows for each
CHAINS = frozenset(
    (
        "AuraFlowTransformer2DModel",
        "ChromaTransformer2DModel",
        "CogVideoXTransformer3DModel",
        "CosmosTransformer3DModel",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "HiDreamImageTransformer2DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "LTX2VideoTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "Lumina2Transformer2DModel",
        "MochiTransformer3DModel",
        "PixArtTransformer2DModel",
        "QwenImageTransformer2DModel",
        "SD3Transformer2DModel",
        "SkyReelsV2Transformer3DModel",
        "UNet2DConditionModel",
        "WanAnimateTransformer3DModel",
        "WanTransformer3DModel",
        "ZImageTransformer2DModel",
    )
)
Place = tuple[str, int]


class BlockOrder:
    """The blocks of a denoiser in execution order, by the depth of their attention.

    Args:
        model: the denoiser.
        sites: its attention sites.
    """

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        self.model = model
        self.places: dict[int, Place] = {s.depth: (s.stack, s.layer) for s in sites if s.depth >= 0}
        self.forms: dict[str, Any] = {}
        self.compiled_whole = False  # under torch.compile(model) this is known inside of a call alone

    def before(self, depth: int) -> list[Place]:
        """Every block that runs before the one at `depth`."""
        return [place for d, place in sorted(self.places.items()) if d < depth]

    def ends(self, depth: int) -> list[Place]:
        """The last block before `depth` in each list of blocks."""
        last: dict[str, Place] = {stack: (stack, layer) for stack, layer in self.before(depth)}
        return list(last.values())

    def block(self, place: Place) -> nn.Module:
        """The block at a place."""
        blocks: Any = self.model.get_submodule(place[0])
        found: nn.Module = blocks[place[1]]
        return found

    def form_of(self, place: Place, answer: Any) -> Any:
        """What a block gives, without the numbers: `answer` of this clean pass, or of an earlier one where a cache left it out.

        The blocks of one list give the same kind of answer. Raises GenAttnError if none of them has run in a guided step.
        """
        stack = place[0]
        if answer is not None:
            self.forms[stack] = _without_numbers(answer)
        if stack not in self.forms:
            raise GenAttnError(
                f"a block of {stack} must have run in a guided step before one can be left out, and a cache has skipped them "
                "so far; let the cache start after the first guided step"
            )
        return self.forms[stack]

    def why_no_reuse(self, depth: int) -> str | None:
        """Why the blocks before `depth` must run again in the extra pass; None when they need not."""
        if not self.before(depth):
            return "the first block is perturbed"
        name = type(self.model).__name__
        if self.model.__class__.__name__ not in CHAINS:
            return f"the blocks of {name} are not known to form a chain"
        self.compiled_whole |= is_compiled_whole(self.model)
        if self.compiled_whole:
            return "the model is compiled as a whole; compile its blocks instead (compile_repeated_blocks)"
        if getattr(self.model, "_parallel_config", None) is not None:
            return "the model runs under context parallelism"
        if held_by_cache_dit(self.model):
            return "cache-dit is on the model, and decides by what the first blocks give in every pass"
        for place in self.before(depth):
            if isinstance(self.block(place), Stand):
                return f"block {place[1]} of {place[0]} carries another plugin's state, which must see every pass"
            hooked = _hook_of(self.block(place))
            if hooked:
                return f"block {place[1]} of {place[0]} carries a {hooked} hook, which must see every pass"
        return None

    def swapped(self, replacements: Mapping[Place, nn.Module]) -> "contextlib.AbstractContextManager[None]":
        """The model with some blocks replaced."""
        return swapped(self.model, replacements)


@contextlib.contextmanager
def swapped(model: nn.Module, replacements: Mapping[Place, nn.Module]) -> Iterator[None]:
    """`model` with some blocks replaced."""
    # in the list itself, because others hold it too (cache-dit); bypassing setattr keeps hooks, compiled frames and
    # parameter lists out of it
    before: list[tuple[dict[str, Any], str, Any]] = []
    for (stack, number), block in replacements.items():
        listed: Any = model.get_submodule(stack)._modules
        before.append((listed, str(number), listed[str(number)]))
        listed[str(number)] = block
    try:
        yield
    finally:
        for listed, name, block in before:
            listed[name] = block


class Stand(nn.Module):
    """Takes the place of a block; whatever else is asked of it, the block answers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block
        # a LoRA's scale is set on every module that the model lists during a forward: the block must be among them
        self._modules["block"] = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class Recorder(Stand):
    """Runs the block and remembers its first answer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.answer: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own answer."""
        answer = self.__dict__["block"](*args, **kwargs)
        # a nested term's extra pass may come by here after the clean one
        if self.answer is None:
            self.answer = answer
        return answer


class Repeater(Stand):
    """Gives a remembered answer, or part of it, without running the block."""

    def __init__(self, block: nn.Module, answer: Any) -> None:
        super().__init__(block)
        self.__dict__["answer"] = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The remembered answer."""
        return self.__dict__["answer"]


class Bypass(Stand):
    """Leaves the block out: its hidden states pass unchanged, or mixed with what the block gives.

    Args:
        block: the block.
        answer: what the block gave in the clean pass; tells the order of its results.
        u: 1 leaves the block out, less draws its answer towards its input by this share.
        layer: its depth.
    """

    def __init__(self, block: nn.Module, answer: Any, u: float, layer: int) -> None:
        super().__init__(block)
        self.order, self.u, self.layer, self.hits = _result_order(block, answer), u, layer, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inputs in the order in which the block gives its results."""
        block = self.__dict__["block"]
        bound = _arguments(block, args, kwargs)
        self.hits += 1
        inputs = [None if name is None else bound[name] for name in self.order[0](bound)]
        if self.u < 1:
            answer = block(*args, **kwargs)
            parts = [answer] if isinstance(answer, torch.Tensor) else list(answer)
            inputs = [None if b is None else torch.lerp(a, b, self.u) for a, b in zip(parts, inputs, strict=True)]
        return inputs[0] if self.order[1] else tuple(inputs)


class PrefixReuse:
    """Remembers the clean pass's prefix and repeats it in the extra pass.

    Args:
        order: the model's blocks.
        depth: the first perturbed block.
    """

    def __init__(self, order: BlockOrder, depth: int) -> None:
        self.order, self.depth = order, depth
        self.recorders: dict[Place, Recorder] = {}

    @property
    def share(self) -> float:
        """Share of the blocks that the extra pass runs, in (0, 1]."""
        return 1 - len(self.order.before(self.depth)) / len(self.order.places)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the clean pass."""
        self.recorders = {place: Recorder(self.order.block(place)) for place in self.order.ends(self.depth)}
        with self.order.swapped(self.recorders):
            yield

    @contextlib.contextmanager
    def repeating(self, rows: torch.Tensor, batch: int) -> Iterator[None]:
        """Around the extra pass over the chosen samples of the clean pass's batch."""
        whole = rows.tolist() == list(range(batch))
        answers = {
            stack: recorder.answer if whole else take_rows(recorder.answer, rows, batch)
            for (stack, _), recorder in self.recorders.items()
        }
        stand_ins = {place: Repeater(self.order.block(place), answers[place[0]]) for place in self.order.before(self.depth)}
        try:
            with self.order.swapped(stand_ins):
                yield
        finally:
            self.recorders = {}


def _hook_of(block: nn.Module) -> str | None:
    """The name of a diffusers or accelerate hook on a block or inside, casting aside, that must not miss a pass."""
    for module in block.modules():
        registry = getattr(module, "_diffusers_hook", None)
        names = [name for name in getattr(registry, "hooks", {}) if "layerwise_casting" not in name]
        if names or hasattr(module, "_hf_hook"):
            return str(names[0]) if names else "accelerate"
    return None


def _arguments(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A block's arguments by name, whatever stands around it or in its `forward`."""
    signature = inspect.signature(type(real_block(block)).forward)
    bound = dict(signature.bind(None, *args, **kwargs).arguments)
    del bound[next(iter(signature.parameters))]
    return bound


def real_block(block: nn.Module) -> nn.Module:
    """The stock block under stand-ins and other libraries' wrappers."""
    while isinstance(block, Stand):
        block = block.__dict__["block"]
    return unwrapped(block)


def _without_numbers(answer: Any) -> Any:
    if isinstance(answer, torch.Tensor):
        return torch.empty_like(answer, device="meta")
    return [None if part is None else torch.empty_like(part, device="meta") for part in answer]


def _result_order(block: nn.Module, answer: Any) -> tuple[Any, bool]:
    """(which arguments a block's results replace, whether there is only one), read from a clean answer's shapes.

    A result that is None, as the text of SD3's last block, stays None.
    """
    if isinstance(answer, torch.Tensor):
        return (lambda bound: [next(iter(bound))]), True
    shapes = [None if part is None else tuple(part.shape[1:]) for part in answer]

    def order(bound: Mapping[str, Any]) -> list[str | None]:
        # LTX-2 hands on video and audio, and only looks at the text
        second = "audio_hidden_states" if "audio_hidden_states" in bound else "encoder_hidden_states"
        names = ("hidden_states", second)
        known = len(shapes) == 2 and "control_hidden_states" not in bound and all(bound.get(name) is not None for name in names)
        expected = {tuple(bound[name].shape[1:]): name for name in names} if known else {}
        if len(expected) < 2 or any(shape is not None and shape not in expected for shape in shapes):
            raise GenAttnError(
                f"target 'skip' must know which result is which, got {shapes} from {type(real_block(block)).__name__}; "
                "use 'identity'"
            )
        return [None if shape is None else expected[shape] for shape in shapes]

    return order, False
