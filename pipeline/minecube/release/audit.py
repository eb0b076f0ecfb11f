"""Audit an import and its split: findings, rates of change and band statistics.

Each check is a function from tables to findings. A new check is one more function.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from minecube.arrays import Int16
from minecube.catalog import BANDS, Release, Site
from minecube.errors import ReleaseError
from minecube.network import ForbiddenError
from minecube.places import Place
from minecube.release.archive import Archive, open_content
from minecube.release.imported import Imported
from minecube.release.sites import select_placed

NEIGHBOUR_M = 5000
"""Sites closer than this share ground or weather, and leak test answers across a split."""
JUMP = 0.1
"""Implausible share of a site's pixels changed in one year. Mean over Europe: about 0.005."""
STEP = 500
"""Threshold, in digital numbers, for a common step of the darkest pixels of all bands.

Half of BOA_ADD_OFFSET.
"""
_PARALLEL_IMAGES = 3
_TOLERANCE = 0.05  # relative difference from published statistics
_NAME_CHECKS = {
    "renamed": ("name", "is not named YearYYYY.tif"),
    "twice": (
        "repeated member",
        "is of a site and year that another member has; it is not used",
    ),
    "strange": ("strange member", "is neither an image nor a label of a site and year"),
}
"""List of members in import.json -> name of the check, text of the finding."""


@dataclass(frozen=True, order=True)
class AuditFinding:
    """One problem of a release or its split."""

    check: str
    site: str
    """Empty for the release as a whole."""
    year: int
    """0 for all years."""
    found: str


Split = Mapping[str, Sequence[str]]
"""train, val and test -> site names in listed order."""


def audit_release(
    imported: Imported, release: Release, split: Split, pixels: pd.DataFrame | None = None
) -> list[AuditFinding]:
    """Run all checks and return findings sorted by check, site and year.

    `split` is the split as listed, including repetitions. `pixels` is `sum_pixels` of the import's
    images. Without it, the pixel checks are skipped.
    """
    findings = [
        *_check_names(imported.about),
        *_check_sites(imported.years, release, split),
        *_check_repeated_images(imported.years),
        *_check_years(imported.years, release),
        *_check_labels(imported.years),
        *_check_images(imported.years),
        *_check_grids(imported.years),
        *_check_neighbours(imported.sites, split),
        *_check_jumps(imported.changes),
    ]
    if pixels is not None:
        findings += [
            *_check_steps(pixels),
            *_check_statistics(compute_band_statistics(pixels, release)),
        ]
    return sorted(findings)


def select_split(release: Release, catalogue: Iterable[Site]) -> Split:
    """Return the published split from the catalogue."""
    split: dict[str, list[str]] = {}
    for site in catalogue:
        if site.split and (site.labels or "").startswith(release.name):
            names = split.setdefault(site.split, [])
            names.append(site.id)
            if site.id in release.repeated:
                names.append(site.id)
    return split


def read_split(path: Place) -> Split:
    """Read a user's split from a JSON file.

    Format: `{"train": ["Germany_1", ...], "val": [...], "test": [...]}`.

    Raises:
        ReleaseError: the file is unreadable or has another format.
    """
    try:
        split = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{path}: cannot be read as a split ({error}); expected JSON") from error
    if not _is_split(split):
        raise ReleaseError(
            f'{path}: expected {{"train": ["Germany_1", ...], "val": [...], ...}}, '
            "found something else"
        )
    checked: Split = split
    return checked


def _is_split(content: Any) -> bool:
    """Return whether JSON content maps parts to lists of names, with at least one name."""
    if not isinstance(content, dict) or not any(content.values()):
        return False
    return all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in content.values()
    )


def compute_change_rates(changes: pd.DataFrame) -> pd.DataFrame:
    """Sum changes over all sites, per pair of years.

    Returns:
        Columns year_1, year_2, pixels, appeared, vanished, rate (a ratio of sums).
    """
    counts = changes.groupby(["year_1", "year_2"], as_index=False)[
        ["pixels", "appeared", "vanished"]
    ].sum()
    return counts.assign(rate=(counts["appeared"] + counts["vanished"]) / counts["pixels"])


