"""Boundaries of maps are matched within three pixels of Euclidean distance."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from minecube.metrics import count, finish


def boundaries(p: np.ndarray, y: np.ndarray) -> list[int]:
    """The last four of Mapped, of one year, by Euclidean distances."""
    known = (p != 255) & (y != 255)

    def edge(mask: np.ndarray) -> np.ndarray:
        found = np.zeros(mask.shape, bool)
        for a, b in np.argwhere((mask == 1) & known):
            near = [(a - 1, b), (a + 1, b), (a, b - 1), (a, b + 1)]
            inside = [
                n
                for n in near
                if 0 <= n[0] < mask.shape[0] and 0 <= n[1] < mask.shape[1] and known[n]
            ]
            found[a, b] = any(mask[n] == 0 for n in inside)
        return found

    drawn, true = edge(p), edge(y)
    near_true, near_drawn = (
        distance_transform_edt(~of) <= 3 if of.any() else np.zeros_like(of) for of in (true, drawn)
    )
    return [int(of.sum()) for of in (drawn, drawn & near_true, true, true & near_drawn)]


@pytest.mark.parametrize("width", [61, 200])
def test_boundaries_are_those_of_euclidean_distances(width: int) -> None:
    """Of pits, of single pixels scattered, and of both, some unknown in the upper rows, year by year."""
    r = np.random.default_rng(3)
    shape = (6, 43, width)
    pits = np.kron(r.integers(0, 2, (2, 6, 5, -(-width // 9))), np.ones((9, 9), int))[
        ..., :43, :width
    ]
    single = r.random((2, *shape)) < 0.03
    kinds = np.array([0, 1, 2, 0, 1, 1]).reshape(-1, 1, 1)
    p, y = np.where(kinds == 0, pits, np.where(kinds == 1, single, pits ^ single)).astype(np.uint8)
    p[1:5, :7][r.random((4, 7, width)) < 0.2] = 255
    y[1:5, :7, : width // 2] = 255
    y[3, :, 20:] = 0
    found = [dataclasses.astuple(n)[5:] for n in count(p, y, range(2015, 2021)).years.values()]
    expected = [boundaries(*year) for year in zip(p, y, strict=True)]
    assert np.array(found).tolist() == expected
    assert all(0 < near < drawn for drawn, near, *_ in expected)


def test_boundary_f1_is_that_of_its_counts() -> None:
    p, y = (
        np.kron(np.random.default_rng(n).integers(0, 2, (1, 6, 7)), np.ones((1, 9, 9), np.uint8))
        for n in (3, 4)
    )
    drawn, drawn_near, true, true_near = boundaries(p[0], y[0])
    precision, recall = drawn_near / drawn, true_near / true
    assert 0.1 < precision < 0.9
    expected = 2 * precision * recall / (precision + recall)
    assert finish(count(p, y, [2020]))["boundary_f1"] == pytest.approx(expected)


@pytest.mark.parametrize("at", [20, *range(60, 69)])
@pytest.mark.parametrize(("shift", "expected"), [(3, 1), (4, 0)])
def test_boundary_tolerance_is_three_pixels(shift: int, expected: float, at: int) -> None:
    y = np.zeros((1, 20, 140), np.uint8)
    y[0, :, :at] = 1
    p = y.copy()
    p[0, :, at : at + shift] = 1
    assert finish(count(p, y, [2020]))["boundary_f1"] == expected
