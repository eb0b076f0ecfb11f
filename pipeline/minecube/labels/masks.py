"""Convert polygons to pixels of the site's grid, and masks to polygons along pixel edges.

A pixel belongs to a polygon if its centre lies inside. A centre on an edge belongs to the polygon
right of the edge, or below a horizontal edge. So polygons with a common edge never share a pixel.
The rule has no bias in area. Polygons from `vectorize` rasterise to exactly their original mask.
`rasterize_fraction` gives the share of each pixel, a detail missing in the mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from rasterio import features

from minecube.arrays import Bool, Float64, Int64, UInt8
from minecube.codes import BACKGROUND, FULL, MINE, UNKNOWN
from minecube.errors import LabelError
from minecube.grid import equal_area_crs
from minecube.labels.placement import place_on_grid
from minecube.labels.polygons import find_year_spans, format_years, list_years, mark_surveyed

OFF_EDGES = Affine.translation(1e-5, 6.18e-6)
"""Sampling point of a pixel, as shares of a pixel right of its centre and below it.

GDAL burns both horizontal edges of a polygon if they run through centres. Rounding decides at other
edges. 0.1 mm exceeds the rounding of reprojection (1e-8 m) and of degrees with nine decimals (6e-5
m). The ratio of the shares is the golden ratio, to keep samples off edges of any simple slope.
"""

_Shapes = npt.NDArray[np.object_]


def rasterize(polygons: gpd.GeoDataFrame, grid: GeoBox, years: Iterable[int]) -> xr.DataArray:
    """Rasterise the footprint (year, y, x), uint8: 1 mine, 0 not mine, 255 unknown.

    A pixel is mine if its centre is. A centre on an edge belongs to the polygon on its right, or
    below. Adjacent polygons share no pixel.

    Rows without years hold for all years. Others hold in their `year`, or from `start` to `end`
    (either may be open). If no row on the grid has years, all years are known. Otherwise only years
    covered by a row with years are known. Other years are 255, except under rows without years.
    Rows with `mapped` true are surveyed areas, not mines. With them, a year is known only inside
    its surveyed areas.

    Raises:
        LabelError: there is no polygon, no CRS or no year. Or the polygons miss the grid, or all
            belong to other years.
    """
    year_list = _check_years(years)
    masks = np.empty((len(year_list), *grid.shape), np.uint8)
    for mask, (known_area, shapes) in zip(
        masks, _select_years(polygons, grid, year_list), strict=True
    ):
        mask.fill(UNKNOWN)
        np.copyto(mask, BACKGROUND, where=known_area)
        _burn(shapes, grid, mask)
    attrs = {
        "long_name": "mine footprint",
        "flag_values": [BACKGROUND, MINE, UNKNOWN],
        "flag_meanings": "not_mine mine unknown",
    }
    return _to_data_array("footprint", masks, year_list, grid, attrs)


def rasterize_fraction(
    polygons: gpd.GeoDataFrame, grid: GeoBox, years: Iterable[int]
) -> xr.DataArray:
    """Compute the share of each pixel under polygons (year, y, x), uint8 x 250, 255 unknown.

    Overlaps count once. The share is exact before rounding to 1/250 of a pixel (0.4 m2 of 100), so
    its sum is the polygons' area. Years are known as in `rasterize`. In unknown years, pixels
    touched by a row without years still have their share.

    Raises:
        LabelError: see `rasterize`.
    """
    year_list = _check_years(years)
    layers = np.empty((len(year_list), *grid.shape), np.uint8)
    selected = _select_years(polygons, grid, year_list)
    for layer, (known_area, shapes) in zip(layers, selected, strict=True):
        share = compute_pixel_shares(shapely.union_all(shapes), grid)
        stored = np.rint(share * FULL).astype(np.uint8)
        # At the edge of a surveyed area, a pixel's seen part is not its share. Elsewhere the share
        # is known.
        if not isinstance(known_area, np.ndarray):
            known_area = known_area | (stored > 0)
        layer[:] = np.where(known_area, stored, UNKNOWN)
    attrs = {
        "long_name": "share of the pixel that is mine x 250",
        "scale": 1 / FULL,
        "nodata": UNKNOWN,
    }
    return _to_data_array("footprint_fraction", layers, year_list, grid, attrs)


def _check_years(years: Iterable[int]) -> list[int]:
    year_list = [int(year) for year in years]
    if not year_list:
        raise LabelError("expected at least one year, found no year; name one")
    return year_list


def _to_data_array(
    name: str, values: UInt8, years: list[int], grid: GeoBox, attrs: Mapping[str, object]
) -> xr.DataArray:
    coords = {"year": np.array(years, np.int64), **xr_coords(grid)}
    return xr.DataArray(values, coords, ("year", "y", "x"), name=name, attrs=attrs)


def _select_years(
    polygons: gpd.GeoDataFrame, grid: GeoBox, years: list[int]
) -> Iterator[tuple[bool | Bool, _Shapes]]:
    """Yield each year's known area (bool or mask) and its shapes in the grid's CRS.

    Raises errors like `rasterize`.
    """
    if polygons.empty:
        raise LabelError("cannot place polygons on the grid: the table is empty")
    if polygons.crs is None:
        raise LabelError("cannot place polygons on the grid: they have no CRS")
    placed = place_on_grid(polygons, grid)
    first_year, last_year = find_year_spans(placed)
    is_dated = np.isfinite(first_year) | np.isfinite(last_year)
    valid_rows = [(first_year <= year) & (year <= last_year) for year in years]
    if is_dated.all() and not np.any(valid_rows):
        raise LabelError(
            f"expected polygons of {format_years(years)}, "
            f"found {format_years(list_years(placed))} on this grid; "
            "choose a mapped year, or drop the columns of years if the polygons hold for all"
        )
    shapes = placed.geometry.to_numpy()
    is_surveyed = mark_surveyed(placed)
    for rows in valid_rows:
        known_area: bool | Bool = bool((rows & is_dated).any() or not is_dated.any())
        if is_surveyed.any():
            known_area = np.zeros(grid.shape, np.bool_)
            _burn(shapes[rows & is_surveyed], grid, known_area.view(np.uint8))
        yield known_area, shapes[rows & ~is_surveyed]


def _burn(shapes: _Shapes, grid: GeoBox, mask: UInt8) -> None:
    """Set pixels (y, x) with their centre in a shape to 1. Shapes are in the grid's CRS."""
    if len(shapes):  # rasterio refuses an empty list
        features.rasterize(shapes, out=mask, transform=grid.affine * OFF_EDGES, default_value=MINE)


