"""What the archive says of each site: its images' grids, its labels as polygons, and how they change from year to year.

The published labels have neither CRS nor place: both are their image's of the same year (trap 20). A label that does not fit
its image, or has other values than 0 and 255, is left out by name: where its pixels lie, or what they mean, is not known, and
a guess would be learnt as truth.
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

_AT_ONCE = 8  # headers of a site
_MOST_BYTES_PER_PX = 8  # of a label, as a file: one is usual
_MOST_LABEL_HEADER = 1_000_000
_MOST_REGIONS = 100_000  # of mine in a label: each becomes a polygon
MINE = 255
"""Of the published labels, whose other value is 0."""
# `EuroMineNet/Portuga_1/label/Year2015.tif`; some files are called Label2015.tif or year2015.tif instead.
_NAMED = re.compile(
    r"(?:^|/)(?P<site>[^/]+)/(?P<kind>image|label)s?/(?P<word>[A-Za-z]+)_?(?P<year>(?:19|20)\d\d)\.tiff?$", re.I
)
_NO_DATA = re.compile(r"(?:^|/)(?:__MACOSX/|\.[^/]+$|Thumbs\.db$)")


@dataclass(frozen=True)
class Found:
    """The members of an archive by what they are."""

    images: Mapping[tuple[str, int], str]
    """Site and year -> name."""
    labels: Mapping[tuple[str, int], str]
    renamed: tuple[str, ...]
    """Understood, though not named Year2015.tif."""
    twice: tuple[str, ...]
    """Of a site-year that another member has already; not used."""
    strange: tuple[str, ...]
    """Not understood."""

    def sites(self) -> list[str]:
        """By name, their numbers as numbers."""
        return sorted({site for site, _ in (*self.images, *self.labels)}, key=by_number)


def by_number(name: str) -> tuple[str, int, str]:
    """A key that sorts Germany_2 before Germany_10."""
    word, number = re.fullmatch(r"(.*?)(\d*)", name).groups()  # type: ignore[union-attr]
    return word, int(number or -1), name


def find(names: Iterable[str]) -> Found:
    """Images and labels among the members of an archive; raises ReleaseError where there is none."""
    found: dict[str, dict[tuple[str, int], str]] = {"image": {}, "label": {}}
    renamed, twice, strange = [], [], []
    everything = [n for n in names if not _NO_DATA.search(n)]
    # Those named as all should be come first, so that they are the ones kept.
    for name in sorted(everything, key=lambda n: (not re.search(r"/Year\d{4}\.tif$", n), n)):
        match = _NAMED.search(name.replace("\\", "/"))
        outside = name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)
        if (
            outside or not match or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", match["site"])
        ):  # which names groups of a cube, too
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
    """What the archive has of one site and year; what it lacks is None."""

    site: str
    year: int
    image: str | None = None
    """Name of the member."""
    label: str | None = None
    image_crc: int | None = None
    """Checksum of the member: two sites of one image show."""
    height: int | None = None
    """Of the image, pixels."""
    width: int | None = None
    bands: int | None = None
    dtype: str | None = None
    crs: str | None = None
    transform: tuple[float, ...] | None = None
    """Six numbers, as rasterio has them."""
    label_height: int | None = None
    label_width: int | None = None
    label_values: tuple[int, ...] | None = None
    mine_px: int | None = None
    problem: str | None = None
    """Why the label is not used, or the image has no place."""


@dataclass(frozen=True)
class ReleaseSite:
    """One site of the archive, as tables."""

    years: pd.DataFrame
    """A row a year: the fields of `SiteYear`."""
    labels: gpd.GeoDataFrame
    """EPSG:4326; columns site, year, mapped, geometry: a row a region of mine, along pixel edges, and one a year with
    `mapped` true, the extent of the image, within which all else is not mine."""
    changes: pd.DataFrame
    """A row a pair of years: site, year_1, year_2, pixels, appeared, vanished."""


def read_site(archive: Archive, found: Found, site: str) -> ReleaseSite:
    """Headers of a site's images, and its labels, from the archive.

    Raises:
        ReleaseError: the archive cannot be read; what is broken in it is a problem of its row.
    """
    years = sorted({year for name, year in (*found.images, *found.labels) if name == site})
    pictures = [found.images[site, year] for year in years if (site, year) in found.images]
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # what takes time is waiting for answers
        headers = dict(zip(pictures, pool.map(lambda name: _header(archive, name), pictures), strict=True))
    table = {year: _row(archive, headers, site, year, found) for year in years}
    wanted = {row["label"]: year for year, row in table.items() if row["label"] and row["problem"] is None}
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
    labels = gpd.GeoDataFrame(regions, columns=["site", "year", "mapped", "geometry"], geometry="geometry", crs=4326)
    return ReleaseSite(pd.DataFrame(rows), labels, _changes(site, masks))


def extent_of(years: pd.DataFrame) -> shapely.Polygon | None:
    """The area that all images of a site cover together, EPSG:4326; None where none has a place."""
    placed = years[years["transform"].notna() & years["problem"].fillna("").str.startswith("image").eq(False)]
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


def _row(archive: Archive, headers: Mapping[str, dict[str, Any]], site: str, year: int, found: Found) -> dict[str, Any]:
    """What is known of a site-year before its label is read, and why that is not to be read."""
    image, label = found.images.get((site, year)), found.labels.get((site, year))
    row: dict[str, Any] = {"site": site, "year": year, "image": image, "label": label, "problem": None}
    row |= headers[image] if image else {}
    row["problem"] = row["problem"] or _image_problem(row)
    if label and row["problem"] is None:
        most = min(row["height"] * row["width"] * _MOST_BYTES_PER_PX + _MOST_LABEL_HEADER, MOST_BYTES)
        if archive.size_of(label) > most:
            shape = f"{row['height']} x {row['width']}"
            row["problem"] = (
                f"label: expected at most {most:,} bytes for the image's {shape} pixels, found {archive.size_of(label):,}"
            )
    return row


def _mask(content: bytes | None, row: dict[str, Any]) -> UInt8 | None:
    """A label's first band, if it has its image's pixels; None where it has not, or is no image. Notes what it has."""
    if not content:
        return None
    try:
        with (
            rasterio.Env(**images.SETTINGS),
            MemoryFile(content) as memory,
            images.open_image(memory.name, content, most_px=MOST_PX, most_bytes=MOST_BYTES) as label,
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
        row["problem"] = f"label: expected at most {_MOST_REGIONS:,} regions of mine, found {regions:,}"
    return mask


def _image_problem(row: Mapping[str, Any]) -> str | None:
    """Why an image has no place, or its label has none."""
    if row["image"] and "height" not in row:
        return "image: is no image, or arrived broken"
    if row["image"] and (row["crs"] != "EPSG:4326" or row["transform"][:6] == tuple(Affine.identity())[:6]):
        return f"image: expected EPSG:4326 and a place, found {row['crs'] or 'no CRS'}"
    if row["image"] and (row["transform"][1] or row["transform"][3] or row["transform"][4] >= 0):
        return "image: expected north up, found a turned grid"
    if row["label"] and not row["image"]:
        return "label: no image of that year says where it lies"
    return None


def _problem(row: Mapping[str, Any]) -> str | None:
    """Why a label that was read is not used."""
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
        shapely.geometry.shape(s) for s, _ in features.shapes(mine, mask=mine.astype(bool), connectivity=4, transform=affine)
    ]


def _extent(shape: tuple[int, ...], affine: Affine) -> shapely.Polygon:
    (west, north), (east, south) = affine @ (0, 0), affine @ (shape[1], shape[0])
    return shapely.box(west, south, east, north)


def _changes(site: str, masks: Mapping[int, tuple[UInt8, Affine]]) -> pd.DataFrame:
    """Counts of changed pixels of all pairs of years whose labels lie on one grid."""
    rows = []
    for first, last in itertools.combinations(sorted(masks), 2):
        (before, there), (after, here) = masks[first], masks[last]
        if before.shape == after.shape and there == here:
            appeared, vanished = int(((before == 0) & (after == MINE)).sum()), int(((before == MINE) & (after == 0)).sum())
            rows.append((site, first, last, before.size, appeared, vanished))
    return pd.DataFrame(rows, columns=["site", "year_1", "year_2", "pixels", "appeared", "vanished"])
