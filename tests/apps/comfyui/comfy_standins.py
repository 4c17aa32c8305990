"""Stand-ins that call attention and patches as ComfyUI's models and patcher do."""

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genattn.apps.comfyui.patching.seam import OVERRIDE
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.seam.schedule import Schedule
from genattn.seam.sparse_plugin import SparsePlugin

ALWAYS = Schedule(dense_steps=0, dense_layers=0)


def sdpa(q: Any, k: Any, v: Any, heads: int, mask: Any = None, skip_reshape: bool = False, **rest: Any) -> torch.Tensor:
    """ComfyUI's attention function."""
    if not skip_reshape:
        q, k, v = (t.reshape(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
    if mask is not None and mask.ndim < 4:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if rest.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


def optimized_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    """ComfyUI's `wrap_attn`: the override gets the call."""
    override = (kwargs.get("transformer_options") or {}).get(OVERRIDE)
    return sdpa(*args, **kwargs) if override is None else override(sdpa, *args, **kwargs)


class Block(nn.Module):
    def __init__(self, seed: int, dim: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = [torch.randn(dim, dim, generator=generator) * dim**-0.5 for _ in range(3)]
        self.x_block = SimpleNamespace(x_block_self_attn=False)

    def attend(self, x: torch.Tensor, options: Any, mask: Any = None, split: bool = False) -> torch.Tensor:
        q, k, v = (x @ w for w in self.weights)
        if split:
            q, k, v = (t.reshape(*t.shape[:2], 4, -1).transpose(1, 2) for t in (q, k, v))
        return x + optimized_attention(q, k, v, heads=4, mask=mask, skip_reshape=split, transformer_options=options)


class WanModel(nn.Module):
    patch_size, num_heads = (1, 2, 2), 4

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(i) for i in range(3)])
        self.split = False

    def forward(self, tokens: torch.Tensor, context: torch.Tensor, options: dict[str, Any], mask: Any = None) -> torch.Tensor:
        for i, block in enumerate(self.blocks):

            def run(args: dict[str, Any], block: Any = block) -> dict[str, Any]:
                out = block.attend(args["img"], args["transformer_options"], mask, self.split)
                q, k = out @ block.weights[0], context @ block.weights[1]
                return {"img": out + optimized_attention(q, k, k, heads=4, transformer_options=args["transformer_options"])}

            replaced = options.get("patches_replace", {}).get("dit", {}).get(("double_block", i))
            args = {"img": tokens, "transformer_options": options}
            tokens = (replaced(args, {"original_block": run}) if replaced else run(args))["img"]
        return tokens


class Patcher:
    """What we use of ComfyUI's ModelPatcher. text: context tokens; by default as many as there are latent tokens."""

    text = 96

    def __init__(self, model: Any) -> None:
        self.model, self.model_options = model, {"transformer_options": {}}
        self.wrappers: dict[str, list[Any]] = {}
        self.callbacks: dict[str, list[Any]] = {}
        self.keys: dict[int, str] = {}

    def clone(self) -> "Patcher":
        other = Patcher(self.model)
        other.text = self.text
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {kind: list(found) for kind, found in self.wrappers.items()}
        other.callbacks = {kind: list(found) for kind, found in self.callbacks.items()}
        other.keys = dict(self.keys)
        return other

    def get_wrappers(self, kind: str, key: str) -> list[Any]:
        return [wrapper for wrapper in self.wrappers.get(kind, []) if self.keys.get(id(wrapper)) == key]

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, []).append(wrapper)
        self.keys[id(wrapper)] = key

    def add_callback_with_key(self, kind: str, key: str, callback: Any) -> None:
        self.callbacks.setdefault(kind, []).append(callback)

    def sample(self, x: torch.Tensor, steps: int = 2, **more: Any) -> torch.Tensor:
        """Some forwards, as a sampler makes them; the last answer."""
        for callback in self.callbacks.get("on_pre_run", []):
            callback(self)
        schedule = torch.linspace(1, 0, steps + 1)
        for sigma in schedule[:-1]:
            told = {"sigmas": sigma[None], "sample_sigmas": schedule, "cond_or_uncond": [0]}
            state = dict(self.model_options["transformer_options"])
            for callback in self.callbacks.get("on_prepare_state", []):
                callback(state)
            out = self.forward(x, {**state, **told, **more})
        for callback in self.callbacks.get("on_cleanup", []):
            callback(self)
        return out

    def forward(self, x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        def network(x: Any, t: Any, concat: Any, context: Any, control: Any, options: Any, mask: Any = None) -> torch.Tensor:
            tokens = torch.randn(1, 96, 32, generator=torch.Generator().manual_seed(0))
            return self.model.diffusion_model(tokens, context, options, mask)

        context = torch.randn(1, self.text, 32, generator=torch.Generator().manual_seed(1))
        call: Any = network
        for wrapper in self.wrappers.get("apply_model", []):
            call = _executor(wrapper, call, self.model, network)
        return call(x, None, None, context, None, options, **({"mask": self.mask} if hasattr(self, "mask") else {}))


def _executor(wrapper: Any, inner: Any, model: Any, network: Any) -> Any:
    class Executor:
        class_obj, original = model, staticmethod(network)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

    return lambda *args, **kwargs: wrapper(Executor(), *args, **kwargs)


X = torch.zeros(1, 16, 6, 8, 8)  # 6 x 4 x 4 = 96 tokens


def sparse(window: Any = (3, 2, 2), schedule: Schedule = ALWAYS) -> SparsePlugin:
    return SparsePlugin(NeighborhoodPattern(window, tail=None), schedule)
