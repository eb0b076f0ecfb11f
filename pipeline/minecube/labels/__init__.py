"""Convert polygons of mines to masks on the site's grid, and masks back to polygons.

    read_polygons(path, layer)                -> GeoDataFrame      valid, with years
    match_sites(polygons, sites, path)        -> GeoDataFrame      sites renamed to catalogue ids
    repair_polygons(path)                     -> RepairedPolygons  further repairs, and findings
    compare_mappers({name: polygons}, grids)  -> DataFrame         areas and IoU of pairs of mappers
    rasterize(polygons, grid, years)          -> DataArray         1 mine, 0 not, 255 unknown
    rasterize_fraction(polygons, grid, years) -> DataArray         share under a polygon x 250
    vectorize(footprint, grid, site)          -> GeoDataFrame      outlines along pixel edges
    assign_ids(polygons)                      -> GeoDataFrame      ids of pits through the years
    simplify_outlines(polygons, pixel_m)      -> GeoDataFrame      fewer corners, the same area

    polygons.py   read files, repair shapes    masks.py     polygons to pixels and back
    dates.py      years in texts and numbers   outlines.py  identify, simplify
    placement.py  grids, distances, mistakes   repair.py    errors in a file of polygons
                                               compare.py   two mappers of one mine

A pixel outside the mapped area is 255, never 0. A false "not mine" would be learnt and scored.
"""

from minecube.labels.compare import compare_mappers
from minecube.labels.masks import (
    find_rows_without_centre,
    rasterize,
    rasterize_fraction,
    vectorize,
)
from minecube.labels.outlines import assign_ids, simplify_outlines
from minecube.labels.placement import MISPLACED_M, place_on_grid
from minecube.labels.polygons import (
    describe_rows,
    find_unread_year_columns,
    format_years,
    mark_rows_of_site,
    mark_rows_without_site,
    match_sites,
    read_polygons,
)
from minecube.labels.repair import MIN_WIDTH_M, RepairedPolygons, repair_polygons, tabulate_areas

__all__ = [
    "MIN_WIDTH_M",
    "MISPLACED_M",
    "RepairedPolygons",
    "assign_ids",
    "compare_mappers",
    "describe_rows",
    "find_rows_without_centre",
    "find_unread_year_columns",
    "format_years",
    "mark_rows_of_site",
    "mark_rows_without_site",
    "match_sites",
    "place_on_grid",
    "rasterize",
    "rasterize_fraction",
    "read_polygons",
    "repair_polygons",
    "simplify_outlines",
    "tabulate_areas",
    "vectorize",
]
