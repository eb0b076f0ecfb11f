"""Two mappers of one mine held against each other: what both mapped, what either did, in polygons and in pixels."""

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
    """Areas and agreement of each two mappers by site and year, then pooled (site "pooled": a ratio of sums): COLUMNS.

    Areas are of what lies on the site's grid, overlaps counted once, in `grid.equal_area_crs`; IoU is of the polygons, raster
    IoU of their masks on the grid. `raster_area_off` is the mask's area over the polygons', less one, both in the grid's CRS.
    Polygons that only touch the grid have area 0. The IoU of two empty masks is NaN, as is any other division by 0.
    `year` is null where neither mapper's polygons have years. Sites and years that one of two did not map are left out:
    they say nothing on how the two agree.

    Args:
        mappers: name -> polygons, as `read_polygons` gives them; rows that name no `site` count at each grid that they reach.
        grids: site -> grid.
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
    one, two = (shapely.intersection(shapely.union_all(t.geometry.to_numpy()), grid.extent.geom) for t in (a, b))
    both, either = shapely.intersection(one, two), shapely.union(one, two)
    areas = area_m2(gpd.GeoSeries([one, two, both, either], crs=str(grid.crs)), grid).to_list()
    # As of one year that they all hold in, since that is how they were chosen.
    masks = [rasterize(t[["geometry"]], grid, [0]).to_numpy() == 1 for t in (a, b)]
    pixels = [int((masks[0] & masks[1]).sum()), int((masks[0] | masks[1]).sum())]
    pixel_m2 = abs(grid.affine.determinant)
    off = [_ratio(mask.sum() * pixel_m2, shape.area) - 1 for mask, shape in zip(masks, (one, two), strict=True)]
    return (*areas, _ratio(areas[2], areas[3]), *pixels, _ratio(pixels[0], pixels[1]), *off)


def _ratio(part: float, whole: float) -> float:
    """Divide a part by a whole; NaN if the whole is 0."""
    return part / whole if whole else np.nan
