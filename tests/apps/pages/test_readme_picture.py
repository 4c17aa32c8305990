"""README's picture: the visited share is that of the pattern, layer by layer."""

import numpy as np

from genattn.apps.pages.readme_picture import visited_shares
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.combine import PerLayer
from genattn.patterns.dense import DensePattern
from genattn.patterns.neighborhood import NeighborhoodPattern


def test_the_picture_shows_the_mean_over_layers() -> None:
    layout = TokenLayout.from_grid((4, 4, 4))
    frames = NeighborhoodPattern((1, 4, 4)).with_tail(None)
    own = np.eye(4, dtype=np.float32)
    assert np.array_equal(visited_shares(frames, layout, 2, cells=4), own)
    half = visited_shares(PerLayer((frames, DensePattern()), (0, 1)), layout, 2, cells=4)
    assert np.array_equal(half, (own + 1) / 2)
