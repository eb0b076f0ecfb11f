"""Read the archive's sites: image grids, labels as polygons, changes between years.

The published labels have neither CRS nor location. Both come from the image of the same year. A
label is skipped and listed by name if its size differs from its image or it has values other than 0
and 255. The location or meaning of its pixels is unknown, and a guess would enter training as
truth.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import shapely
from affine import Affine
from rasterio import features
from rasterio.errors import RasterioError
from scipy import ndimage

from minecube import images
from minecube.arrays import UInt8
from minecube.network import ForbiddenError
from minecube.release.archive import MOST_BYTES, Archive, BrokenMemberError, open_content
from minecube.release.members import Members

log = logging.getLogger(__name__)

ARCHIVE_MINE = 255
"""Mine pixels in published labels; the other value is 0."""
_PARALLEL_HEADERS = 8  # per site
_MOST_BYTES_PER_PX = 8  # of a label file; typically one
_MOST_LABEL_HEADER = 1_000_000
_MOST_REGIONS = 100_000  # mine regions of a label, each a polygon
_IDENTITY = tuple(Affine.identity())[:6]
_UNREADABLE = "is no image, or arrived broken"


@dataclass(frozen=True, kw_only=True)
class SiteYear:
    """The archive's data of one site and year; None for missing parts."""

    site: str
    year: int
    image: str | None = None
    """Name of the member."""
    label: str | None = None
    image_crc: int | None = None
    """CRC of the member; it reveals two sites with the same image."""
    height: int | None = None
    """Of the image, pixels."""
    width: int | None = None
    bands: int | None = None
    dtype: str | None = None
    crs: str | None = None
    transform: tuple[float, ...] | None = None
    """Six numbers in rasterio's order."""
    label_height: int | None = None
    label_width: int | None = None
    label_values: tuple[int, ...] | None = None
    mine_px: int | None = None
    problem: str | None = None
    """Reason for an unused label or an image without location."""


@dataclass(frozen=True)
class ReleaseSite:
    """One site of the archive, as tables."""

    years: pd.DataFrame
    """One row per year, with the fields of `SiteYear`."""
    labels: gpd.GeoDataFrame
    """EPSG:4326; columns site, year, mapped, geometry.

    One row per mine region, along pixel edges. One row per year with `mapped` true: the extent of
    the image, no mine outside the regions.
    """
    changes: pd.DataFrame
    """One row per pair of years: site, year_1, year_2, pixels, appeared, vanished."""


@dataclass(frozen=True)
class _Label:
    """A label with its location."""

    mask: UInt8
    """[y, x], 0 or 255."""
    transform: Affine


def read_site(archive: Archive, members: Members, site: str) -> ReleaseSite:
    """Read the image headers and the labels of a site.

    Raises:
        ReleaseError: the archive cannot be read. Broken members are recorded as problems instead.
    """
    years = sorted({year for name, year in (*members.images, *members.labels) if name == site})
    image_names = [members.images[site, year] for year in years if (site, year) in members.images]
    with ThreadPoolExecutor(_PARALLEL_HEADERS) as pool:  # waiting for answers dominates
        headers = pool.map(lambda name: _read_header(archive, name), image_names)
        header_of = dict(zip(image_names, headers, strict=True))
    rows = {}
    for year in years:
        row: dict[str, Any] = {
            "site": site,
            "year": year,
            "image": members.images.get((site, year)),
            "label": members.labels.get((site, year)),
            "problem": None,
        }
        row |= header_of.get(row["image"], {})
        row["problem"] = (
            row["problem"] or _find_image_problem(row) or _find_size_problem(archive, row)
        )
        rows[year] = row
    labels = _read_labels(archive, rows)
    table = pd.DataFrame([asdict(SiteYear(**row)) for row in rows.values()])
    return ReleaseSite(table, _to_polygons(site, labels), _count_changes(site, labels))


def select_placed(years: pd.DataFrame) -> pd.DataFrame:
    """Select the years with a georeferenced image."""
    has_image_problem = years["problem"].fillna("").str.startswith("image")
    return years[years["transform"].notna() & ~has_image_problem]


def extent_of(years: pd.DataFrame) -> shapely.Polygon | None:
    """Return the bounding box of all images of a site, EPSG:4326.

    None if no image is georeferenced.
    """
    placed = select_placed(years)
    if placed.empty:
        return None
    rows: Any = placed.to_dict("records")
    extents = [
        _draw_extent((row["height"], row["width"]), Affine(*row["transform"])) for row in rows
    ]
    return shapely.box(*shapely.union_all(extents).bounds)


def _read_header(archive: Archive, name: str) -> dict[str, Any]:
    """Read the fields of `SiteYear` that an image's header has."""
    header: dict[str, Any] = {"image_crc": archive.get_checksum(name)}
    try:
        with archive.open_image(name) as image:
            header |= {
                "height": image.height,
                "width": image.width,
                "bands": image.count,
                "dtype": image.dtypes[0],
                "crs": _format_crs(image.crs),
                "transform": tuple(image.transform)[:6],
            }
    except BrokenMemberError as error:
        log.warning("%s", error)
        if isinstance(error.__cause__, images.TooLargeError):
            header["problem"] = f"image: {error.__cause__}"
    return header


def _format_crs(crs: rasterio.CRS | None) -> str | None:
    if not crs:
        return None
    code = crs.to_epsg()
    if code:
        return f"EPSG:{code}"
    text: str = crs.to_string()
    return text


