"""GenAttn beside other nodes on one MODEL: in whatever order they come, each works or the report says who took its place."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_standins import ALWAYS, Patcher, WanModel, X, sdpa, sparse

from genattn.apps.comfyui.patching.known import percents_as_sigmas
from genattn.apps.comfyui.patching.seam import OVERRIDE, chain_of, patch_model
from genattn.patterns.dense import DensePattern
from genattn.seam.schedule import Schedule
from genattn.seam.sparse_plugin import SparsePlugin

Node = Callable[[Patcher], Patcher]


@pytest.fixture
def wan() -> Patcher:
    patcher = Patcher(SimpleNamespace(diffusion_model=WanModel()))
    patcher.text = 80
    return patcher


def ours(model: Patcher) -> Patcher:
    return patch_model(model, sparse())


def _slot(model: Patcher, make: Callable[[Any], Any]) -> Patcher:
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    options[OVERRIDE] = make(options.get(OVERRIDE))
    return patched


def backend(model: Patcher) -> Patcher:
    """ComfyUI's Model Attention Backend: sets the slot and hands on to nobody."""
    return _slot(model, lambda before: lambda func, *args, **options: sdpa(*args, **options))


def chaining(model: Patcher) -> Patcher:
    """A pack that hands on whatever it does not take."""

    def make(before: Any) -> Any:
        return lambda func, *args, **options: before(func, *args, **options) if before else func(*args, **options)

    return _slot(model, make)


def taking(model: Patcher) -> Patcher:
    """ComfyUI's Model Sparse Attention: on top again in every step, and answers the self-attention itself."""
    patched = model.clone()
    own: set[Any] = set()

    def stand(options: dict[str, Any]) -> None:
        before = options.get(OVERRIDE)
        if before in own:
            return

        def override(func: Any, q: Any, k: Any, v: Any, heads: int, **more: Any) -> torch.Tensor:
            if q.shape[1] != k.shape[1]:  # cross-attention
                return before(func, q, k, v, heads, **more) if before else func(q, k, v, heads, **more)
            return sdpa(q, k, v, heads, **more)

        own.add(override)
        options[OVERRIDE] = override

    stand(patched.model_options["transformer_options"])
    patched.add_callback_with_key("on_prepare_state", "theirs", stand)
    return patched


def replacing(model: Patcher) -> Patcher:
    """A node that replaces a block and runs the original inside."""
    patched = model.clone()
    replaced = patched.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault("dit", {})
    replaced["double_block", 1] = lambda args, extra: extra["original_block"](args)
    return patched


NODES: dict[str, Node] = {"backend": backend, "chaining": chaining, "taking": taking, "replacing": replacing}
CHOICES = [chosen for size in (1, 2) for chosen in itertools.combinations(NODES, size)]
ORDERS = [order for chosen in CHOICES for order in itertools.permutations((*chosen, "ours"))]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_order_works_or_is_told(wan: Patcher, order: tuple[str, ...]) -> None:
    stock, alone = wan.sample(X), ours(wan).sample(X)
    model = wan
    for name in order:
        model = ours(model) if name == "ours" else NODES[name](model)
    out = model.sample(X)
    told = chain_of(model).tally.removed
    if torch.equal(out, alone):
        assert told == ""
    else:
        torch.testing.assert_close(out, stock, msg="either ours acts, or the stock model runs")
        assert told.startswith("NOT APPLIED") or "answered the self-attention of 3 blocks" in told
    after = order[order.index("ours") + 1 :]
    assert bool(told) == ("backend" in after or "taking" in order), "ours acts unless somebody after it takes the calls"
    assert torch.equal(wan.sample(X), stock), "the model that came in is stock"


def test_an_exception_leaves_nothing_behind(wan: Patcher) -> None:
    stock, patched = wan.sample(X), ours(wan)
    alone = patched.sample(X)
    model, failing = wan.model.diffusion_model, [True]
    original = model.blocks[1].attend

    def attend(*args: Any, **options: Any) -> torch.Tensor:
        if failing:
            failing.clear()
            raise RuntimeError("out of memory")
        return original(*args, **options)

    model.blocks[1].attend = attend
    with pytest.raises(RuntimeError, match="out of memory"):
        patched.sample(X)
    assert torch.equal(wan.sample(X), stock)
    assert torch.equal(patched.sample(X), alone)
    assert chain_of(patched).tally.forwards == 2