def sum_pixels(
    archive: Archive, years: pd.DataFrame, report_site: Callable[[str], None] = lambda _: None
) -> pd.DataFrame:
    """Sum the pixels of all images. This reads the whole archive.

    The sums are additive over sites and years.

    Returns:
        One row per site, year and band: pixels, sum, squares, and low, the first percentile. Pixels
        with 0 in all bands are excluded.

    Raises:
        ReleaseError: an image cannot be read.
    """
    site_years = list(_iterate_rows(years[years["image"].notna()]))
    sums: list[tuple[Any, ...]] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(_PARALLEL_IMAGES) as pool:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # already reported as a finding
        sums_of_images = pool.map(lambda row: _sum_image(archive, row.image), site_years)
        for row, sums_of_image in zip(site_years, sums_of_images, strict=True):
            sums += [(row.site, row.year, *sums_of_band) for sums_of_band in sums_of_image]
            report_site(row.site)
    return pd.DataFrame(sums, columns=["site", "year", "band", "pixels", "sum", "squares", "low"])


def _sum_image(archive: Archive, name: str) -> list[tuple[str, int, int, int, float]]:
    """Return band, number of pixels, sum, sum of squares and first percentile of each band."""
    ((_, content),) = archive.read([name])
    if not content:
        return []  # unreadable, already reported as a finding
    values = _read_pixels(archive, name, content)
    values = values[:, (values != 0).any(axis=0)]
    sums = []
    for band, band_values in zip(BANDS, values, strict=False):
        low = np.nan
        if band_values.size:
            low = float(np.percentile(band_values, 1))
        exact = band_values.astype(np.int64)
        sums.append((band, band_values.size, int(exact.sum()), int((exact**2).sum()), low))
    return sums


def _read_pixels(archive: Archive, name: str, content: bytes) -> Int16:
    """Read an image as int16 [band, pixel]."""
    try:
        with open_content(content) as image:
            values: Int16 = image.read().reshape(image.count, -1)
            return values
    except (RasterioError, ForbiddenError) as error:
        raise ReleaseError(
            f"{archive.location}: its member {name} is no image ({error}); get the archive again"
        ) from error


def compute_band_statistics(pixels: pd.DataFrame, release: Release) -> pd.DataFrame:
    """Compute mean and standard deviation per band.

    If the release publishes statistics, its values and the corrected published deviation are added.
    """
    sums = pixels.groupby("band")[["pixels", "sum", "squares"]].sum().reindex(BANDS)
    mean = sums["sum"] / sums["pixels"]
    std = [_compute_std(*row) for row in sums.fillna(0).itertuples(index=False)]
    table = pd.DataFrame({"mean": mean, "std": std}, index=pd.Index(BANDS, name="band"))
    if release.band_mean:
        table["published_mean"] = release.band_mean
        table["published_std"] = release.band_std
        table["corrected_std"] = table["published_std"] * 2**0.5
    return table


def _compute_std(count: float, total: float, squares: float) -> float:
    """Compute a standard deviation from a number of values, their sum and sum of squares."""
    if count <= 0:
        return np.nan
    # Exact integers: the difference of two large floats would lose digits.
    variance = int(squares) * int(count) - int(total) ** 2
    std: float = variance**0.5 / int(count)
    return std


def _check_names(notes: Mapping[str, Sequence[str]]) -> Iterator[AuditFinding]:
    for key, (check, text) in _NAME_CHECKS.items():
        for name in notes[key]:
            yield AuditFinding(check, "", 0, f"{name} {text}")


