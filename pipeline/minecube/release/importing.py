"""Read the archive's sites: image grids, labels as polygons, changes between years.

The published labels have neither CRS nor location. Both come from the image of the same year. A
label is skipped and listed by name if its size differs from its image or it has values other than 0
and 255. The location or meaning of its pixels is unknown, and a guess would enter training as
truth.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import rasterio
import shapely
from affine import Affine
from rasterio import features
from rasterio.errors import RasterioError
from rasterio.io import MemoryFile
from scipy import ndimage

from minecube import images
from minecube.errors import ReleaseError
from minecube.network import ForbiddenError
from minecube.release.archive import MOST_BYTES, MOST_PX, Archive, BrokenMemberError

log = logging.getLogger(__name__)

UInt8 = npt.NDArray[np.uint8]

_AT_ONCE = 8  # headers per site, in parallel
_MOST_BYTES_PER_PX = 8  # of a label file; typically one
_MOST_LABEL_HEADER = 1_000_000
_MOST_REGIONS = 100_000  # mine regions of a label, each a polygon
MINE = 255
"""Mine pixels in published labels; the other value is 0."""
# `EuroMineNet/Portuga_1/label/Year2015.tif`; some files are called Label2015.tif or year2015.tif instead.
_NAMED = re.compile(
    r"(?:^|/)(?P<site>[^/]+)/(?P<kind>image|label)s?/(?P<word>[A-Za-z]+)_?(?P<year>(?:19|20)\d\d)\.tiff?$",
    re.I,
)
_NO_DATA = re.compile(r"(?:^|/)(?:__MACOSX/|\.[^/]+$|Thumbs\.db$)")


@dataclass(frozen=True)
class Found:
    """The members of an archive by type."""

    images: Mapping[tuple[str, int], str]
    """Site and year -> name."""
    labels: Mapping[tuple[str, int], str]
    renamed: tuple[str, ...]
    """Recognised members with a name other than Year2015.tif."""
    twice: tuple[str, ...]
    """Ignored members: another member has the same site-year."""
    strange: tuple[str, ...]
    """Unrecognised members."""

    def sites(self) -> list[str]:
        """List site names, with their numbers in numeric order."""
        return sorted({site for site, _ in (*self.images, *self.labels)}, key=by_number)


def by_number(name: str) -> tuple[str, int, str]:
    """Return a sort key for names: Germany_2 before Germany_10."""
    word, number = re.fullmatch(r"(.*?)(\d*)", name).groups()  # type: ignore[union-attr]
    return word, int(number or -1), name


def find(names: Iterable[str]) -> Found:
    """Find images and labels in an archive; raise ReleaseError if both are missing."""
    found: dict[str, dict[tuple[str, int], str]] = {"image": {}, "label": {}}
    renamed, twice, strange = [], [], []
    everything = [n for n in names if not _NO_DATA.search(n)]
    # Regular names come first and therefore win over duplicates.
    for name in sorted(everything, key=lambda n: (not re.search(r"/Year\d{4}\.tif$", n), n)):
        match = _NAMED.search(name.replace("\\", "/"))
        outside = name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)
        if (
            outside or not match or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", match["site"])
        ):  # site ids are group names, too
            strange.append(name)
            continue
        of_kind, place = found[match["kind"].lower()], (match["site"], int(match["year"]))
        if place in of_kind:
            twice.append(name)
            continue
        of_kind[place] = name
        if match["word"] != "Year":
            renamed.append(name)
    if not found["image"] and not found["label"]:
        shown = ", ".join(everything[:3]) or "nothing"
        raise ReleaseError(
            f"expected members such as EuroMineNet/Germany_1/label/Year2015.tif, found {shown}: not the EuroMineNet release"
        )
    return Found(found["image"], found["label"], tuple(renamed), tuple(twice), tuple(strange))


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


def read_site(archive: Archive, found: Found, site: str) -> ReleaseSite:
    """Read the image headers and the labels of a site.

    Raises:
        ReleaseError: the archive cannot be read. Broken members are recorded as problems instead.
    """
    years = sorted({year for name, year in (*found.images, *found.labels) if name == site})
    pictures = [found.images[site, year] for year in years if (site, year) in found.images]
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # waiting for answers dominates
        headers = dict(
            zip(pictures, pool.map(lambda name: _header(archive, name), pictures), strict=True)
        )
    table = {year: _row(archive, headers, site, year, found) for year in years}
    wanted = {
        row["label"]: year for year, row in table.items() if row["label"] and row["problem"] is None
    }
    masks: dict[int, tuple[UInt8, Affine]] = {}
    for name, content in archive.read(wanted):
        row = table[wanted[name]]
        mask = _mask(content, row)
        row["problem"] = row["problem"] or _problem(row)
        if mask is not None and row["problem"] is None:
            masks[wanted[name]] = mask, Affine(*row["transform"])
    regions: list[tuple[Any, ...]] = []
    for year, (mask, affine) in sorted(masks.items()):
        regions += [(site, year, False, region) for region in _regions(mask, affine)]
        regions.append((site, year, True, _extent(mask.shape, affine)))
    rows = [asdict(SiteYear(**row)) for row in table.values()]
    labels = gpd.GeoDataFrame(
        regions, columns=["site", "year", "mapped", "geometry"], geometry="geometry", crs=4326
    )
    return ReleaseSite(pd.DataFrame(rows), labels, _changes(site, masks))


def extent_of(years: pd.DataFrame) -> shapely.Polygon | None:
    """Return the bounding box of all images of a site, EPSG:4326.

    None if no image is georeferenced.
    """
    placed = years[
        years["transform"].notna() & years["problem"].fillna("").str.startswith("image").eq(False)
    ]
    rows: Any = placed.to_dict("records")
    extents = [_extent((r["height"], r["width"]), Affine(*r["transform"])) for r in rows]
    return shapely.box(*shapely.union_all(extents).bounds) if extents else None


def _header(archive: Archive, name: str) -> dict[str, Any]:
    crc = {"image_crc": archive.checksum_of(name)}
    try:
        with archive.image(name) as image:
            known = image.crs.to_epsg() if image.crs else None
            return {
                **crc,
                "height": image.height,
                "width": image.width,
                "bands": image.count,
                "dtype": image.dtypes[0],
                "crs": f"EPSG:{known}" if known else image.crs and image.crs.to_string(),
                "transform": tuple(image.transform)[:6],
            }
    except BrokenMemberError as error:
        log.warning("%s", error)
        too_large = isinstance(error.__cause__, images.TooLargeError)
        return {**crc, "problem": f"image: {error.__cause__}" if too_large else None}


def _row(
    archive: Archive, headers: Mapping[str, dict[str, Any]], site: str, year: int, found: Found
) -> dict[str, Any]:
    """Collect the facts of a site-year before its label is read, including any problem."""
    image, label = found.images.get((site, year)), found.labels.get((site, year))
    row: dict[str, Any] = {
        "site": site,
        "year": year,
        "image": image,
        "label": label,
        "problem": None,
    }
    row |= headers[image] if image else {}
    row["problem"] = row["problem"] or _image_problem(row)
    if label and row["problem"] is None:
        most = min(
            row["height"] * row["width"] * _MOST_BYTES_PER_PX + _MOST_LABEL_HEADER, MOST_BYTES
        )
        if archive.size_of(label) > most:
            shape = f"{row['height']} x {row['width']}"
            row["problem"] = (
                f"label: expected at most {most:,} bytes for the image's {shape} pixels, found {archive.size_of(label):,}"
            )
    return row


def _mask(content: bytes | None, row: dict[str, Any]) -> UInt8 | None:
    """Read a label's first band; None if it is unreadable or its size differs from the image.

    Size, values, mine pixels and problems are recorded in `row`.
    """
    if not content:
        return None
    try:
        with (
            rasterio.Env(**images.SETTINGS),
            MemoryFile(content) as memory,
            images.open_image(
                memory.name, content, most_px=MOST_PX, most_bytes=MOST_BYTES
            ) as label,
        ):
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
    row |= {"label_values": tuple(np.unique(mask).tolist()), "mine_px": int((mask == MINE).sum())}
    regions = ndimage.label(mask == MINE)[1]
    if regions > _MOST_REGIONS:
        row["problem"] = (
            f"label: expected at most {_MOST_REGIONS:,} regions of mine, found {regions:,}"
        )
    return mask


def _image_problem(row: Mapping[str, Any]) -> str | None:
    """Return the reason for an unusable image, or for a label without an image."""
    if row["image"] and "height" not in row:
        return "image: is no image, or arrived broken"
    if row["image"] and (
        row["crs"] != "EPSG:4326" or row["transform"][:6] == tuple(Affine.identity())[:6]
    ):
        return f"image: expected EPSG:4326 and a place, found {row['crs'] or 'no CRS'}"
    if row["image"] and (row["transform"][1] or row["transform"][3] or row["transform"][4] >= 0):
        return "image: expected north up, found a turned grid"
    if row["label"] and not row["image"]:
        return "label: no image of that year says where it lies"
    return None


def _problem(row: Mapping[str, Any]) -> str | None:
    """Return the reason for skipping a label after reading it."""
    if "label_height" not in row:
        return "label: is no image, or arrived broken"
    if (row["label_height"], row["label_width"]) != (row["height"], row["width"]):
        found = f"{row['label_height']} x {row['label_width']}"
        return f"label: expected the image's {row['height']} x {row['width']} pixels, found {found}"
    if "label_values" not in row:
        return "label: is no image, or arrived broken"
    if set(row["label_values"]) - {0, MINE}:
        found = ", ".join(map(str, row["label_values"][:6]))
        return f"label: expected the values 0 and {MINE}, found {found}"
    return None


def _regions(mask: UInt8, affine: Affine) -> list[shapely.Geometry]:
    mine = (mask == MINE).astype(np.uint8)
    return [
        shapely.geometry.shape(s)
        for s, _ in features.shapes(mine, mask=mine.astype(bool), connectivity=4, transform=affine)
    ]


def _extent(shape: tuple[int, ...], affine: Affine) -> shapely.Polygon:
    (west, north), (east, south) = affine @ (0, 0), affine @ (shape[1], shape[0])
    return shapely.box(west, south, east, north)


def _changes(site: str, masks: Mapping[int, tuple[UInt8, Affine]]) -> pd.DataFrame:
    """Count changed pixels for all pairs of years with labels on one grid."""
    rows = []
    for first, last in itertools.combinations(sorted(masks), 2):
        (before, there), (after, here) = masks[first], masks[last]
        if before.shape == after.shape and there == here:
            appeared, vanished = (
                int(((before == 0) & (after == MINE)).sum()),
                int(((before == MINE) & (after == 0)).sum()),
            )
            rows.append((site, first, last, before.size, appeared, vanished))
    return pd.DataFrame(
        rows, columns=["site", "year_1", "year_2", "pixels", "appeared", "vanished"]
    )
