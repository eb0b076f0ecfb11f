"""Areas against projected polygons, gains and losses against loops."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
import shapely
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox

from minecube import tracks
from minecube.errors import LabelError
from minecube.grid import equal_area_crs

YEARS = [2018, 2019, 2021]


def footprint(values: object, years: list[int] = YEARS) -> xr.DataArray:
    return xr.DataArray(
        np.asarray(values, np.uint8), dims=("year", "y", "x"), coords={"year": years}
    )


def grid(height: int, width: int, left: float = 700_020, epsg: int = 32633) -> GeoBox:
    return GeoBox((height, width), Affine(10, 0, left, 0, -10, 5_600_040), f"EPSG:{epsg}")


def projected_m2(mask: np.ndarray, where: GeoBox) -> float:
    """Every pixel a polygon, every polygon projected: slow and exact."""
    rows, columns = np.nonzero(mask)
    left, top = where.affine * (columns, rows)
    squares = gpd.GeoSeries(shapely.box(left, top - 10, left + 10, top), crs=str(where.crs))
    return float(squares.to_crs(equal_area_crs(where)).area.sum())


# 200 km and 330 km east of the central meridian, on it, and outside EPSG:3035's area of use.
@pytest.mark.parametrize(
    ("left", "epsg"), [(700_020, 32633), (830_040, 32633), (499_980, 32633), (300_000, 32719)]
)
def test_areas_are_those_of_projected_pixels(left: int, epsg: int) -> None:
    where = grid(150, 90, left, epsg)
    masks = np.random.default_rng(0).random((1, 150, 90)) < 0.4
    found = tracks.compute_areas(footprint(masks, [2020]), where)["area_m2"][0]
    assert found == pytest.approx(projected_m2(masks[0], where), rel=1e-5)


def test_area_is_not_a_count_of_100_m2() -> None:
    # 330 km from the central meridian UTM enlarges areas by 0.2 %: counting pixels would be off by that.
    where = grid(100, 100, 830_040)
    found = tracks.compute_areas(footprint(np.ones((1, 100, 100)), [2020]), where)["area_m2"][0]
    assert abs(found / (100 * 100 * 100) - 1) > 0.0015


def test_worth_of_a_pixel_follows_its_place_in_the_grid() -> None:
    # 40 km from west to east: one factor for the whole site would be 0.02 % off at its ends.
    where = grid(10, 4000, 780_000)
    east = np.zeros((1, 10, 4000), np.uint8)
    east[:, :, -50:] = 1
    assert tracks.compute_areas(footprint(east, [2020]), where)["area_m2"][0] == pytest.approx(
        projected_m2(east[0], where), rel=1e-5
    )


def test_gain_and_loss_by_hand() -> None:
    #            stays  opened  closed  unknown in between, opened there  first known in 2019, unknown at last
    series = [[[1, 0, 1, 0, 255, 1]], [[1, 1, 1, 255, 1, 1]], [[1, 1, 0, 1, 1, 255]]]
    where = grid(1, 6)
    table = tracks.compute_areas(footprint(series), where)
    pixel = tracks.compute_areas(footprint(np.ones((1, 1, 6)), [2020]), where)["area_m2"][0] / 6
    counts = (table.set_index("year") / pixel).round(6)
    assert counts["area_m2"].tolist() == [3, 5, 4]
    assert counts["unknown_m2"].tolist() == [1, 1, 1]
    assert counts["gain_m2"].tolist()[1:] == [1, 1]
    assert counts["loss_m2"].tolist()[1:] == [0, 1]
    assert counts[["gain_m2", "loss_m2"]].iloc[0].isna().all()
    assert table.columns.tolist() == ["year", "area_m2", "gain_m2", "loss_m2", "unknown_m2"]
    assert table["year"].tolist() == YEARS


def test_where_all_is_known_area_grows_by_gain_minus_loss() -> None:
    masks = np.random.default_rng(1).integers(0, 2, (3, 130, 70))
    table = tracks.compute_areas(footprint(masks), grid(130, 70))
    growth = table["area_m2"].diff()[1:]
    np.testing.assert_allclose(
        growth, (table["gain_m2"] - table["loss_m2"])[1:], rtol=1e-9, atol=1e-3
    )


def test_areas_refuse_another_grid_and_years_out_of_order() -> None:
    with pytest.raises(LabelError, match="5 x 6 pixels"):
        tracks.compute_areas(footprint(np.zeros((3, 6, 5))), grid(5, 6))
    with pytest.raises(LabelError, match="ascending"):
        tracks.compute_areas(footprint(np.zeros((3, 5, 6)), [2019, 2018, 2021]), grid(5, 6))


def test_threshold_at_one_half_keeps_what_is_unknown() -> None:
    found = tracks.threshold(footprint([[[0, 124]], [[125, 250]], [[255, 126]]]))
    assert found.dtype == np.uint8
    assert found.values.tolist() == [[[0, 0]], [[1, 1]], [[255, 1]]]
    assert found.year.values.tolist() == YEARS