def _find_image_problem(row: Mapping[str, Any]) -> str | None:
    """Return the reason for an unusable image, or for a label without an image."""
    if not row["image"]:
        if row["label"]:
            return "label: no image of that year says where it lies"
        return None
    if "height" not in row:
        return f"image: {_UNREADABLE}"
    if row["crs"] != "EPSG:4326" or row["transform"] == _IDENTITY:
        return f"image: expected EPSG:4326 and a place, found {row['crs'] or 'no CRS'}"
    _, column_shear, _, row_shear, row_height, _ = row["transform"]
    if column_shear or row_shear or row_height >= 0:
        return "image: expected north up, found a turned grid"
    return None


def _find_size_problem(archive: Archive, row: Mapping[str, Any]) -> str | None:
    """Return the reason for skipping a label that is too large for its image."""
    if not row["label"]:
        return None
    pixels = row["height"] * row["width"]
    most_bytes = min(pixels * _MOST_BYTES_PER_PX + _MOST_LABEL_HEADER, MOST_BYTES)
    size = archive.get_size(row["label"])
    if size <= most_bytes:
        return None
    return (
        f"label: expected at most {most_bytes:,} bytes "
        f"for the image's {row['height']} x {row['width']} pixels, found {size:,}"
    )


def _read_labels(archive: Archive, rows: Mapping[int, dict[str, Any]]) -> dict[int, _Label]:
    """Read the labels without a problem, by year.

    Size, values, mine pixels and problems are recorded in `rows`.
    """
    year_of = {
        row["label"]: year for year, row in rows.items() if row["label"] and row["problem"] is None
    }
    labels: dict[int, _Label] = {}
    for name, content in archive.read(year_of):
        row = rows[year_of[name]]
        mask = _read_mask(content, row)
        row["problem"] = row["problem"] or _find_label_problem(row)
        if mask is not None and row["problem"] is None:
            labels[year_of[name]] = _Label(mask, Affine(*row["transform"]))
    return dict(sorted(labels.items()))


def _read_mask(content: bytes | None, row: dict[str, Any]) -> UInt8 | None:
    """Read a label's first band; None if it is unreadable or its size differs from the image.

    Adds the label's size, values and number of mine pixels to the row. Adds `problem` if the label
    is too large or has too many regions. `_find_label_problem` names the other problems.
    """
    if not content:
        return None
    try:
        with open_content(content) as label:
            row |= {"label_height": label.height, "label_width": label.width}
            if label.shape != (row["height"], row["width"]):
                return None
            mask: UInt8 = label.read(1)
    except images.TooLargeError as error:
        row["problem"] = f"label: {error}"
        return None
    except (RasterioError, ForbiddenError) as error:
        log.warning("%s %s: its label is not read: %s", row["site"], row["year"], error)
        return None
    is_mine = mask == ARCHIVE_MINE
    row |= {"label_values": tuple(np.unique(mask).tolist()), "mine_px": int(is_mine.sum())}
    _, region_count = ndimage.label(is_mine)
    if region_count > _MOST_REGIONS:
        row["problem"] = (
            f"label: expected at most {_MOST_REGIONS:,} regions of mine, found {region_count:,}"
        )
    return mask


def _find_label_problem(row: Mapping[str, Any]) -> str | None:
    """Return the reason for skipping a label after reading it."""
    if "label_height" not in row:
        return f"label: {_UNREADABLE}"
    if (row["label_height"], row["label_width"]) != (row["height"], row["width"]):
        return (
            f"label: expected the image's {row['height']} x {row['width']} pixels, "
            f"found {row['label_height']} x {row['label_width']}"
        )
    if "label_values" not in row:
        return f"label: {_UNREADABLE}"
    if set(row["label_values"]) - {0, ARCHIVE_MINE}:
        values = ", ".join(map(str, row["label_values"][:6]))
        return f"label: expected the values 0 and {ARCHIVE_MINE}, found {values}"
    return None


def _to_polygons(site: str, labels: Mapping[int, _Label]) -> gpd.GeoDataFrame:
    """Draw labels as the polygons of `ReleaseSite.labels`."""
    rows: list[tuple[Any, ...]] = []
    for year, label in labels.items():
        is_mine = label.mask == ARCHIVE_MINE
        regions = features.shapes(
            is_mine.astype(np.uint8), mask=is_mine, connectivity=4, transform=label.transform
        )
        rows += [(site, year, False, shapely.geometry.shape(region)) for region, _ in regions]
        rows.append((site, year, True, _draw_extent(label.mask.shape, label.transform)))
    columns = ["site", "year", "mapped", "geometry"]
    return gpd.GeoDataFrame(rows, columns=columns, geometry="geometry", crs=4326)


def _draw_extent(shape: tuple[int, ...], transform: Affine) -> shapely.Polygon:
    height, width = shape
    west, north = transform @ (0, 0)
    east, south = transform @ (width, height)
    return shapely.box(west, south, east, north)


def _count_changes(site: str, labels: Mapping[int, _Label]) -> pd.DataFrame:
    """Count changed pixels for all pairs of years with labels on one grid."""
    rows = []
    for (year, label), (later_year, later_label) in itertools.combinations(labels.items(), 2):
        mask = label.mask
        later_mask = later_label.mask
        if mask.shape == later_mask.shape and label.transform == later_label.transform:
            appeared = int(((mask == 0) & (later_mask == ARCHIVE_MINE)).sum())
            vanished = int(((mask == ARCHIVE_MINE) & (later_mask == 0)).sum())
            rows.append((site, year, later_year, mask.size, appeared, vanished))
    columns = ["site", "year_1", "year_2", "pixels", "appeared", "vanished"]
    return pd.DataFrame(rows, columns=columns)