class ComfyAttention(torch.nn.Module):
    """A layer's wish for an attention function, as ComfyUI's newer models have it."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def function(self, *args: Any, **options: Any) -> torch.Tensor:
        self.seen.append("wish")
        return sdpa(*args, **options)


def test_dense_calls_keep_what_a_layer_prefers(wan: Patcher) -> None:
    seen: list[str] = []
    for block in wan.model.diffusion_model.blocks:
        block.comfy_attention = ComfyAttention(seen)
    first = wan.model.diffusion_model.blocks[0].comfy_attention
    assert first.function == first.function, "a bound method is equal to itself, so two calls of one layer agree"
    stock = wan.sample(X)
    assert seen == [], "the stand-in's own call does not ask for it"
    dense = patch_model(wan, SparsePlugin(DensePattern(), ALWAYS))
    assert torch.equal(dense.sample(X), stock)
    assert len(seen) == 2 * 6, "all calls of all blocks"
    seen.clear()
    ours(wan).sample(X)
    assert len(seen) == 2 * 3, "the cross-attention"
    seen.clear()
    ours(backend(wan)).sample(X)
    assert seen == [], "whoever stands in the slot counts for more, as in ComfyUI"


def test_blocks_known_by_their_index_alone() -> None:
    class NextDiT(WanModel):
        patch_size, pad_tokens_multiple, says = 2, None, True

        def __init__(self) -> None:
            super().__init__()
            self.layers = self.blocks

        def forward(self, tokens: Any, context: Any, options: dict[str, Any], mask: Any = None) -> torch.Tensor:
            tokens = self.layers[2].attend(tokens, options)  # a refiner: no index is told yet
            for index, block in enumerate(self.layers):
                if self.says:
                    options["block_index"] = index
                tokens = block.attend(tokens, options)
            return tokens

    model = Patcher(SimpleNamespace(diffusion_model=NextDiT()))
    x = torch.zeros(1, 16, 16, 24)  # 8 x 12 = 96 tokens
    stock = model.sample(x)
    assert torch.equal(patch_model(model, SparsePlugin(DensePattern(), ALWAYS)).sample(x), stock)
    patched = patch_model(model, sparse((4, 4)))
    assert not torch.allclose(patched.sample(x), stock)
    stats = chain_of(patched).tally.stats
    assert {name: row.sparse for name, row in stats.items()} == {"layers.0": 2, "layers.1": 2, "layers.2": 2}
    assert chain_of(patched).tally.removed == ""
    model.model.diffusion_model.says = False
    torch.testing.assert_close(patched.sample(x), model.sample(x))
    assert chain_of(patched).tally.removed.startswith("NOT APPLIED in 2 of 2 forwards: this ComfyUI does not say which block")


@pytest.mark.parametrize("computes", [False, True], ids=["leaves the block out", "computes it otherwise"])
def test_a_block_left_out_is_nobodys_and_one_computed_otherwise_is_told(wan: Patcher, computes: bool) -> None:
    def instead(args: Any, extra: Any) -> Any:
        return {"img": args["img"] * 2 if computes else args["img"]}

    for first in (True, False):
        model = wan if first else ours(wan)
        patched = model.clone()
        patched.model_options["transformer_options"]["patches_replace"] = {"dit": {("double_block", 1): instead}}
        patched = ours(patched) if first else patched
        patched.sample(X)
        assert chain_of(patched).tally.removed.count("the self-attention of 1 blocks") == computes


def compiling(model: Patcher) -> Patcher:
    """ComfyUI's compile nodes: while it runs, the compiled model stands in the place; no guard looks at transformer_options."""
    patched = model.clone()
    guards = {"guard_filter_fn": lambda entries: ["options" not in entry.name for entry in entries]}
    compiled = torch.compile(patched.model.diffusion_model, backend="eager", options=guards)

    def wrapper(executor: Any, *args: Any, **options: Any) -> Any:
        owner = executor.class_obj
        original = owner.diffusion_model
        owner.diffusion_model = compiled
        try:
            return executor(*args, **options)
        finally:
            owner.diffusion_model = original

    patched.add_wrapper_with_key("apply_model", "torch.compile", wrapper)
    return patched


@pytest.mark.parametrize("first", [True, False], ids=["ours before", "ours after"])
def test_a_compiled_model_follows_the_schedule(wan: Patcher, first: bool) -> None:
    def late(model: Patcher) -> Patcher:
        return patch_model(model, sparse(schedule=Schedule(dense_steps=2, dense_layers=0)))

    torch.compiler.reset()
    alone = late(wan).sample(X, steps=3)
    patched = compiling(late(wan)) if first else late(compiling(wan))
    torch.testing.assert_close(patched.sample(X, steps=3), alone)
    stats = chain_of(patched).tally.stats.values()
    assert [(stat.calls, stat.sparse) for stat in stats] == [(3, 1)] * 3
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("start", "end", "steps"), [(0.25, 0.75, [1, 2]), (0.0, 0.5, [0, 1]), (0.5, 1.0, [2, 3]), (0.0, 1.0, [0, 1, 2, 3])]
)
def test_shares_of_the_sampling_take_in_the_step_that_begins_there(start: float, end: float, steps: list[int]) -> None:
    # a level rounded otherwise than the sampler's
    sampling = SimpleNamespace(percent_to_sigma=lambda share: (1 - share) * 0.99999)
    model = SimpleNamespace(get_model_object={"model_sampling": sampling}.__getitem__)
    high, low = percents_as_sigmas(model, start, end)
    assert [step for step, sigma in enumerate((1.0, 0.75, 0.5, 0.25)) if low <= sigma <= high] == steps
