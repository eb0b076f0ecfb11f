"""Import, audit and re-create the published EuroMineNet archive.

    archive.py    read a zip in place, by byte ranges
    importing.py  read each site's images and labels
    audit.py      check the archive and its split
    layout.py     write cubes in its layout and on its grids

An import is a folder, also usable as a catalogue (`--catalog`):

    sites.geojson     each site's area of interest, split and years; the area is the bounding box of
                      all its images
    labels.parquet    GeoParquet, EPSG:4326: site, year, mapped, geometry, source, licence, doi;
                      mine regions along pixel edges, and rows with `mapped` true: the extent of
                      the image, no mine outside the regions
    years.parquet     one row per site and year: names, grid of the image, size and values of the
                      label, problem
    changes.parquet   one row per site and pair of years: pixels compared, appeared, vanished
    import.json       the archive and its members with unexpected names; written last
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
from affine import Affine
from rasterio import features
from rasterio.errors import NotGeoreferencedWarning

from minecube.catalog import Release, Site
from minecube.errors import ReleaseError, UnreadArchiveError
from minecube.files import replacing
from minecube.network import ForbiddenError, check_url, origin_of, why_unreachable, without_query
from minecube.reader import interrupted
from minecube.reader.remote import Session, length_of
from minecube.release.archive import Archive
from minecube.release.importing import MINE, Found, ReleaseSite, extent_of, find, read_site
from minecube.vectors import read_vector

__all__ = [
    "Archive",
    "Imported",
    "download",
    "find",
    "import_release",
    "label_of",
    "need_same",
    "open_import",
    "placed_years",
    "write_json",
]

_AT_ONCE = 3  # sites read in parallel; a killed run loses at most these
_TABLES = ("years", "labels", "changes")


@dataclass(frozen=True)
class Imported:
    """An import as tables; the module lists their columns."""

    sites: gpd.GeoDataFrame
    years: pd.DataFrame
    labels: gpd.GeoDataFrame
    changes: pd.DataFrame
    about: Mapping[str, Any]
    """Content of import.json."""


def import_release(
    archive: Archive,
    out: Path,
    release: Release,
    known: Sequence[Site],
    done: Callable[[str], None] = lambda _: None,
) -> Imported:
    """Read headers and labels of the whole archive into a folder.

    Sites read by an earlier run are reused.

    Args:
        archive: The zip.
        out: The folder.
        release: Metadata of the release.
        known: Sites of the catalogue. Their split and country are copied.
        done: Called with each site's name.

    Raises:
        ReleaseError: members cannot be read (the other sites are kept for the next run), the folder
            has another archive's import, or writing fails.
    """
    found, identity = find(archive.names()), archive.identity()
    parts, begun = out / "parts", _begun(out)
    if (begun / "import.json").exists():
        other = json.loads((begun / "import.json").read_text(encoding="utf-8"))
        if other["identity"] != identity:
            raise ReleaseError(
                f"{out}: holds an import of another archive ({other['archive']}); name another folder"
            )
        if begun is out:
            return open_import(out)
    about = {"archive": archive.where, "identity": identity, "release": release.id}
    about |= {k: v for k, v in asdict(found).items() if k in ("renamed", "twice", "strange")}
    try:
        parts.mkdir(parents=True, exist_ok=True)
        write_json(parts / "import.json", about)
        read = _read_sites(archive, found, parts, done)
        if all(extent_of(r.years) is None for r in read):
            shutil.rmtree(parts)
            raise ReleaseError(
                f"{archive.where}: no image has a place on Earth, so no site of it has; is it the whole release?"
            )
        tables = {t: _together([getattr(r, t) for r in read]) for t in _TABLES}
        tables["labels"] = tables["labels"].assign(
            source=release.name, licence=release.licence, doi=release.doi
        )
        for name, table in tables.items():
            _write_parquet(table.reset_index(drop=True), out / f"{name}.parquet")
        write_json(
            out / "sites.geojson", json.loads(_sites(read, release, known).to_json(drop_id=True))
        )
        write_json(out / "import.json", about)
        shutil.rmtree(parts)
    except OSError as error:
        raise ReleaseError(
            f"{out}: cannot be written ({error.strerror or error}); mend that and import again"
        ) from error
    return open_import(out)


def _begun(out: Path) -> Path:
    """Return the folder of an import's notes.

    Raises:
        ReleaseError: `out` has a catalogue made by the user.
    """
    begun = out / "parts" if (out / "parts").exists() else out
    if (out / "sites.geojson").exists() and not (begun / "import.json").exists():
        raise ReleaseError(
            f"{out}: has a sites.geojson that no import wrote, and would lose it; name another folder"
        )
    return begun


def open_import(folder: Path) -> Imported:
    """Open a finished import; raise ReleaseError if the folder has none."""
    try:
        about = json.loads((folder / "import.json").read_text(encoding="utf-8"))
        tables = [pd.read_parquet(folder / f"{n}.parquet") for n in ("years", "changes")]
        labels, sites = (
            gpd.read_parquet(folder / "labels.parquet"),
            read_vector(folder / "sites.geojson"),
        )
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: pyogrio; others: Arrow
        raise ReleaseError(
            f"{folder}: holds no finished import of a release ({error}); run `minecube release import` first"
        ) from error
    return Imported(sites=sites, years=tables[0], labels=labels, changes=tables[1], about=about)


def label_of(imported: Imported, site: str, year: int) -> npt.NDArray[np.uint8]:
    """Rebuild a label of an import as published.

    Returns:
        uint8 [y, x] on its image's grid: 255 mine, 0 not. All 0 without a mine region.
    """
    of_year = imported.years[
        (imported.years["site"] == site) & (imported.years["year"] == year)
    ].iloc[0]
    shape, place = (int(of_year["height"]), int(of_year["width"])), Affine(*of_year["transform"])
    labels = imported.labels
    regions = labels[
        (labels["site"] == site) & (labels["year"] == year) & ~labels["mapped"]
    ].geometry
    if regions.empty:
        return np.zeros(shape, np.uint8)
    drawn: npt.NDArray[np.uint8] = features.rasterize(
        regions, shape, transform=place, default_value=MINE, dtype="uint8"
    )
    return drawn


def placed_years(imported: Imported, site: str) -> dict[int, dict[str, Any]]:
    """Map each year with a georeferenced image to its row of `years`."""
    rows: Any = imported.years[imported.years["site"] == site].to_dict("records")
    return {
        int(r["year"]): r
        for r in rows
        if r["transform"] is not None and not (r["problem"] or "").startswith("image")
    }


def need_same(archive: Archive, imported: Imported, folder: Path) -> None:
    """Raise ReleaseError if the import is from another archive."""
    if archive.identity() != imported.about["identity"]:
        raise ReleaseError(
            f"{archive.where}: is not the archive that {folder} was imported from ({imported.about['archive']})"
        )


def download(url: str, out: Path, done: Callable[[int, int], None] = lambda _n, _of: None) -> Path:
    """Download the complete archive into the folder and return its path.

    An earlier download from the same URL is reused.

    Args:
        url: An http(s):// URL.
        out: The folder.
        done: Called with the bytes of each part and the total.

    Raises:
        ReleaseError: the download is incomplete or writing fails. A folder with a catalogue made by
            the user also raises, before the first request.
    """
    _begun(out)
    path = out / f"archive-{hashlib.sha256(without_query(url).encode()).hexdigest()[:12]}.zip"
    if path.exists():
        return path
    try:
        check_url(url, origin_of(url))
        out.mkdir(parents=True, exist_ok=True)
        with (
            replacing(path) as part,
            Session() as session,
            session.get(url, stream=True, timeout=(10, 60)) as answer,
            part.open("wb") as file,
        ):
            answer.raise_for_status()
            size = length_of(answer.headers.get("Content-Length")) or 0
            for piece in answer.iter_content(1 << 20):  # raises on an incomplete answer
                file.write(piece)
                done(len(piece), size)
    except (OSError, ForbiddenError) as error:  # requests raises OSErrors
        why = why_unreachable(url, error) or without_query(str(error))
        kind = ReleaseError if isinstance(error, ForbiddenError) else UnreadArchiveError
        raise kind(
            f"{without_query(url)}: cannot be downloaded to {out} ({why}); try again"
        ) from error
    return path


def _read_sites(
    archive: Archive, found: Found, parts: Path, done: Callable[[str], None]
) -> list[ReleaseSite]:
    """Read all sites in order; sites of an earlier run come from its folder."""
    interrupted.clear()
    sites = found.sites()
    failed: list[str] = []
    kind: type[ReleaseError] = ReleaseError
    with warnings.catch_warnings(), ThreadPoolExecutor(_AT_ONCE) as pool:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # labels have no georeference
        tasks = {pool.submit(_read_once, archive, found, site, parts): site for site in sites}
        left = set(tasks)
        try:
            while left:
                ended, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
                for task in ended:
                    error = task.exception()
                    if error and not isinstance(error, ReleaseError):
                        raise error
                    if isinstance(error, UnreadArchiveError):
                        kind = UnreadArchiveError
                    failed += [f"{tasks[task]}: {error}"] if error else []
                    done(tasks[task])
        except BaseException:
            interrupted.set()  # stop retrying failed requests
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failed:
        more = f" (and {len(failed) - 1} sites more)" if len(failed) > 1 else ""
        raise kind(
            f"{failed[0]}{more}; {len(sites) - len(failed)} sites are read, run again to try just the others"
        )
    return [_part(parts / site) for site in sites]


def _read_once(archive: Archive, found: Found, site: str, parts: Path) -> None:
    if (parts / site).exists():
        return
    read = read_site(archive, found, site)
    with replacing(parts / site) as made:
        made.mkdir()
        for name in _TABLES:
            getattr(read, name).to_parquet(made / f"{name}.parquet")


def _part(folder: Path) -> ReleaseSite:
    years, changes = (pd.read_parquet(folder / f"{n}.parquet") for n in ("years", "changes"))
    return ReleaseSite(years, gpd.read_parquet(folder / "labels.parquet"), changes)


def _together(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join the tables of all sites; an empty column takes its type from other sites."""
    if isinstance(tables[0], gpd.GeoDataFrame):
        joined: pd.DataFrame = pd.concat([table for table in tables if len(table)] or [tables[0]])
        return joined
    records = [record for table in tables for record in table.to_dict("records")]
    return pd.DataFrame(records, columns=tables[0].columns)


def _sites(
    read: Sequence[ReleaseSite], release: Release, known: Sequence[Site]
) -> gpd.GeoDataFrame:
    """List georeferenced sites as catalogue rows."""
    catalogue = {s.id: s for s in known}
    rows = []
    for of_site in read:
        site, extent = str(of_site.years["site"].iloc[0]), extent_of(of_site.years)
        if extent is None:
            continue
        there = catalogue.get(site) or Site(id=site)
        years = sorted(int(y) for y in of_site.labels["year"].unique())
        rows.append(
            (
                site,
                there.country or None,
                there.split,
                years,
                f"{release.title} ({release.licence})",
                extent,
            )
        )
    columns = ["id", "country", "split", "years", "labels", "geometry"]
    return gpd.GeoDataFrame(rows, columns=columns, geometry="geometry", crs=4326)


def write_json(path: Path, content: Any) -> None:
    """Write a complete JSON file; raise ReleaseError if writing fails."""
    try:
        with replacing(path) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ReleaseError(
            f"{path}: cannot be written ({error.strerror}); name another file"
        ) from error


def _write_parquet(table: pd.DataFrame, path: Path) -> None:
    with replacing(path) as part:
        table.to_parquet(part)