def compute_pixel_shares(shape: shapely.Geometry, grid: GeoBox) -> Float64:
    """Compute the exact share of each pixel (y, x) under a valid shape in the grid's CRS, 0..1.

    The method is Green's theorem. Edges are cut at pixel lines. A piece going down by dy adds dy to
    every pixel on its right. It adds to its own pixel the part of dy on its right. This takes half
    the time and memory of exactextract 0.3, without another dependency.
    """
    height, width = grid.shape
    parts = shapely.get_parts(shapely.get_parts(shapely.intersection(shape, grid.extent.geom)))
    areal = parts[shapely.get_dimensions(parts) == 2]
    rings = shapely.get_rings(shapely.orient_polygons(areal))
    corners_m, ring = shapely.get_coordinates(rings, return_index=True)
    corners_px = np.column_stack(~grid.affine * corners_m.T)
    is_edge = ring[1:] == ring[:-1]
    start, end = _cut(corners_px[:-1][is_edge], corners_px[1:][is_edge], axis=0)
    start, end = _cut(start, end, axis=1)
    x, y = (start + end).T / 2
    row = np.clip(y.astype(np.int64), 0, height - 1)
    column = np.clip(x.astype(np.int64), 0, width - 1)
    down = end[:, 1] - start[:, 1]
    left_part = x - column  # of the pixel, on the left of the piece
    # One more column takes the pieces along the right border.
    pixel = row * (width + 1) + column
    gains = np.bincount(
        np.append(pixel, pixel + 1),
        np.append(down * (1 - left_part), down * left_part),
        height * (width + 1),
    )
    sums = np.cumsum(gains.reshape(height, width + 1), axis=1)[:, :width]
    return np.minimum(np.abs(sums), 1)


def _cut(start: Float64, end: Float64, axis: int) -> tuple[Float64, Float64]:
    """Cut edges (n, 2) at whole numbers along the axis."""
    low = np.floor(np.minimum(start, end)[:, axis])
    high = np.ceil(np.maximum(start, end)[:, axis])
    counts = np.maximum(high - low, 1).astype(np.int64)
    edge = np.repeat(np.arange(len(start)), counts)
    piece = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    vector = (end - start)[edge]
    length = np.where(vector[:, axis] == 0, 1, vector[:, axis])

    def locate_cuts(number: Int64) -> Float64:
        """Return the point (x, y) of cut `number` on each piece's edge. 0 is the edge's start."""
        line = np.where(length > 0, low[edge] + number, high[edge] - number)
        inner = (line - start[edge, axis]) / length
        position = np.where(number == 0, 0, np.where(number == counts[edge], 1, inner))
        return start[edge] + position[:, None] * vector

    return locate_cuts(piece), locate_cuts(piece + 1)


def find_rows_without_centre(polygons: gpd.GeoDataFrame, grid: GeoBox) -> pd.Index:
    """Return the index of mine rows without a pixel's centre, not drawn by `rasterize`."""
    mines = polygons.loc[~mark_surveyed(polygons), ["geometry"]]
    placed = place_on_grid(mines, grid, required=False)
    # A shape's area is at most its length times the radius of its largest circle. A circle with
    # radius of half a pixel's diagonal contains a centre.
    radius = np.hypot(grid.resolution.x, grid.resolution.y) / 2
    may_miss = (placed.area <= placed.length * radius) & placed.within(grid.extent.geom)
    small = placed[may_miss]
    is_drawn = [_has_centre(shape, _crop_around(grid, shape)) for shape in small.geometry]
    rows: pd.Index = small.index[~np.array(is_drawn, bool)]
    return rows


