"""A survey finds targets, views and statistics, and refuses what cannot be learnt."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import settings as having
from hypothesis import strategies as st

from known_trainings import (
    CHANGE,
    PLAIN,
    SERIES,
    SMALL,
    Recorded,
    cube,
    labels_of,
    same,
    with_holes,
)
from minecube.errors import ModelError
from minecube.train import Cubes, SourceSurvey, compute_targets, fit, list_views, survey_source

pytestmark = pytest.mark.usefixtures("one_thread")


# What is to be learnt


@having(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 255]), min_size=24, max_size=24))
def test_targets_are_what_each_pair_of_pixels_says(values: list[int]) -> None:
    label = np.array(values, np.uint8).reshape(2, 3, 4)
    classes = ("new", "changed", "removed")
    found = compute_targets(label, classes)
    assert (found.dtype, found.shape) == (np.uint8, (1, 3, 3, 4))
    for y, x in np.ndindex(3, 4):
        before, after = int(label[0, y, x]), int(label[1, y, x])
        told = {
            "new": (before, after) == (0, 1),
            "removed": (before, after) == (1, 0),
            "changed": before != after,
        }
        for c, name in enumerate(classes):
            assert found[0, c, y, x] == (255 if 255 in (before, after) else told[name])
    assert np.array_equal(compute_targets(label, ("mine",)), label[:, None])


def test_views_are_those_of_the_task() -> None:
    years = tuple(range(2015, 2025))
    source = Cubes({"a": cube(1, years=years), "b": cube(2, 8, 8, (2016, 2020, 2021))})
    assert list_views(source, SMALL) == [("a", (y,)) for y in years] + [
        ("b", (y,)) for y in (2016, 2020, 2021)
    ]
    pairs = list_views(source, CHANGE)
    assert len(pairs) == 45 + 3
    assert pairs[-3:] == [("b", (2016, 2020)), ("b", (2016, 2021)), ("b", (2020, 2021))]
    assert all(first < second for _, (first, second) in pairs)
    far = list_views(source, CHANGE, (4, 9))
    assert far == [
        ("a", (y, y + 4)) if y < 2021 else ("a", (2015, 2024)) for y in range(2015, 2016)
    ] + [("a", (2015, 2024))] + [("a", (y, y + 4)) for y in range(2016, 2021)] + [
        ("b", (2016, 2020))
    ]
    assert list_views(Cubes({"a": cube(1, years=years)}), SERIES) == [("a", years)]


def test_years_come_in_their_order_whatever_the_order_in_the_cube() -> None:
    of = cube(1, years=(2018, 2019, 2021))
    plain, turned = Cubes({"a": of}), Cubes({"a": of.isel(year=[2, 0, 1])})
    assert list_views(turned, CHANGE) == list_views(plain, CHANGE)
    for one, other in zip(
        turned.cut("a", (2018, 2021), 3, 4, 20), plain.cut("a", (2018, 2021), 3, 4, 20), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_years_that_do_not_fit_the_task_are_refused() -> None:
    one, two = cube(1, years=(2019,)), cube(2)
    with pytest.raises(ModelError, match="sees two years, found 2019 at a"):
        fit(CHANGE, Cubes({"a": one}), None, PLAIN)
    with pytest.raises(ModelError, match=r"two years 2 or 3 years apart, found 2019, 2020 at b"):
        fit(CHANGE, Cubes({"b": two}), None, dataclasses.replace(PLAIN, gaps=(2, 3)))
    with pytest.raises(ModelError, match=r"those of a \(2019\), found 2019, 2020 at b"):
        fit(SERIES, Cubes({"a": one, "b": two}), None, PLAIN)
    with pytest.raises(
        ModelError,
        match=r"as many of the validation sites as of the training sites \(2\), found 1 at a",
    ):
        fit(SERIES, Cubes({"b": two}), Cubes({"a": one}), PLAIN)


# The survey


def test_normalisation_is_that_of_observed_training_pixels() -> None:
    a, b, unseen = with_holes(1), with_holes(2, 33, 70), cube(3)
    unseen.reflectance.values[...] += 5000  # were it looked at, the mean would tell
    three = dataclasses.replace(SMALL, bands=("B03", "B08", "B12"))
    model = fit(
        three, Cubes({"a": a, "b": b}), Cubes({"c": unseen}), dataclasses.replace(PLAIN, epochs=1)
    ).trained
    images = np.concatenate(
        [
            c.reflectance.sel(band=list(three.bands)).values.swapaxes(0, 1).reshape(3, -1)
            for c in (a, b)
        ],
        axis=1,
    )
    observed = images[:, (images > 0).all(axis=0)].astype(np.longdouble)
    np.testing.assert_allclose(model.mean, observed.mean(axis=1).astype(float), rtol=1e-14)
    np.testing.assert_allclose(model.std, observed.std(axis=1).astype(float), rtol=1e-12)


def need_all_found(found: SourceSurvey, of: xr.Dataset) -> None:
    """Assert that the survey of pairs of one site has every cell and pixel."""
    years, (height, width) = of.year.values.tolist(), of.footprint.shape[1:]
    cell = found.cell_px
    labels = dict(zip(years, labels_of(of).astype(int), strict=True))
    positive, pixels = Counter(), 0
    for n, (_, (first, second)) in enumerate(found.views):
        known = (labels[first] < 2) & (labels[second] < 2)
        gone, new = (
            known & (labels[first] > labels[second]),
            known & (labels[first] < labels[second]),
        )
        positive.update(removed=int(gone.sum()), new=int(new.sum()))
        pixels += int(known.sum())
        for row, column in np.ndindex(-(-height // cell), -(-width // cell)):
            part = np.s_[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            assert found.known[n][row, column] == known[part].any()
            assert found.rare[n][row, column] == (gone | new)[part].any()
    assert found.positive == (positive["removed"], positive["new"])
    assert found.pixels == pixels


def test_the_survey_reads_blocks_and_finds_what_is_in_all_of_them() -> None:
    # Four blocks of 512 pixels; the mines of both years lie over the corner where they meet.
    of = with_holes(1, 540, 580)
    of.footprint.values[0, 490:530, 470:560], of.footprint.values[1, 490:530, 480:570] = 1, 1
    source = Recorded({"a": of})
    found = survey_source(source, CHANGE, PLAIN)
    assert sorted(source.cuts) == [
        ("a", [year], y, x, 512) for year in (2019, 2020) for y in (0, 512) for x in (0, 512)
    ]
    need_all_found(found, of)
    pixels = of.reflectance.values.swapaxes(0, 1).reshape(10, -1)
    observed = pixels[:, (pixels > 0).all(axis=0)].astype(np.int64)
    n, total, squares = observed.shape[1], observed.sum(axis=1), (observed**2).sum(axis=1)
    # In whole numbers of any length, so to the last bit.
    assert found.mean == tuple(int(t) / n for t in total)
    variances = [(n * int(q) - int(t) ** 2) / n**2 for t, q in zip(total, squares, strict=True)]
    assert found.std == tuple(variance**0.5 for variance in variances)


@having(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99),
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    side=st.sampled_from([4, 8, 12, 16, 32, 96, 160]),
)
def test_the_survey_finds_every_cell_and_pixel(
    seed: int, height: int, width: int, side: int
) -> None:
    of = with_holes(seed, height, width, (2018, 2019, 2020))
    of.footprint.values[0, 0, 0], of.footprint.values[1:, 0, 0] = 0, 1  # some change at least
    of.footprint.values[0, -1, -1], of.footprint.values[1:, -1, -1] = 1, 0
    of.reflectance.values[:, :, [0, -1], [0, -1]] = 7
    if height * width == 1:
        return
    card = dataclasses.replace(CHANGE, window_px=side)
    found = survey_source(Cubes({"a": of}), card, PLAIN)
    assert found.cell_px == {4: 1, 8: 2, 12: 2, 16: 4, 32: 8, 96: 16, 160: 16}[side]
    need_all_found(found, of)


def test_what_cannot_be_learnt_is_refused() -> None:
    of = cube(1)
    of.footprint.values[...] = 255
    with pytest.raises(
        ModelError, match="cubes of a have no pixel that is both labelled and observed"
    ):
        fit(SMALL, Cubes({"a": of, "b": cube(2)}), None, PLAIN)
    of.footprint.values[0], of.reflectance.values[0] = 1, 0
    with pytest.raises(ModelError, match="both labelled and observed"):
        fit(SMALL, Cubes({"a": of}), None, PLAIN)
    with pytest.raises(ModelError, match="reflectance and footprint, found reflectance"):
        Cubes({"a": of.drop_vars("footprint")})
    with pytest.raises(ModelError, match="found none"):
        Cubes({})
    with pytest.raises(ModelError, match=r"uint16.* as float64"):
        Cubes({"a": of.assign(reflectance=of.reflectance / 1e4)})
    none = cube(1)
    none.footprint.values[...] = 0
    with pytest.raises(ModelError, match="'mine', found none in the labels of a"):
        fit(SMALL, Cubes({"a": none}), None, PLAIN)
    with pytest.raises(ModelError, match="'mine', found none in the labels of b"):
        fit(SMALL, Cubes({"a": cube(1)}), Cubes({"b": none}), PLAIN)
    still = cube(1)
    still.footprint.values[1] = still.footprint.values[0]
    with pytest.raises(ModelError, match=r"'removed', found none in the labels of a.*that change"):
        fit(CHANGE, Cubes({"a": still}), None, PLAIN)


def test_bands_are_taken_by_name() -> None:
    of = cube(1)
    three = dataclasses.replace(SMALL, bands=("B03", "B04", "B11"))
    once = dataclasses.replace(PLAIN, epochs=1)
    expected = fit(three, Cubes({"a": of.sel(band=list(three.bands))}), None, once)
    assert same(fit(three, Cubes({"a": of}), None, once).trained.network, expected.trained.network)
    with pytest.raises(ModelError, match="in this order, found B03, B02, B04"):
        fit(SMALL, Cubes({"a": of.isel(band=[1, 0, *range(2, 10)])}), None, once)
    with pytest.raises(ModelError, match="found B02, B03, B04"):
        fit(SMALL, Cubes({"a": of.isel(band=slice(0, 9))}), None, once)
    with pytest.raises(ModelError, match="no names"):
        fit(SMALL, Cubes({"a": of.drop_vars("band")}), None, once)
    with pytest.raises(
        ModelError, match=r"site b: expected the bands B02, .*, as of the other sites"
    ):
        Cubes({"a": of, "b": of.isel(band=slice(0, 9))})
