"""Audit an import and its split: findings, rates of change and band statistics.

Each check is a function from tables to findings. A new check is one more function.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile

from minecube import images
from minecube.catalog import BANDS, Release, Site
from minecube.errors import ReleaseError
from minecube.network import ForbiddenError
from minecube.release import Imported
from minecube.release.archive import MOST_BYTES, MOST_PX, Archive

NEAR_M = 5000
"""Sites closer than this share ground or weather, and leak test answers across a split."""
JUMP = 0.1
"""Implausible share of a site's pixels changed in one year. Mean over Europe: about 0.005."""
STEP = 500
"""Threshold, in digital numbers, for a common step of the darkest pixels of all bands.

Half of BOA_ADD_OFFSET.
"""
_AT_ONCE = 3  # images read in parallel
_SAME = 0.05  # tolerated relative difference from published statistics


@dataclass(frozen=True, order=True)
class Finding:
    """One problem of a release or its split."""

    check: str
    site: str
    """Empty for the release as a whole."""
    year: int
    """0 for all years."""
    found: str


Split = Mapping[str, Sequence[str]]
"""train, val and test -> site names in listed order."""


def audit(
    imported: Imported, release: Release, split: Split, pixels: pd.DataFrame | None = None
) -> list[Finding]:
    """Run all checks and return findings sorted by check, site and year.

    Args:
        imported: The import.
        release: Metadata of the release.
        split: The split, including repetitions.
        pixels: `pixel_sums` of its images. Without it, the pixel checks are skipped.
    """
    found = [
        *_names(imported.about),
        *_sites(imported.years, release, split),
        *_years(imported.years, release),
        *_labels(imported.years),
        *_images(imported.years),
        *_neighbours(imported.sites, split),
        *_jumps(imported.changes),
    ]
    if pixels is not None:
        found += [*_steps(pixels), *_statistics(band_statistics(pixels, release))]
    return sorted(found)


def split_of(release: Release, known: Iterable[Site]) -> Split:
    """Return the published split from the catalogue."""
    found: dict[str, list[str]] = {}
    for site in known:
        if site.split and (site.labels or "").startswith(release.name):
            found.setdefault(site.split, []).extend([site.id] * (1 + (site.id in release.repeated)))
    return found


