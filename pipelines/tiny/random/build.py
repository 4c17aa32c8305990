"""Every supported model family at a size that runs in milliseconds, with random weights, built offline from a config.

model = build_model("wan"); model(**build_inputs("wan"))          the denoiser alone
pipe, kwargs = build_pipeline("wan"); pipe(**kwargs)              a whole stock pipeline: text encoder, VAE, scheduler

For tests, for plugin authors, and for speed at real sizes (`build_model("wan", num_layers=30, ...)`). Never for pictures.
"""

from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.random.models import MODELS, settle
from genattn.pipelines.tiny.random.pipes import PIPELINES


def families() -> list[str]:
    """Names that `build_model` knows, as far as the installed diffusers has their models."""
    return [name for name, spec in MODELS.items() if spec.available]


def pipeline_families() -> list[str]:
    """Names that `build_pipeline` knows."""
    return list(PIPELINES)


def build_model(family: str, seed: int = 0, **config: Any) -> nn.Module:
    """The denoiser of `family` with random weights, in eval mode, float32, on the CPU. config: overrides of its settings.

    The weights that stock initialisation leaves at zero or that overflow in tiny sizes are set too, so that every attention
    matters for the output.
    """
    spec = _known(family, MODELS)
    torch.manual_seed(seed)
    model: nn.Module = spec.build({**spec.config, **config}).eval()
    settle(model, spec.zero, seed)
    return model


def build_inputs(family: str, seed: int = 0, grid: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Keyword arguments for one forward of `build_model(family)`.

    grid: raster of tokens, (frames, height, width) for video, (height, width) for images, (frames,) for sound; None: tiny.
    """
    spec = _known(family, MODELS)
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = spec.inputs(generator) if grid is None else spec.inputs(generator, grid)
    return inputs


def build_pipeline(family: str, **config: Any) -> tuple[Any, dict[str, Any]]:
    """(a stock pipeline of `family` around `build_model`, keyword arguments for a call of 3 steps).

    The call returns tensors; `pipe(**kwargs, generator=torch.Generator().manual_seed(0))` is deterministic.
    """
    build = _known(family, PIPELINES)
    pipe, kwargs = build(lambda name=family, **more: build_model(name, **{**config, **more}))
    pipe.set_progress_bar_config(disable=True)
    return pipe, kwargs


def _known(family: str, table: dict[str, Any]) -> Any:
    if family not in table:
        raise GenAttnError(f"unknown family {family!r}; known are {', '.join(table)}")
    return table[family]
