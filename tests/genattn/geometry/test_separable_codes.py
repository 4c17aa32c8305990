"""Codes of a product of axes, against the product written out."""

import itertools

import numpy as np
import pytest

from genattn.geometry.separable_codes import SeparableCodes


@pytest.mark.parametrize("shapes", [((2, 3),), ((3, 2), (2, 4)), ((2, 1), (3, 2), (2, 5))])
@pytest.mark.parametrize(("before", "after", "dense_k"), [(0, 0, 0), (2, 1, 3)])
def test_rows_are_the_least_of_the_axes(shapes: tuple[tuple[int, int], ...], before: int, after: int, dense_k: int) -> None:
    draw = np.random.default_rng(3)
    tables = [draw.integers(0, 3, shape, dtype=np.uint8) for shape in shapes]
    codes = SeparableCodes(tables, (before, after), dense_k)
    queries = list(itertools.product(*(range(q) for q, _ in shapes)))
    keys = list(itertools.product(*(range(k) for _, k in shapes)))
    wanted = np.full((before + len(queries) + after, dense_k + len(keys)), 2, dtype=np.uint8)
    for i, query in enumerate(queries):
        for j, key in enumerate(keys):
            wanted[before + i, dense_k + j] = min(table[q, k] for table, q, k in zip(tables, query, key, strict=True))
    total = len(wanted)
    assert np.array_equal(codes.rows(0, 0, total), wanted)
    for start, stop in ((0, 1), (1, total), (total - 1, total), (before, before + 1)):
        assert np.array_equal(codes.rows(0, start, stop), wanted[start:stop])
