"""Polygons of mines to masks on the site's grid, and masks back to polygons.

One engine decides which pixels a polygon holds: those whose centre lies inside (GDAL's rule with `all_touched` off). It
is unbiased in area, and what `vectorize` draws along pixel edges rasterises to exactly the mask it came from. A pixel
nobody mapped is 255, never 0: a false "not mine" would be learnt and scored as if it were true.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from pyproj import Geod
from rasterio import features

from minecube.errors import LabelError
from minecube.grid import equal_area_crs

MINE, NOT_MINE, UNKNOWN = np.uint8(1), np.uint8(0), np.uint8(255)
YEARS = range(1900, 2101)  # calendar years a polygon may carry; anything else is a typing error
AREAL = ("Polygon", "MultiPolygon")

log = logging.getLogger(__name__)


def read_polygons(path: Path) -> gpd.GeoDataFrame:
    """The mine polygons of a GeoJSON, GeoPackage, GeoParquet or Shapefile, valid and with area, in the file's own CRS.

    Column `year` (any case; Int64, null: valid for all years) and `site` (any case; text) are understood, other columns
    kept. `repaired` is true where an invalid polygon was mended; those rows, and rows dropped because they hold no area,
    are logged as a warning. GeoJSON without `crs` is longitude and latitude (RFC 7946).

    Raises:
        LabelError: unreadable, empty, without CRS, coordinates that cannot be degrees, other geometries than polygons,
            or a year that is no calendar year.
    """
    try:
        table = gpd.read_parquet(path) if path.suffix.lower() in (".parquet", ".geoparquet") else gpd.read_file(path)
    except (OSError, ValueError, RuntimeError) as error:  # pyogrio's errors are RuntimeErrors, pyarrow's ValueErrors
        reason = str(error).strip() or type(error).__name__
        raise LabelError(f"{path}: cannot be read as GeoJSON, GeoPackage, GeoParquet or Shapefile: {reason}") from error
    if not isinstance(table, gpd.GeoDataFrame) or table.empty:
        raise LabelError(f"{path}: holds no polygon; expected at least one row with a geometry")
    if table.crs is None:
        raise LabelError(
            f"{path}: has no CRS, so its polygons cannot be placed on the grid; set the one they were drawn in "
            "(ogr2ogr -a_srs EPSG:..., or the missing .prj) and retry"
        )
    table = _lower_case(table if table.geometry.name == "geometry" else table.rename_geometry("geometry"), path)
    _need_areal(table, path)
    if "year" in table:
        table["year"] = _calendar_years(table["year"], path)
    if "site" in table:
        table["site"] = table["site"].astype("string").str.strip()
    return _repaired(table, path)


def _lower_case(table: gpd.GeoDataFrame, path: Path) -> gpd.GeoDataFrame:
    # Shapefiles shout their column names; a YEAR left unread would spread one year's polygons over all years.
    names = {c: c.lower() for c in table.columns if c.lower() in ("year", "site")}
    if len(set(names.values())) < len(names):
        raise LabelError(f"{path}: has the columns {', '.join(names)}, which mean the same; keep one")
    return table.rename(columns=names)


def _need_areal(table: gpd.GeoDataFrame, path: Path) -> None:
    kinds = table.geom_type
    other = kinds.notna() & ~kinds.isin(AREAL)
    if other.any():
        raise LabelError(
            f"{path}: expected polygons, found {', '.join(sorted(set(kinds[other])))} in {_rows(other)}; "
            "they have no area to rasterise, so take them out (ogr2ogr -nlt) and retry"
        )
    if not np.isfinite(shapely.get_coordinates(table.geometry)).all():
        raise LabelError(f"{path}: some coordinates are infinite or not a number, so the polygons cannot be placed; mend them")
    west, south, east, north = table.total_bounds
    if table.crs.is_geographic and (west < -180.1 or south < -90.1 or east > 360.1 or north > 90.1):
        raise LabelError(
            f"{path}: its CRS ({table.crs.to_string()}) is in degrees but the coordinates reach from {west:.6g}, {south:.6g} "
            f"to {east:.6g}, {north:.6g}; they look projected: state the CRS they are in and retry"
        )


def _calendar_years(column: pd.Series, path: Path) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce").astype("Float64")
    wrong = column.notna() & ~numbers.isin(list(YEARS)).fillna(False)
    if wrong.any():
        found = ", ".join(map(str, column[wrong].unique()[:3]))
        raise LabelError(
            f"{path}: column year: expected whole calendar years ({YEARS[0]}..{YEARS[-1]}) or null for all years, "
            f"found {found} in {_rows(wrong)}; the year decides which mask a polygon is drawn on, so correct it"
        )
    return numbers.astype("Int64")


def _repaired(table: gpd.GeoDataFrame, path: Path) -> gpd.GeoDataFrame:
    shapes = shapely.force_2d(table.geometry.to_numpy())
    broken = ~shapely.is_valid(shapes) & ~shapely.is_missing(shapes)
    # "structure" unites a shell that crosses itself; the default rule (even-odd) would cut holes into the mine.
    shapes[broken] = [_areal_parts(s) for s in shapely.make_valid(shapes[broken], method="structure", keep_collapsed=False)]
    empty = shapely.is_missing(shapes) | (shapely.area(shapes) == 0)
    if (broken & ~empty).any():
        log.warning("%s: invalid polygons were repaired: %s", path, _rows(broken & ~empty))
    if empty.any():
        log.warning("%s: rows without area were left out: %s", path, _rows(empty))
    if empty.all():
        raise LabelError(f"{path}: holds no polygon with area; expected at least one")
    mended = table.set_geometry(gpd.GeoSeries(shapes, index=table.index, crs=table.crs)).assign(repaired=broken)
    return mended[~empty].reset_index(drop=True)


def _areal_parts(shape: shapely.Geometry) -> shapely.Geometry:
    parts = shapely.get_parts(shapely.get_parts(shape))  # a collection may hold multipolygons
    return shapely.multipolygons(parts[shapely.get_dimensions(parts) == 2])


def _rows(which: npt.ArrayLike) -> str:
    """The true rows, counted from 1 as an attribute table shows them."""
    numbers = [str(n) for n in np.flatnonzero(np.asarray(which, bool)) + 1]
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:10])}{more}"


def rasterize(polygons: gpd.GeoDataFrame, grid: GeoBox, years: Iterable[int]) -> xr.DataArray:
    """The footprint (year, y, x) uint8 on the grid: 1 mine, 0 not mine, 255 unknown; a pixel is mine if its centre is.

    Without a column `year`, or with all its values null, the polygons hold for all years. Otherwise a year is known only
    where rows of that year reach the grid: the rest of it is 255, with the rows of null year (valid for all years) on top.

    Raises:
        LabelError: no polygon, no CRS, no year asked, polygons that do not reach the grid, or only in other years.
    """
    wanted = [int(y) for y in years]
    if not wanted:
        raise LabelError("no year was asked for, so there is no mask to draw; name at least one")
    if polygons.empty or polygons.crs is None:
        raise LabelError(f"cannot place polygons on the grid: {'there are none' if polygons.empty else 'they have no CRS'}")
    here = _on_grid(polygons, grid)
    dated = here["year"] if "year" in here else pd.Series(pd.NA, index=here.index, dtype="Int64")
    always, mapped = here.geometry[dated.isna()], set(dated.dropna().astype(int))
    if always.empty and not mapped & set(wanted):
        raise LabelError(
            f"the polygons on this grid are of {_spans(mapped)}, asked for was {_spans(wanted)}: every pixel would be "
            "unknown; ask for a mapped year, or drop the column year if they hold for all"
        )
    masks = np.empty((len(wanted), *grid.shape), np.uint8)
    for mask, year in zip(masks, wanted, strict=True):
        known = year in mapped or not mapped
        mask[:] = NOT_MINE if known else UNKNOWN
        _burn(mask, pd.concat([always, here.geometry[(dated == year).fillna(False)]]), grid)
    coords = {"year": np.array(wanted, np.int64), **xr_coords(grid)}
    attrs = {"long_name": "mine footprint", "flag_values": [0, 1, 255], "flag_meanings": "not_mine mine unknown"}
    return xr.DataArray(masks, coords, ("year", "y", "x"), name="footprint", attrs=attrs)


def _burn(mask: npt.NDArray[np.uint8], shapes: Iterable[shapely.Geometry], grid: GeoBox) -> None:
    shapes = list(shapes)
    if shapes:  # rasterio refuses an empty list
        features.rasterize(shapes, out=mask, transform=grid.affine, default_value=int(MINE), all_touched=False)


def _spans(years: Iterable[int]) -> str:
    known = sorted(set(years))
    return f"{known[0]}" if len(known) == 1 else f"{known[0]}..{known[-1]} ({len(known)} years)"


def _on_grid(polygons: gpd.GeoDataFrame, grid: GeoBox) -> gpd.GeoDataFrame:
    """The rows that reach the grid, in its CRS."""
    extent = gpd.GeoSeries([grid.extent.geom], crs=str(grid.crs)).segmentize(1000)
    same = polygons.crs == extent.crs
    # An edge is straight in the CRS it was drawn in: cut into pieces of about a kilometre, it stays within 3 cm of that.
    drawn = polygons if same else polygons.set_geometry(polygons.segmentize(0.01 if polygons.crs.is_geographic else 1000))
    lonlat = drawn.to_crs(4326).geometry
    if not np.isfinite(shapely.get_coordinates(lonlat)).all():
        raise LabelError(
            "some polygons cannot be placed on the globe: their coordinates do not fit their CRS; state the right one"
        )
    around = extent.to_crs(4326)
    if not same:  # what lies half the world away has no place in this projection, so it is cut off in degrees
        drawn = drawn.set_geometry(lonlat.intersection(shapely.box(*around.total_bounds))).to_crs(extent.crs)
    here = drawn[drawn.intersects(extent.iloc[0])]
    if here.empty:
        raise LabelError(_how_far(lonlat, around.iloc[0].centroid))
    return here


def _how_far(lonlat: gpd.GeoSeries, centre: shapely.Point) -> str:
    lon, lat = shapely.get_coordinates(lonlat).T
    metres = Geod(ellps="WGS84").inv(np.full_like(lon, centre.x), np.full_like(lat, centre.y), lon, lat)[2]
    at = int(np.argmin(metres))
    return (
        f"no polygon reaches the grid around {centre.x:.3f}, {centre.y:.3f}: the nearest of {len(lonlat)} is "
        f"{metres[at] / 1000:.1f} km away, at {lon[at]:.3f}, {lat[at]:.3f}; its mask would be all 'not mine', so check "
        "the site, the CRS and the order of longitude and latitude"
    )


def vectorize(footprint: xr.DataArray, grid: GeoBox, site: str) -> gpd.GeoDataFrame:
    """The mine in polygons: columns site, year, area_m2, geometry (the grid's CRS), sorted by year; may have no row.

    One row per region connected over pixel edges (4-connectivity: regions that meet at a corner stay two, so every
    polygon is valid); holes are kept. Edges follow pixel edges: `rasterize` gives back exactly the mask, 255 apart.
    `area_m2` is in `grid.equal_area_crs`, up to 0.1 % off 100 m2 a pixel, which is UTM's scale.

    Args:
        footprint: (year, y, x), 1 mine; 0 and 255 are both not drawn.
        grid: the grid the footprint lies on.
        site: the name to write in column `site`.

    Raises:
        LabelError: the footprint has other dimensions or another shape than the grid.
    """
    if footprint.dims != ("year", "y", "x") or footprint.shape[1:] != tuple(grid.shape):
        expected = f"year, y, x with {grid.shape[0]} x {grid.shape[1]} px"
        raise LabelError(f"footprint of {site}: expected {expected}, found {dict(footprint.sizes)}; it is of another grid")
    regions = []
    for year in footprint.year.to_numpy():
        mine = (footprint.sel(year=year).to_numpy() == MINE).astype(np.uint8)
        found = features.shapes(mine, mask=mine.astype(bool), connectivity=4, transform=grid.affine)
        regions += [(site, int(year), shapely.geometry.shape(shape)) for shape, _ in found]
    columns = {
        "site": pd.Series([r[0] for r in regions], dtype="str"),
        "year": pd.Series([r[1] for r in regions], dtype="int64"),
    }
    shapes = gpd.GeoSeries([r[2] for r in regions], crs=str(grid.crs))
    # Pieces of a kilometre: a long straight edge bends in another projection.
    columns["area_m2"] = shapes.segmentize(1000).to_crs(equal_area_crs(grid)).area.astype("float64")
    return gpd.GeoDataFrame(columns, geometry=shapes, crs=str(grid.crs))
