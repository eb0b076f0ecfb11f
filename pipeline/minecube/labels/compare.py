"""Compare two mappers of one mine, in polygons and in pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from operator import itemgetter
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from odc.geo.geobox import GeoBox

from minecube.arrays import Bool
from minecube.codes import MINE
from minecube.labels.masks import compute_areas_m2, rasterize
from minecube.labels.placement import place_on_grid
from minecube.labels.polygons import (
    find_year_spans,
    list_years_or_none,
    mark_rows_of_site,
    mark_rows_without_site,
    mark_surveyed,
)

POOLED = "pooled"
AREAS = ("area_m2", "other_area_m2", "intersection_m2", "union_m2")
PIXELS = ("pixels_both", "pixels_either")
SUMMED = (*AREAS, *PIXELS)
COLUMNS = (
    *("site", "year", "mapper", "other"),
    *(*AREAS, "iou"),
    *(*PIXELS, "raster_iou"),
    *("raster_area_off", "other_raster_area_off"),
)


def compare_mappers(
    mappers: Mapping[str, gpd.GeoDataFrame], grids: Mapping[str, GeoBox]
) -> pd.DataFrame:
    """Compare each pair of mappers by site and year, and pooled.

    Areas lie on the site's grid and count overlaps once. Their CRS is `grid.equal_area_crs`. `iou`
    compares the polygons, `raster_iou` their masks on the grid. `raster_area_off` is the mask's
    area over the polygons' area, minus one, both in the grid's CRS. Polygons touching the grid only
    at its border have area 0. Division by 0 gives NaN, as in the IoU of two empty masks. `year` is
    null if both mappers' polygons have no years. Sites and years mapped by one of the two are left
    out. They cannot show agreement.

    The columns of the table are COLUMNS. Its rows with site "pooled" are ratios of sums. Rows of
    polygons without a `site` count at all grids.
    """
    records: list[dict[str, Any]] = []
    for mapper, other in combinations(mappers, 2):
        of_pair = []
        for site, grid in grids.items():
            mines = _select_mines(mappers[mapper], site, grid)
            other_mines = _select_mines(mappers[other], site, grid)
            of_pair += [
                {"site": site, "mapper": mapper, "other": other, **agreement}
                for agreement in _compare_years(mines, other_mines, grid)
            ]
        records += of_pair
        if of_pair:
            names = {"site": POOLED, "year": None, "mapper": mapper, "other": other}
            records.append({**names, **_pool(of_pair)})
    table = pd.DataFrame(records, columns=list(COLUMNS))
    return table.astype({"year": "Int64", "pixels_both": "int64", "pixels_either": "int64"})


def _select_mines(polygons: gpd.GeoDataFrame, site: str, grid: GeoBox) -> gpd.GeoDataFrame:
    """Select the mines of a site, or without a site, on its grid."""
    mines = polygons[~mark_surveyed(polygons)]
    at_site = mines[mark_rows_without_site(mines) | mark_rows_of_site(mines, site)]
    if at_site.empty:
        return at_site
    return place_on_grid(at_site, grid, required=False)


def _select_year(polygons: gpd.GeoDataFrame, year: int | None) -> gpd.GeoDataFrame:
    if year is None:
        return polygons
    first_year, last_year = find_year_spans(polygons)
    return polygons[(first_year <= year) & (year <= last_year)]


def _compare_years(
    mines: gpd.GeoDataFrame, other_mines: gpd.GeoDataFrame, grid: GeoBox
) -> Iterator[dict[str, Any]]:
    """Yield the agreement of each year with polygons of both mappers."""
    if mines.empty or other_mines.empty:
        return
    for year in list_years_or_none(mines, other_mines):
        of_year = _select_year(mines, year)
        other_of_year = _select_year(other_mines, year)
        if not of_year.empty and not other_of_year.empty:
            yield {"year": year, **_measure_agreement(of_year, other_of_year, grid)}


def _measure_agreement(
    mines: gpd.GeoDataFrame, other_mines: gpd.GeoDataFrame, grid: GeoBox
) -> dict[str, float]:
    """Compute areas, pixels and ratios of two tables of mines on a grid."""
    shape = _unite(mines, grid)
    other_shape = _unite(other_mines, grid)
    intersection = shapely.intersection(shape, other_shape)
    union = shapely.union(shape, other_shape)
    shapes = gpd.GeoSeries([shape, other_shape, intersection, union], crs=str(grid.crs))
    areas = dict(zip(AREAS, compute_areas_m2(shapes, grid).to_list(), strict=True))
    mask = _draw(mines, grid)
    other_mask = _draw(other_mines, grid)
    pixels_both = int((mask & other_mask).sum())
    pixels_either = int((mask | other_mask).sum())
    pixel_m2 = abs(grid.affine.determinant)
    return {
        **areas,
        "iou": _divide(areas["intersection_m2"], areas["union_m2"]),
        "pixels_both": pixels_both,
        "pixels_either": pixels_either,
        "raster_iou": _divide(pixels_both, pixels_either),
        "raster_area_off": _divide(mask.sum() * pixel_m2, shape.area) - 1,
        "other_raster_area_off": _divide(other_mask.sum() * pixel_m2, other_shape.area) - 1,
    }


def _unite(mines: gpd.GeoDataFrame, grid: GeoBox) -> shapely.Geometry:
    return shapely.intersection(shapely.union_all(mines.geometry.to_numpy()), grid.extent.geom)


def _draw(mines: gpd.GeoDataFrame, grid: GeoBox) -> Bool:
    """Rasterise mines of one year as booleans (1, y, x)."""
    # Rows are already selected by year. Without year columns they hold in any year, so 0 will do.
    mask: Bool = rasterize(mines[["geometry"]], grid, [0]).to_numpy() == MINE
    return mask


def _pool(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Sum areas and pixels, and compute the ratios of the sums."""
    values = np.array([itemgetter(*SUMMED)(record) for record in records], dtype=float)
    sums = dict(zip(SUMMED, values.sum(axis=0), strict=True))
    return {
        **sums,
        "iou": _divide(sums["intersection_m2"], sums["union_m2"]),
        "raster_iou": _divide(sums["pixels_both"], sums["pixels_either"]),
    }


def _divide(numerator: float, denominator: float) -> float:
    """Divide two numbers. Division by 0 gives NaN."""
    if not denominator:
        return np.nan
    return numerator / denominator