def read_split(path: Path) -> Split:
    """Read a user's split from a JSON file.

    Format: `{"train": ["Germany_1", ...], "val": [...], "test": [...]}`.

    Raises:
        ReleaseError: the file is unreadable or has another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{path}: cannot be read as a split ({error}); expected JSON") from error
    parts = content if isinstance(content, dict) else {}
    names = [n for part in parts.values() for n in (part if isinstance(part, list) else [None])]
    if not names or not all(isinstance(n, str) for n in names):
        raise ReleaseError(
            f'{path}: expected {{"train": ["Germany_1", ...], "val": [...], ...}}, found something else'
        )
    return parts


def change_rates(changes: pd.DataFrame) -> pd.DataFrame:
    """Sum changes over all sites, per pair of years.

    Returns:
        Columns year_1, year_2, pixels, appeared, vanished, rate (a ratio of sums).
    """
    summed = changes.groupby(["year_1", "year_2"], as_index=False)[
        ["pixels", "appeared", "vanished"]
    ].sum()
    return summed.assign(rate=(summed["appeared"] + summed["vanished"]) / summed["pixels"])


def pixel_sums(
    archive: Archive, years: pd.DataFrame, done: Callable[[str], None] = lambda _: None
) -> pd.DataFrame:
    """Sum the pixels of all images. This reads the whole archive.

    The sums are additive over sites and years.

    Returns:
        One row per site, year and band: pixels, sum, squares, and low, the first percentile. Pixels
        with 0 in all bands are excluded.

    Raises:
        ReleaseError: an image cannot be read.
    """
    images = list(_rows(years[years["image"].notna()]))
    sums: list[tuple[Any, ...]] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(_AT_ONCE) as pool:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # already reported as a finding
        for row, of_image in zip(
            images, pool.map(lambda r: _image_sums(archive, r), images), strict=True
        ):
            sums += of_image
            done(row.site)
    return pd.DataFrame(sums, columns=["site", "year", "band", "pixels", "sum", "squares", "low"])


def _image_sums(archive: Archive, row: Any) -> list[tuple[Any, ...]]:
    ((name, content),) = archive.read([row.image])
    if not content:
        return []  # unreadable, already reported as a finding
    try:
        with (
            rasterio.Env(**images.SETTINGS),
            MemoryFile(content) as memory,
            images.open_image(
                memory.name, content, most_px=MOST_PX, most_bytes=MOST_BYTES
            ) as image,
        ):
            values: npt.NDArray[np.int16] = image.read().reshape(image.count, -1)
    except (RasterioError, ForbiddenError) as error:
        raise ReleaseError(
            f"{archive.where}: its member {name} is no image ({error}); get the archive again"
        ) from error
    values, found = values[:, (values != 0).any(axis=0)], []
    for band, of_band in zip(BANDS, values, strict=False):
        low, exact = (
            float(np.percentile(of_band, 1)) if of_band.size else np.nan,
            of_band.astype(np.int64),
        )
        found.append(
            (row.site, row.year, band, of_band.size, int(exact.sum()), int((exact**2).sum()), low)
        )
    return found


def band_statistics(pixels: pd.DataFrame, release: Release) -> pd.DataFrame:
    """Compute mean and standard deviation per band.

    If the release publishes statistics, its values and the corrected published deviation are added.
    """
    summed = pixels.groupby("band")[["pixels", "sum", "squares"]].sum().reindex(BANDS)
    mean = summed["sum"] / summed["pixels"]
    # Exact integers: the difference of two large floats would lose digits.
    std = [
        (int(q) * int(n) - int(s) ** 2) ** 0.5 / int(n) if n > 0 else np.nan
        for n, s, q in summed.fillna(0).itertuples(index=False)
    ]
    table = pd.DataFrame({"mean": mean, "std": std}, index=pd.Index(BANDS, name="band"))
    if release.band_mean:
        table["published_mean"], table["published_std"] = release.band_mean, release.band_std
        table["corrected_std"] = table["published_std"] * 2**0.5
    return table


def _names(about: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    for kind, check, text in (
        ("renamed", "name", "is not named YearYYYY.tif"),
        (
            "twice",
            "repeated member",
            "is of a site and year that another member has; it is not used",
        ),
        ("strange", "strange member", "is neither an image nor a label of a site and year"),
    ):
        yield from (Finding(check, "", 0, f"{name} {text}") for name in about[kind])


def _sites(years: pd.DataFrame, release: Release, split: Split) -> Iterator[Finding]:
    there, parts_of = set(years["site"]), _parts_of(split)
    if len(there) != release.sites:
        yield Finding("sites", "", 0, f"expected {release.sites} sites, found {len(there)}")
    if len(parts_of) != release.sites:
        yield Finding(
            "split",
            "",
            0,
            f"the split names {len(parts_of)} distinct sites, for {release.sites} of the release",
        )
    for site, parts in parts_of.items():
        if len(parts) > 1:
            where = (
                f"{len(parts)} times in {parts[0]}"
                if len(set(parts)) == 1
                else f"in {' and in '.join(parts)}"
            )
            yield Finding("split", site, 0, f"is named {where}")
        if site not in there:
            yield Finding("split", site, 0, f"is in the split ({parts[0]}), and not in the archive")
    for site in sorted(there - set(parts_of)):
        yield Finding("split", site, 0, "is in the archive, and not in the split")
    for site in sorted(there & set(release.excluded)):
        yield Finding("split", site, 0, "is passed over by the authors' code")
    images = years[years["image_crc"].notna()]
    for _, same in images.groupby(["year", "image_crc", "height", "width"]):
        if len(same) > 1:
            first, *others = _rows(same)
            yield from (
                Finding("repeated site", o.site, o.year, f"has the image of {first.site}")
                for o in others
            )


def _years(years: pd.DataFrame, release: Release) -> Iterator[Finding]:
    for site, rows in years.groupby("site"):
        for kind in ("image", "label"):
            lacking = sorted(set(release.years) - set(rows.loc[rows[kind].notna(), "year"]))
            yield from (
                Finding("year missing", str(site), year, f"has no {kind}") for year in lacking
            )
        yield from (
            Finding("year", str(site), int(y), "is not a year of the release")
            for y in sorted(set(rows["year"]) - set(release.years))
        )


def _labels(years: pd.DataFrame) -> Iterator[Finding]:
    for row in _rows(years[years["label"].notna()]):
        if row.problem and row.problem.startswith("label"):
            yield Finding(
                "label",
                row.site,
                row.year,
                f"{row.problem.removeprefix('label: ')}; it is left out",
            )
        elif row.mine_px == 0:
            yield Finding("label empty", row.site, row.year, "has no mine")
        elif row.mine_px == row.label_height * row.label_width:
            yield Finding("label full", row.site, row.year, "is mine everywhere")


def _images(years: pd.DataFrame) -> Iterator[Finding]:
    images = years[years["image"].notna()]
    for row in _rows(images):
        if row.problem and row.problem.startswith("image"):
            yield Finding(
                "image",
                row.site,
                row.year,
                f"{row.problem.removeprefix('image: ')}; its label has no place",
            )
        if row.dtype and (row.bands, row.dtype) != (len(BANDS), "int16"):
            found = f"expected {len(BANDS)} bands of int16, found {int(row.bands)} of {row.dtype}"
            yield Finding("image", row.site, row.year, found)
    for site, rows in images[~images["problem"].fillna("").str.startswith("image")].groupby("site"):
        grids = [
            (r.year, (r.height, r.width, *r.transform)) for r in _rows(rows.sort_values("year"))
        ]
        for (_, before), (year, after) in itertools.pairwise(grids):
            if before != after:
                yield Finding("grid", str(site), year, _moved(before, after))


def _moved(before: tuple[float, ...], after: tuple[float, ...]) -> str:
    (height, width, size, _, west, _, down, north), (rows, columns, *_) = before, after
    right, below = (after[4] - west) / size, (after[7] - north) / down
    here, there = f"{rows:.0f} x {columns:.0f}", f"{height:.0f} x {width:.0f}"
    sizes = f" and has {here} pixels instead of {there}" if here != there else ""
    return f"lies {right:+.2f} pixels to the right and {below:+.2f} down of the year before{sizes}"


def _parts_of(split: Split) -> dict[str, list[str]]:
    """Map each site to its parts of the split, with repetitions."""
    found: dict[str, list[str]] = {}
    for part, names in split.items():
        for name in names:
            found.setdefault(name, []).append(part)
    return found


def _neighbours(sites: gpd.GeoDataFrame, split: Split) -> Iterator[Finding]:
    part_of = {site: parts[0] for site, parts in _parts_of(split).items()}
    placed = sites[sites["id"].isin(list(part_of))].to_crs(3035)
    placed = placed.assign(split=placed["id"].map(part_of))
    pairs = placed.sindex.query(placed.geometry, predicate="dwithin", distance=NEAR_M)
    for a, b in zip(*pairs, strict=True):
        one, other = placed.iloc[a], placed.iloc[b]
        if a < b and one["split"] != other["split"]:
            apart = one.geometry.distance(other.geometry)
            how = f"lies {apart / 1000:.1f} km from" if apart else "overlaps"
            yield Finding(
                "neighbours",
                one["id"],
                0,
                f"({one['split']}) {how} {other['id']} ({other['split']})",
            )


def _jumps(changes: pd.DataFrame) -> Iterator[Finding]:
    following = changes[changes["year_2"] == changes["year_1"] + 1]
    for row in _rows(following):
        rate = (row.appeared + row.vanished) / row.pixels
        if rate > JUMP:
            yield Finding(
                "label jump",
                row.site,
                row.year_2,
                f"{rate:.1%} of its pixels changed since the year before",
            )


def _steps(pixels: pd.DataFrame) -> Iterator[Finding]:
    for site, rows in pixels.groupby("site"):
        low = rows.pivot_table(index="year", columns="band", values="low").sort_index()
        for (_, before), (year, after) in itertools.pairwise(
            zip(low.index, low.to_numpy(), strict=True)
        ):
            least, most = float(np.min(after - before)), float(np.max(after - before))
            if least > STEP or most < -STEP:
                found = f"the darkest pixels of all bands step by {least:+.0f} to {most:+.0f} from the year before"
                yield Finding("offset", str(site), int(year), found)


def _statistics(bands: pd.DataFrame) -> Iterator[Finding]:
    if "published_mean" not in bands:
        return
    for band, row in bands.to_dict("index").items():
        if abs(row["mean"] / row["published_mean"] - 1) > _SAME:
            yield Finding(
                "band statistics",
                "",
                0,
                f"{band}: mean {row['mean']:.1f}, published {row['published_mean']:.1f}",
            )
        if abs(row["std"] / row["published_std"] - 1) > _SAME:
            near = abs(row["std"] / row["corrected_std"] - 1) <= _SAME
            why = (
                "which is the true one divided by the square root of 2"
                if near
                else "and that is not for the square root of 2"
            )
            found = f"{band}: standard deviation {row['std']:.1f}, published {row['published_std']:.1f}, {why}"
            yield Finding("band statistics", "", 0, found)


def _rows(table: pd.DataFrame) -> Iterable[Any]:
    """Iterate over rows with columns as attributes of any type."""
    return table.itertuples()


def counted(found: Iterable[Finding]) -> dict[str, int]:
    """Count the findings of each check."""
    of: dict[str, int] = {}
    for finding in found:
        of[finding.check] = of.get(finding.check, 0) + 1
    return of
