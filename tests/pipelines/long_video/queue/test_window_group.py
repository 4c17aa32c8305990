"""What one process of a group does with the flags of the others, without any others."""

import pytest
import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.window_group import ProcessLeft, WindowGroup

LIKE = torch.zeros(2)


class Others:
    """Sums as a second process would: its flags (failed, left, stop), then its answers."""

    def __init__(self, *flags: float) -> None:
        self.flags, self.calls = torch.tensor(flags), 0

    def __call__(self, tensor: torch.Tensor) -> None:
        self.calls += 1
        tensor += self.flags if tensor.numel() == 3 else torch.ones_like(tensor)


def _answer() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])


def test_answers_are_added_up() -> None:
    others = Others(0, 0, 1)
    group = WindowGroup(0, 2, others)
    prediction, push = group.sum(_answer, LIKE)
    assert (prediction.tolist(), push.tolist(), others.calls) == ([2.0, 3.0], [4.0, 5.0], 2)
    assert group.stop_agreed
    group.abandon(LIKE.device, failed=True)
    assert others.calls == 3, "the others must hear of it"


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [((1, 0, 0), GenAttnError, "1 of 2 processes failed"), ((0, 1, 0), ProcessLeft, "1 of 2 processes left early")],
)
def test_nobody_is_told_what_all_know(flags: tuple[float, ...], error: type[Exception], message: str) -> None:
    others = Others(*flags)
    group = WindowGroup(0, 2, others)
    with pytest.raises(error, match=message):
        group.sum(_answer, LIKE)
    assert group.stop_agreed == (error is ProcessLeft)
    group.abandon(LIKE.device, failed=True)
    assert others.calls == 1


def test_ones_own_failure_is_told_once() -> None:
    others = Others(0, 0, 0)
    group = WindowGroup(0, 2, others)

    def fails() -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        group.sum(fails, LIKE)
    group.abandon(LIKE.device, failed=True)
    assert others.calls == 1


def test_one_alone_has_nobody_to_tell() -> None:
    group = WindowGroup.alone()
    assert [part.tolist() for part in group.sum(_answer, LIKE)] == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(ValueError, match="before"), group.preparing(LIKE.device):
        raise ValueError("before")