def _check_sites(years: pd.DataFrame, release: Release, split: Split) -> Iterator[AuditFinding]:
    archive_sites = set(years["site"])
    parts_of = _list_parts(split)
    if len(archive_sites) != release.sites:
        yield AuditFinding(
            "sites", "", 0, f"expected {release.sites} sites, found {len(archive_sites)}"
        )
    if len(parts_of) != release.sites:
        text = f"the split names {len(parts_of)} distinct sites, for {release.sites} of the release"
        yield AuditFinding("split", "", 0, text)
    for site, parts in parts_of.items():
        if len(parts) > 1:
            yield AuditFinding("split", site, 0, f"is named {_describe_parts(parts)}")
        if site not in archive_sites:
            yield AuditFinding(
                "split", site, 0, f"is in the split ({parts[0]}), and not in the archive"
            )
    for site in sorted(archive_sites - set(parts_of)):
        yield AuditFinding("split", site, 0, "is in the archive, and not in the split")
    for site in sorted(archive_sites & set(release.excluded)):
        yield AuditFinding("split", site, 0, "is passed over by the authors' code")


def _describe_parts(parts: Sequence[str]) -> str:
    if len(set(parts)) == 1:
        return f"{len(parts)} times in {parts[0]}"
    return f"in {' and in '.join(parts)}"


def _check_repeated_images(years: pd.DataFrame) -> Iterator[AuditFinding]:
    site_years = years[years["image_crc"].notna()]
    for _, copies in site_years.groupby(["year", "image_crc", "height", "width"]):
        original, *repetitions = _iterate_rows(copies)
        for row in repetitions:
            yield AuditFinding(
                "repeated site", row.site, row.year, f"has the image of {original.site}"
            )


def _check_years(years: pd.DataFrame, release: Release) -> Iterator[AuditFinding]:
    for site, rows in years.groupby("site"):
        for kind in ("image", "label"):
            missing = set(release.years) - set(rows.loc[rows[kind].notna(), "year"])
            for year in sorted(missing):
                yield AuditFinding("year missing", str(site), year, f"has no {kind}")
        for year in sorted(set(rows["year"]) - set(release.years)):
            yield AuditFinding("year", str(site), int(year), "is not a year of the release")


def _check_labels(years: pd.DataFrame) -> Iterator[AuditFinding]:
    for row in _iterate_rows(years[years["label"].notna()]):
        if row.problem and row.problem.startswith("label"):
            text = f"{row.problem.removeprefix('label: ')}; it is left out"
            yield AuditFinding("label", row.site, row.year, text)
        elif row.mine_px == 0:
            yield AuditFinding("label empty", row.site, row.year, "has no mine")
        elif row.mine_px == row.label_height * row.label_width:
            yield AuditFinding("label full", row.site, row.year, "is mine everywhere")


def _check_images(years: pd.DataFrame) -> Iterator[AuditFinding]:
    for row in _iterate_rows(years[years["image"].notna()]):
        if row.problem and row.problem.startswith("image"):
            text = f"{row.problem.removeprefix('image: ')}; its label has no place"
            yield AuditFinding("image", row.site, row.year, text)
        if row.dtype and (row.bands, row.dtype) != (len(BANDS), "int16"):
            text = f"expected {len(BANDS)} bands of int16, found {int(row.bands)} of {row.dtype}"
            yield AuditFinding("image", row.site, row.year, text)


def _check_grids(years: pd.DataFrame) -> Iterator[AuditFinding]:
    for site, rows in select_placed(years).groupby("site"):
        for earlier, row in itertools.pairwise(_iterate_rows(rows.sort_values("year"))):
            grid = (row.height, row.width, *row.transform)
            earlier_grid = (earlier.height, earlier.width, *earlier.transform)
            if grid != earlier_grid:
                yield AuditFinding("grid", str(site), row.year, _describe_move(earlier, row))


def _describe_move(earlier: Any, row: Any) -> str:
    """Describe the change of an image's grid between two rows of `years`."""
    pixel_width, _, west, _, pixel_height, north = earlier.transform
    _, _, new_west, _, _, new_north = row.transform
    right = (new_west - west) / pixel_width
    down = (new_north - north) / pixel_height
    text = f"lies {right:+.2f} pixels to the right and {down:+.2f} down of the year before"
    size = f"{row.height:.0f} x {row.width:.0f}"
    earlier_size = f"{earlier.height:.0f} x {earlier.width:.0f}"
    if size == earlier_size:
        return text
    return f"{text} and has {size} pixels instead of {earlier_size}"