def _has_centre(shape: shapely.Geometry, grid: GeoBox) -> bool:
    """Return whether `rasterize` draws a pixel. It samples each pixel slightly off its centre."""
    height, width = grid.shape
    column, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = grid.affine * OFF_EDGES * (column, row)
    return bool(shapely.contains_xy(shape, x, y).any())


def _crop_around(grid: GeoBox, shape: shapely.Geometry) -> GeoBox:
    """Return the part of the grid around a shape inside it."""
    x, y = ~grid.affine * np.reshape(shape.bounds, (2, 2)).T
    rows = slice(max(int(min(y)), 0), int(max(y)) + 1)
    columns = slice(max(int(min(x)), 0), int(max(x)) + 1)
    return grid[rows, columns]


def vectorize(
    footprint: xr.DataArray, grid: GeoBox, site: str, min_area_m2: float = 0
) -> gpd.GeoDataFrame:
    """Draw the mine as polygons: columns site, year, area_m2, geometry, sorted by year.

    Each row is one region connected over pixel edges (4-connectivity). Regions meeting at a corner
    stay separate, so every polygon is valid. Holes are kept. Outlines follow pixel edges, so
    `rasterize` restores the mask exactly, except for 255. The geometry is in the grid's CRS.
    `area_m2` is in `grid.equal_area_crs`, up to 0.1 % off 100 m2 per pixel because of UTM's scale.
    The table may be empty.

    `footprint` is (year, y, x), 1 mine; 0 and 255 are not drawn. `min_area_m2` is the minimum
    mapping unit. Smaller holes are filled first, including their contents. Then smaller regions are
    left out.

    Raises:
        LabelError: the footprint has other dimensions or another shape than the grid, or the
            minimum is negative.
    """
    if footprint.dims != ("year", "y", "x") or footprint.shape[1:] != tuple(grid.shape):
        expected = f"year, y, x with {grid.shape[0]} x {grid.shape[1]} px"
        raise LabelError(
            f"footprint of {site}: expected {expected}, found {dict(footprint.sizes)}; "
            "it is of another grid"
        )
    if not min_area_m2 >= 0:
        raise LabelError(f"expected a minimum mapping unit of 0 m2 or more, found {min_area_m2:g}")
    years: list[int] = []
    regions: list[shapely.Polygon] = []
    for year in footprint.year.to_numpy():
        regions_of_year = _outline_regions(footprint.sel(year=year).to_numpy() == MINE, grid.affine)
        years += [int(year)] * len(regions_of_year)
        regions += regions_of_year
    shapes = _fill_small_holes(regions, grid, min_area_m2)
    columns = {
        "site": pd.Series([site] * len(years), dtype="str"),
        "year": pd.Series(years, dtype="int64"),
        "area_m2": compute_areas_m2(shapes, grid),
    }
    outlines = gpd.GeoDataFrame(columns, geometry=shapes, crs=str(grid.crs))
    return outlines[outlines["area_m2"] >= min_area_m2].reset_index(drop=True)


def _outline_regions(is_mine: Bool, transform: Affine) -> list[shapely.Polygon]:
    """Draw each region (y, x) connected over pixel edges as a polygon along pixel edges."""
    outlines = features.shapes(
        is_mine.astype(np.uint8), mask=is_mine, connectivity=4, transform=transform
    )
    return [shapely.geometry.shape(outline) for outline, _ in outlines]


def compute_areas_m2(shapes: gpd.GeoSeries, grid: GeoBox) -> pd.Series:
    """Compute areas in the grid's equal-area projection."""
    # Cut edges into kilometres, since long straight edges bend in another projection.
    areas: pd.Series = shapes.segmentize(1000).to_crs(equal_area_crs(grid)).area.astype("float64")
    return areas


def _fill_small_holes(
    shapes: Sequence[shapely.Polygon], grid: GeoBox, min_area_m2: float
) -> gpd.GeoSeries:
    crs = str(grid.crs)
    rings_of_shapes = [list(shape.interiors) for shape in shapes]
    holes = [shapely.Polygon(ring) for rings in rings_of_shapes for ring in rings]
    areas = iter(compute_areas_m2(gpd.GeoSeries(holes, crs=crs), grid))
    filled = []
    for shape, rings in zip(shapes, rings_of_shapes, strict=True):
        large = [ring for ring in rings if next(areas) >= min_area_m2]
        if len(large) < len(rings):
            shape = shapely.Polygon(shape.exterior, large)
        filled.append(shape)
    return gpd.GeoSeries(filled, crs=crs)
