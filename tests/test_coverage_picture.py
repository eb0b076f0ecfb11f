"""The picture of coverage follows the counts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from known_coverage import LATER, RECIPE, listing, scene
from minecube import report
from minecube.errors import CubeError
from minecube.scenes import coverage


def drawn(path, found, recipe=RECIPE, until=LATER):
    report.draw_coverage(
        *coverage.tabulate_coverage([listing(found)], recipe, until), path, "Usable dates by month"
    )
    return imread(path)[..., :3]


def test_the_picture_follows_the_counts(tmp_path):
    """A usable date more, a pass missed less: other pixels. The same again: the same."""
    found = [scene("S2A", "2020-05-01"), scene("S2A", "2020-07-10")]
    one = drawn(tmp_path / "one.png", found)
    np.testing.assert_array_equal(one, drawn(tmp_path / "again.png", found))
    assert (one != drawn(tmp_path / "more.png", [*found, scene("S2B", "2020-08-04")])).any()

    def area(picture, colour):
        return (np.abs(picture - to_rgb(colour)).max(axis=-1) < 0.02).sum()

    every = [scene("S2A", day) for day in coverage.derive_passes(found, 2020)]
    full = drawn(tmp_path / "full.png", every)
    # In the full year only the legend shows these colours.
    assert area(one, report.NONE_USABLE) > 5 * area(full, report.NONE_USABLE) > 0
    assert area(one, report.MISSING) > 2 * area(full, report.MISSING) > 0


@pytest.mark.parametrize("sites", [1, 60])
def test_pictures_of_few_and_of_many(tmp_path, sites):
    """Ten years of many sites are not larger than a screen scrolls; no row and no year is lost."""
    months, years = coverage.tabulate_coverage(
        [listing([scene("S2A", f"{y}-05-01")], y) for y in range(2016, 2026)], RECIPE, LATER
    )
    tables = [pd.concat([t.assign(site=f"pit_{n}") for n in range(sites)]) for t in (months, years)]
    report.draw_coverage(*tables, tmp_path / "map.png", "Usable dates by month")
    height, width = imread(tmp_path / "map.png").shape[:2]
    assert 900 < width < 2600
    assert height < 1500


def test_nothing_to_draw(tmp_path):
    months, years = coverage.tabulate_coverage([listing([])], RECIPE, LATER)
    with pytest.raises(CubeError, match="the audit has no month to draw"):
        report.draw_coverage(months[:0], years[:0], tmp_path / "map.png", "")
