"""Perturbation guidance done the long way: explicit maps in float64, and the term added after the pipeline's own combination.

Nothing here knows the seam, the plugin or the pass roles: attention modules are found by name, the conditional inputs are
picked by a rule that the test states, and w (clean - perturbed) is added to what the scheduler is given.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_STOCK_SDPA = F.scaled_dot_product_attention
STACKS = ("transformer_blocks", "single_transformer_blocks", "blocks")
ATTENTIONS = ("attn", "attn1")


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self or joint attention of every block, in execution order."""
    blocks = [block for stack in STACKS for block in getattr(model, stack, [])]
    return [next(getattr(block, name) for name in ATTENTIONS if hasattr(block, name)) for block in blocks]


@contextlib.contextmanager
def explicit_maps(model: nn.Module, weights: dict[int, torch.Tensor]) -> Iterator[None]:
    """SDPA by explicit maps in float64, drawn towards the identity by weights[layer] [H], inside the chosen layers."""
    here: list[int] = []
    hooks = []
    for layer, module in enumerate(attention_modules(model)):
        hooks.append(module.register_forward_pre_hook(lambda *_, layer=layer: here.append(layer)))
        hooks.append(module.register_forward_hook(lambda *_: [here.pop(), None][1]))

    def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore
        if not here or here[-1] not in weights:
            return _STOCK_SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        logits = query.double() @ key.double().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            extra = attn_mask.double() if attn_mask.dtype != torch.bool else torch.where(attn_mask, 0.0, -torch.inf).double()
            logits = logits + extra
        plain = logits.softmax(-1).nan_to_num(0.0)  # rows of padding see nothing
        u = weights[here[-1]].double().view(1, -1, 1, 1)
        eye = torch.eye(plain.shape[-1], dtype=torch.float64)
        return (((1 - u) * plain + u * eye) @ value.double()).to(query.dtype)

    F.scaled_dot_product_attention = sdpa
    try:
        yield
    finally:
        F.scaled_dot_product_attention = _STOCK_SDPA
        for hook in hooks:
            hook.remove()


def guided_latents(
    pipe: Any,
    call: Callable[[], torch.Tensor],
    weights: dict[int, torch.Tensor],
    scale: float,
    pick: Callable[[list[dict[str, Any]]], dict[str, Any]],
    models: tuple[str, ...] = ("transformer",),
    steps: range | None = None,
) -> torch.Tensor:
    """What `call()` gives when w (clean - perturbed) is added to the combined prediction of every step.

    Args:
        pipe: a stock pipeline.
        call: runs it.
        weights: per layer, the weights of all heads.
        scale: w.
        pick: from the inputs of the step's forwards, those of the conditional samples.
        models: names of the denoisers.
        steps: guided steps, None for all.
    """
    seen: list[tuple[nn.Module, dict[str, Any]]] = []
    stock_step, count = pipe.scheduler.step, [0]
    forwards = {name: getattr(pipe, name).forward for name in models}
    for name in models:
        model = getattr(pipe, name)

        def forward(*args: Any, model: nn.Module = model, stock: Any = forwards[name], **kwargs: Any) -> Any:
            assert not args
            seen.append((model, kwargs))
            return stock(**kwargs)

        model.forward = forward

    def step(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        model = seen[0][0]
        inputs = pick([kwargs_ for _, kwargs_ in seen])
        stock = next(forwards[name] for name in models if getattr(pipe, name) is model)
        seen.clear()
        count[0] += 1
        if steps is None or count[0] - 1 in steps:
            clean = stock(**{**inputs, "return_dict": False})[0]
            with explicit_maps(model, weights):
                perturbed = stock(**{**inputs, "return_dict": False})[0]
            delta = scale * (clean - perturbed)
            model_output = model_output + delta[..., : model_output.shape[-1]].to(model_output.dtype)
        return stock_step(model_output, *args, **kwargs)

    pipe.scheduler.step = step
    try:
        with torch.no_grad():
            return call()
    finally:
        del pipe.scheduler.step
        for name in models:
            del getattr(pipe, name).forward


def halve(inputs: dict[str, Any]) -> dict[str, Any]:
    """The second half of every batched tensor."""
    batch = len(inputs["hidden_states"])
    return {
        name: value[batch // 2 :] if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch else value
        for name, value in inputs.items()
    }
