"""Shared by all tests: no hub, two threads, and NaN in every uninitialised tensor that our own code asks for."""

import importlib
import os
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from pathlib import Path

import pytest
import torch

_stock_empty = torch.empty
_stock_empty_like = torch.empty_like
# torch remembers once which functions make tensors, and its compiler which functions it knows; both must see the stock ones
with torch.device("meta"):
    torch.empty(0)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on loading its compiler
    importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map()


def _called_from_genattn() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("genattn.")


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() and not tensor.is_meta:
        tensor.fill_(float("nan"))
    return tensor


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that a kernel forgot to write must not pass by luck."""

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = _stock_empty(*args, **kwargs)
        return _poison(tensor) if _called_from_genattn() else tensor

    def empty_like(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = _stock_empty_like(*args, **kwargs)
        return _poison(tensor) if _called_from_genattn() else tensor

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def random_wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole stock WanPipeline with random weights, as `save_pretrained` writes it."""
    from genattn.pipelines.tiny.random.build import build_pipeline

    folder = tmp_path_factory.mktemp("models") / "random-wan"
    pipe, _ = build_pipeline("wan")
    pipe.save_pretrained(folder)
    return folder
