"""Layouts of models that look back on earlier chunks: forwards of which nothing is known stay dense."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genattn.layouts.video_history import anyflow_far

CONFIG = SimpleNamespace(full_chunk_limit=2, compressed_patch_size=(1, 4, 4), patch_size=(1, 2, 2))
MODEL = SimpleNamespace(config=CONFIG)


def inputs(**changes: Any) -> dict[str, Any]:
    flag = {"num_cached_chunks": 1}
    return {
        "kv_cache": object(),
        "kv_cache_flag": flag,
        "chunk_partition": [1, 2, 2],
        "hidden_states": torch.zeros(1, 2, 16, 8, 8),
    } | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_cache": None},
        {"kv_cache_flag": {"num_cached_chunks": 1, "is_cache_step": True}},
        {"kv_cache": None, "kv_cache_flag": {"is_cache_step": True}},
    ],
)
def test_forwards_that_keep_keys_or_train_have_no_layout(changes: dict[str, Any]) -> None:
    assert anyflow_far(MODEL, inputs()) is not None
    assert anyflow_far(MODEL, inputs(**changes)) is None
