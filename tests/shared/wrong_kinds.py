"""Values that no setting takes, whatever it is: each must be refused in words and never end in a bare TypeError."""

from typing import Any

import numpy as np
import torch

NEVER: dict[str, Any] = {
    "an object": object(),
    "complex": 1j,
    "bytes": b"x",
    "a list of None": [None],
    "a dict": {"a": 1},
    "NaN": float("nan"),
    "minus infinity": float("-inf"),
    "an array without axes": np.array(2.5),
    "an array": np.array([["a"]]),
    "a tensor": torch.tensor(0.5),
    "tensors": torch.tensor([1.0, 2.0]),
    "a set": {"x"},
    "a type": int,
    "a text": " ",
}
