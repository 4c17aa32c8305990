"""Shared by all tests: no hub, two threads, and NaN in every uninitialised tensor that our own code asks for."""

import os
import signal
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from pathlib import Path

import pytest
import torch

_stock_empty = torch.empty
_stock_empty_like = torch.empty_like
with torch.device("meta"):  # torch remembers once which functions make tensors; it must see the stock ones
    torch.empty(0)


def _called_from_genattn() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("genattn.")


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() and not tensor.is_meta:
        tensor.fill_(float("nan"))
    return tensor


def _forget_replaced_functions() -> None:
    """torch's compiler keeps a map of the functions it knows; one made while ours stood there lacks the stock ones."""
    rules = sys.modules.get("torch._dynamo.trace_rules")
    if rules and rules.get_torch_obj_rule_map.cache_info().currsize and _stock_empty_like not in rules.get_torch_obj_rule_map():
        rules.clear_lru_cache()


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An output that a kernel forgot to write must not pass by luck."""
    if request.node.get_closest_marker("compiled"):  # Dynamo cannot trace the look at the caller
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()
        return

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = _stock_empty(*args, **kwargs)
        return _poison(tensor) if _called_from_genattn() else tensor

    def empty_like(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = _stock_empty_like(*args, **kwargs)
        return _poison(tensor) if _called_from_genattn() else tensor

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield
    _forget_replaced_functions()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """SIGINT as a terminal leaves it: a shell has it ignored in what it starts in the background, and no run would stop."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def hangup_is_heard() -> Iterator[None]:
    """SIGHUP as a terminal leaves it: tests that were started by nohup find it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def random_wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole stock WanPipeline with random weights, as `save_pretrained` writes it."""
    from genattn.pipelines.tiny.random.build import build_pipeline

    folder = tmp_path_factory.mktemp("models") / "random-wan"
    pipe, _ = build_pipeline("wan")
    pipe.save_pretrained(folder)
    return folder
