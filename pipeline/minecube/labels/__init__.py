"""Convert polygons of mines to masks on the site's grid, and masks back to polygons.

    read_polygons(path, layer)          -> GeoDataFrame           valid, with years; repairs logged
    match_sites(polygons, sites, path)  -> GeoDataFrame           sites renamed to catalogue ids
    survey(path)                        -> Survey                 further repairs, and findings
    compare({mapper: polygons}, grids)  -> DataFrame              areas and IoU of pairs of mappers
    rasterize(polygons, grid, years)    -> DataArray[year, y, x]  1 mine, 0 not, 255 unknown
    covered(polygons, grid, years)      -> DataArray[year, y, x]  share under a polygon x 250
    vectorize(footprint, grid, site)    -> GeoDataFrame           outlines along pixel edges
    identify(polygons)                  -> GeoDataFrame           ids of pits through the years
    simplify(polygons, pixel_m)         -> GeoDataFrame           fewer corners, the same area

    polygons.py   read files, repair shapes    masks.py     polygons to pixels and back
    dates.py      years in texts and numbers   outlines.py  identify, simplify
    placement.py  grids, distances, mistakes   repair.py    errors in a file of polygons
                                               compare.py   two mappers of one mine

A pixel outside the mapped area is 255, never 0. A false "not mine" would be learnt and scored.
"""

from minecube.codes import MINE, UNKNOWN
from minecube.labels.compare import compare
from minecube.labels.masks import NOT_MINE, covered, rasterize, rows_without_centre, vectorize
from minecube.labels.outlines import identify, simplify
from minecube.labels.placement import NEAR_M, on_grid
from minecube.labels.polygons import (
    index_text,
    match_sites,
    of_no_site,
    of_site,
    read_polygons,
    unread_years,
    years_text,
)
from minecube.labels.repair import MIN_WIDTH_M, Survey, mapped_areas, survey

__all__ = [
    "MINE",
    "MIN_WIDTH_M",
    "NEAR_M",
    "NOT_MINE",
    "UNKNOWN",
    "Survey",
    "compare",
    "covered",
    "identify",
    "index_text",
    "mapped_areas",
    "match_sites",
    "of_no_site",
    "of_site",
    "on_grid",
    "rasterize",
    "read_polygons",
    "rows_without_centre",
    "simplify",
    "survey",
    "unread_years",
    "vectorize",
    "years_text",
]
