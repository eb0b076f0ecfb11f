"""Windows cover each pixel of a site, and their logits are added exactly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from known_maps import SMALL, given_by, normal, reflectance, stored
from minecube.models import Mapper, cores
from minecube.models.layout import Layout, add_window, blend_rows, weight_logits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("count", "best", "sizes"),
    [
        (0, 16, []),
        (1, 16, [1]),
        (17, 16, [17]),
        (23, 16, [23]),
        (25, 16, [12, 13]),
        (41, 16, [13, 14, 14]),
        (7, 1, [1] * 7),
    ],
)
def test_windows_of_a_row_go_in_equal_groups_of_about_the_best_size(
    count: int, best: int, sizes: list[int]
) -> None:
    groups = cores.group_windows(range(count), best)
    assert [n for group in groups for n in group] == list(range(count))
    assert sorted(map(len, groups)) == sizes


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 80), st.integers(1, 50), st.integers(0, 2**31), st.sampled_from([4, 6, 7, 16])
)
def test_rows_come_once_and_in_order_whatever_the_size(
    height: int, width: int, seed: int, window: int
) -> None:
    of = reflectance(seed, height, width, (2019,))
    model = given_by(
        lambda x: x[:, :1], dataclasses.replace(SMALL, window_px=window, multiple_px=1)
    )
    rows = list(Mapper(model).map_rows(of, [(2019,)]))
    assert [r.y for r in rows] == np.cumsum([0, *(r.values.shape[-2] for r in rows)])[:-1].tolist()
    whole = np.concatenate([r.values for r in rows], axis=-2)[0, 0]
    assert whole.shape == (height, width)
    assert np.abs(whole - stored(normal(of.values[0, 0]))).max() <= 0.5 + 1e-3


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.sampled_from([4, 6, 7, 16, 33]))
def test_every_pixel_is_well_inside_of_some_window(size: int, window: int) -> None:
    layout = Layout(size, 1, window)
    assert len(layout.rows) == layout.tops[-1] + window
    centres = np.array(layout.tops) + (window - 1) / 2 - layout.margin
    distance = np.abs(np.arange(size)[:, None] - centres).min(axis=1)
    assert distance.max() <= window / 4 + 1
    np.testing.assert_array_equal(
        layout.rows[layout.margin : layout.margin + size], np.arange(size)
    )


def test_sums_are_exact_and_limited() -> None:
    logits = torch.tensor([[[1e9, -1e9], [0.5, 2**-21], [29.9999981, 3 * 2**-21]]])
    found = weight_logits(logits, torch.tensor([1, 1024]))
    assert found.tolist() == [
        [[30 * 2**20, -30 * 2**30], [2**19, 0], [int(logits[0, 2, 0].item() * 2**20), 2 * 1024]]
    ]
    row = torch.ones((1, 3, 3), dtype=torch.int64)
    add_window(row, 1, found)
    assert row[..., 0].tolist() == [[1, 1, 1]]
    assert torch.equal(row[..., 1:], found + 1)


@pytest.mark.parametrize("top", [True, False])
def test_rows_are_blended_with_the_overlap_of_the_row_above(top: bool) -> None:
    rng = np.random.default_rng(1)
    ramp, limits = (
        Layout(40, 40, 16).ramp,
        np.sort([0, *rng.normal(0, 3, 249)]),
    )  # a sum of zero is not above it
    weight = rng.integers(1000, 1050, (9, 20)) * 1000 * 2.0**20
    row, before = (rng.integers(-(2**33), 2**33, (2, 3, n, 32)) for n in (16, 0 if top else 8))
    row[1, 2, 3:12, 4:24] = 0
    total = row * ramp[:, None]
    total[..., : before.shape[2], :] += before
    expected = np.searchsorted(limits, total[..., 3:12, 4:24] / weight)
    found = blend_rows(*map(torch.from_numpy, (row, before, ramp, weight, limits)), (3, 4))
    np.testing.assert_array_equal(row, total)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) > 150
