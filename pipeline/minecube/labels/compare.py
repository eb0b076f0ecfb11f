"""Compare two mappers of one mine, in polygons and in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from odc.geo.geobox import GeoBox

from minecube.labels.masks import area_m2, on_grid, rasterize
from minecube.labels.polygons import mapped, of_no_site, of_site, spans, years_or_all

POOLED = "pooled"
AREAS = ("area_m2", "other_area_m2", "intersection_m2", "union_m2")
COLUMNS = (
    "site", "year", "mapper", "other", *AREAS, "iou", "pixels_both", "pixels_either", "raster_iou", "raster_area_off",
    "other_raster_area_off",
)  # fmt: skip


def compare(mappers: Mapping[str, gpd.GeoDataFrame], grids: Mapping[str, GeoBox]) -> pd.DataFrame:
    """Compare each pair of mappers by site and year, and pooled.

    Areas lie on the site's grid and count overlaps once. Their CRS is `grid.equal_area_crs`. `iou`
    compares the polygons, `raster_iou` their masks on the grid. `raster_area_off` is the mask's
    area over the polygons' area, minus one, both in the grid's CRS. Polygons touching the grid only
    at its border have area 0. Division by 0 gives NaN, as in the IoU of two empty masks. `year` is
    null if both mappers' polygons have no years. Sites and years mapped by one of the two are left
    out. They cannot show agreement.

    Args:
        mappers: name -> polygons from `read_polygons`. Rows without a `site` count at all grids.
        grids: site -> grid.

    Returns:
        Table with COLUMNS. Rows with site "pooled" are ratios of sums.
    """
    rows = []
    for mapper, other in combinations(mappers, 2):
        pair = []
        for site, grid in grids.items():
            a, b = (_of_site(mappers[name], site, grid) for name in (mapper, other))
            if a.empty or b.empty:
                continue
            for year in years_or_all(a, b):
                one, two = (_held(t, year) for t in (a, b))
                if len(one) and len(two):
                    pair.append((site, year, mapper, other, *_agreement(one, two, grid)))
        if pair:
            sums = np.array([(*row[4:8], *row[9:11]) for row in pair], dtype=float).sum(axis=0)
            ratios = (_ratio(sums[2], sums[3]), *sums[4:], _ratio(sums[4], sums[5]), np.nan, np.nan)
            rows += [*pair, (POOLED, None, mapper, other, *sums[:4], *ratios)]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"year": "Int64", "pixels_both": "int64", "pixels_either": "int64"})


def _of_site(polygons: gpd.GeoDataFrame, site: str, grid: GeoBox) -> gpd.GeoDataFrame:
    mines = polygons[~mapped(polygons)]
    own = mines[of_no_site(mines) | of_site(mines, site)]
    return on_grid(own, grid, needed=False) if len(own) else own


def _held(polygons: gpd.GeoDataFrame, year: int | None) -> gpd.GeoDataFrame:
    if year is None:
        return polygons
    first, last = spans(polygons)
    return polygons[(first <= year) & (year <= last)]


def _agreement(a: gpd.GeoDataFrame, b: gpd.GeoDataFrame, grid: GeoBox) -> tuple[float, ...]:
    one, two = (
        shapely.intersection(shapely.union_all(t.geometry.to_numpy()), grid.extent.geom)
        for t in (a, b)
    )
    both, either = shapely.intersection(one, two), shapely.union(one, two)
    areas = area_m2(gpd.GeoSeries([one, two, both, either], crs=str(grid.crs)), grid).to_list()
    # Rows are already selected by year. Without year columns they hold in any year, so 0 will do.
    masks = [rasterize(t[["geometry"]], grid, [0]).to_numpy() == 1 for t in (a, b)]
    pixels = [int((masks[0] & masks[1]).sum()), int((masks[0] | masks[1]).sum())]
    pixel_m2 = abs(grid.affine.determinant)
    off = [
        _ratio(mask.sum() * pixel_m2, shape.area) - 1
        for mask, shape in zip(masks, (one, two), strict=True)
    ]
    return (*areas, _ratio(areas[2], areas[3]), *pixels, _ratio(pixels[0], pixels[1]), *off)


def _ratio(part: float, whole: float) -> float:
    """Divide a part by a whole; NaN if the whole is 0."""
    return part / whole if whole else np.nan
