"""K-means per head against a loop over points, and where it starts."""

import pytest
import torch

from genattn.errors import GenAttnError
from genattn.selection.kmeans import kmeans, means_by_label, nearest, sizes


def test_one_round_is_lloyd() -> None:
    points = torch.randn(3, 40, 5, dtype=torch.float64)
    start = points[:, :7].clone()
    labels, centres = kmeans(points, 7, 1, start)
    for head in range(3):
        for point in range(40):
            apart = [(float((points[head, point] - c).square().sum()), i) for i, c in enumerate(start[head])]
            assert int(labels[head, point]) == min(apart)[1]
        for cluster in range(7):
            mine = points[head][labels[head] == cluster]
            wanted = mine.mean(0) if len(mine) else start[head, cluster]
            assert torch.allclose(centres[head, cluster], wanted)


def test_separated_groups_are_found_and_stop_early() -> None:
    group = torch.arange(60) % 4
    points = (torch.eye(4)[group] * 50 + torch.randn(60, 4) * 0.1)[None]
    labels, centres = kmeans(points, 4, 50, points[:, :4].clone())
    for one in range(4):
        assert labels[0, group == one].unique().numel() == 1
    again, same = kmeans(points, 4, 50, centres)
    assert torch.equal(again, labels)
    assert torch.allclose(same, centres)
    assert sizes(labels, 4).tolist() == [[15, 15, 15, 15]]


def test_starts_are_even_and_an_empty_centre_stays() -> None:
    points = torch.arange(10.0).view(1, 10, 1)
    labels, _ = kmeans(points, 10, 1)
    assert labels.tolist() == [list(range(10))]
    far = torch.tensor([[[0.0], [1e6]]])
    assert means_by_label(points, nearest(points, far), far)[0, 1, 0] == 1e6


def test_early_rounds_may_look_at_some_points() -> None:
    points = torch.randn(2, 64, 3, dtype=torch.float64)
    start = points[:, :5]
    labels, centres = kmeans(points, 5, 2, start, stride=4)
    some = kmeans(points[:, ::4], 5, 1, start)[1]
    wanted = kmeans(points, 5, 1, some)
    assert torch.equal(labels, wanted[0])
    assert torch.equal(centres, wanted[1])
    # settled on the sample before the rounds are over: all points are still assigned
    assert kmeans(points, 5, 50, start, stride=16)[0].shape == (2, 64)


def test_a_start_of_another_shape_is_not_taken() -> None:
    points = torch.randn(1, 12, 3)
    assert torch.equal(kmeans(points, 3, 4, torch.zeros(1, 5, 3))[0], kmeans(points, 3, 4)[0])


def test_refusals() -> None:
    points = torch.randn(1, 4, 2)
    with pytest.raises(GenAttnError, match="clusters must be between 1 and the 4 tokens there are, got 5"):
        kmeans(points, 5, 1)
    with pytest.raises(GenAttnError, match="iterations of k-means must be >= 1, got 0"):
        kmeans(points, 2, 0)


def test_one_centre_is_the_mean() -> None:
    points = torch.randn(2, 9, 3, dtype=torch.float64)
    labels, centres = kmeans(points, 1, 2)
    assert not labels.any()
    assert torch.allclose(centres[:, 0], points.mean(1))
    assert kmeans(points, 9, 1)[1].shape == (2, 9, 3)


@pytest.mark.parametrize("clusters", [0, 10])
def test_no_centre_and_more_than_points_are_refused(clusters: int) -> None:
    with pytest.raises(GenAttnError, match=f"between 1 and the 9 tokens there are, got {clusters}"):
        kmeans(torch.randn(1, 9, 3), clusters, 1)