def _list_parts(split: Split) -> dict[str, list[str]]:
    """Map each site to its parts of the split, with repetitions."""
    parts_of: dict[str, list[str]] = {}
    for part, sites in split.items():
        for site in sites:
            parts_of.setdefault(site, []).append(part)
    return parts_of


def _check_neighbours(sites: gpd.GeoDataFrame, split: Split) -> Iterator[AuditFinding]:
    part_of = {site: parts[0] for site, parts in _list_parts(split).items()}
    in_split = sites[sites["id"].isin(list(part_of))].to_crs(3035)
    in_split = in_split.assign(split=in_split["id"].map(part_of))
    pairs = in_split.sindex.query(in_split.geometry, predicate="dwithin", distance=NEIGHBOUR_M)
    for index, neighbour_index in zip(*pairs, strict=True):
        site = in_split.iloc[index]
        neighbour = in_split.iloc[neighbour_index]
        if index < neighbour_index and site["split"] != neighbour["split"]:
            relation = "overlaps"
            distance = site.geometry.distance(neighbour.geometry)
            if distance:
                relation = f"lies {distance / 1000:.1f} km from"
            text = f"({site['split']}) {relation} {neighbour['id']} ({neighbour['split']})"
            yield AuditFinding("neighbours", site["id"], 0, text)


def _check_jumps(changes: pd.DataFrame) -> Iterator[AuditFinding]:
    consecutive = changes[changes["year_2"] == changes["year_1"] + 1]
    for row in _iterate_rows(consecutive):
        rate = (row.appeared + row.vanished) / row.pixels
        if rate > JUMP:
            text = f"{rate:.1%} of its pixels changed since the year before"
            yield AuditFinding("label jump", row.site, row.year_2, text)


def _check_steps(pixels: pd.DataFrame) -> Iterator[AuditFinding]:
    for site, rows in pixels.groupby("site"):
        low = rows.pivot_table(index="year", columns="band", values="low").sort_index()
        steps = np.diff(low.to_numpy(), axis=0)
        for year, step in zip(low.index[1:], steps, strict=True):
            smallest = float(np.min(step))
            largest = float(np.max(step))
            if smallest > STEP or largest < -STEP:
                text = (
                    "the darkest pixels of all bands step "
                    f"by {smallest:+.0f} to {largest:+.0f} from the year before"
                )
                yield AuditFinding("offset", str(site), int(year), text)


def _check_statistics(bands: pd.DataFrame) -> Iterator[AuditFinding]:
    if "published_mean" not in bands:
        return
    for band, row in bands.to_dict("index").items():
        if abs(row["mean"] / row["published_mean"] - 1) > _TOLERANCE:
            text = f"{band}: mean {row['mean']:.1f}, published {row['published_mean']:.1f}"
            yield AuditFinding("band statistics", "", 0, text)
        if abs(row["std"] / row["published_std"] - 1) > _TOLERANCE:
            reason = "and that is not for the square root of 2"
            if abs(row["std"] / row["corrected_std"] - 1) <= _TOLERANCE:
                reason = "which is the true one divided by the square root of 2"
            text = (
                f"{band}: standard deviation {row['std']:.1f}, "
                f"published {row['published_std']:.1f}, {reason}"
            )
            yield AuditFinding("band statistics", "", 0, text)


def _iterate_rows(table: pd.DataFrame) -> Iterable[Any]:
    """Iterate over rows with columns as attributes of any type."""
    return table.itertuples()


def count_findings(findings: Iterable[AuditFinding]) -> dict[str, int]:
    """Count the findings of each check."""
    return dict(Counter(finding.check for finding in findings))
