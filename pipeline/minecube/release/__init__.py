"""The published EuroMineNet archive: read in place, audited, and written again from cubes.

    archive.py    a zip read where it lies, by ranges of bytes      importing.py  what it says of each site
    audit.py      what is wrong with it and with its split          layout.py     cubes in its layout and on its grids

An import is a folder, and a catalogue of the user's own (`--catalog`):

    sites.geojson     each site's area of interest, split and years: what all its images cover together
    labels.parquet    GeoParquet, EPSG:4326: site, year, mapped, geometry, and source, licence, doi; regions of mine along pixel
                      edges, and, with `mapped` true, the extent within which all else is not mine
    years.parquet     a row a site and year: names, grid of the image, size and values of the label, and what is wrong with it
    changes.parquet   a row a site and pair of years: pixels compared, appeared, vanished
    import.json       which archive that is of, and members that are named otherwise than they should be; written last
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

_AT_ONCE = 3  # sites, each with its images at a time: a run that is killed loses no more than these
_TABLES = ("years", "labels", "changes")


@dataclass(frozen=True)
class Imported:
    """An import, as tables; see the module for their columns."""

    sites: gpd.GeoDataFrame
    years: pd.DataFrame
    labels: gpd.GeoDataFrame
    changes: pd.DataFrame
    about: Mapping[str, Any]
    """import.json."""


def import_release(
    archive: Archive, out: Path, release: Release, known: Sequence[Site], done: Callable[[str], None] = lambda _: None
) -> Imported:
    """Read headers and labels of the whole archive into a folder; sites that are there already are not read again.

    Args:
        archive: the zip.
        out: the folder.
        release: what is known of it.
        known: sites of the catalogue, whose split and country are taken over.
        done: called with each site's name.

    Raises:
        ReleaseError: members cannot be read (the other sites are kept for the next run), the folder has another archive's
            import, or it cannot be written.
    """
    found, identity = find(archive.names()), archive.identity()
    parts, begun = out / "parts", _begun(out)
    if (begun / "import.json").exists():
        other = json.loads((begun / "import.json").read_text(encoding="utf-8"))
        if other["identity"] != identity:
            raise ReleaseError(f"{out}: holds an import of another archive ({other['archive']}); name another folder")
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
        tables["labels"] = tables["labels"].assign(source=release.name, licence=release.licence, doi=release.doi)
        for name, table in tables.items():
            _write_parquet(table.reset_index(drop=True), out / f"{name}.parquet")
        write_json(out / "sites.geojson", json.loads(_sites(read, release, known).to_json(drop_id=True)))
        write_json(out / "import.json", about)
        shutil.rmtree(parts)
    except OSError as error:
        raise ReleaseError(f"{out}: cannot be written ({error.strerror or error}); mend that and import again") from error
    return open_import(out)


def _begun(out: Path) -> Path:
    """The folder of an import's notes; raises ReleaseError where `out` has a catalogue of the user's own."""
    begun = out / "parts" if (out / "parts").exists() else out
    if (out / "sites.geojson").exists() and not (begun / "import.json").exists():
        raise ReleaseError(f"{out}: has a sites.geojson that no import wrote, and would lose it; name another folder")
    return begun


def open_import(folder: Path) -> Imported:
    """An import that is finished; raises ReleaseError where there is none."""
    try:
        about = json.loads((folder / "import.json").read_text(encoding="utf-8"))
        tables = [pd.read_parquet(folder / f"{n}.parquet") for n in ("years", "changes")]
        labels, sites = gpd.read_parquet(folder / "labels.parquet"), read_vector(folder / "sites.geojson")
    except (OSError, ValueError, RuntimeError) as error:  # pyogrio's errors are RuntimeErrors, Arrow's the others
        raise ReleaseError(
            f"{folder}: holds no finished import of a release ({error}); run `minecube release import` first"
        ) from error
    return Imported(sites=sites, years=tables[0], labels=labels, changes=tables[1], about=about)


def label_of(imported: Imported, site: str, year: int) -> npt.NDArray[np.uint8]:
    """A label of an import, as published: uint8 [y, x] on its image's grid, 255 mine, 0 not; all 0 where it has none."""
    of_year = imported.years[(imported.years["site"] == site) & (imported.years["year"] == year)].iloc[0]
    shape, place = (int(of_year["height"]), int(of_year["width"])), Affine(*of_year["transform"])
    labels = imported.labels
    regions = labels[(labels["site"] == site) & (labels["year"] == year) & ~labels["mapped"]].geometry
    if regions.empty:
        return np.zeros(shape, np.uint8)
    drawn: npt.NDArray[np.uint8] = features.rasterize(regions, shape, transform=place, default_value=MINE, dtype="uint8")
    return drawn


def placed_years(imported: Imported, site: str) -> dict[int, dict[str, Any]]:
    """Year -> its row of `years`, of those whose image has a place."""
    rows: Any = imported.years[imported.years["site"] == site].to_dict("records")
    return {int(r["year"]): r for r in rows if r["transform"] is not None and not (r["problem"] or "").startswith("image")}


def need_same(archive: Archive, imported: Imported, folder: Path) -> None:
    """Raises ReleaseError where the import is of another archive."""
    if archive.identity() != imported.about["identity"]:
        raise ReleaseError(f"{archive.where}: is not the archive that {folder} was imported from ({imported.about['archive']})")


def download(url: str, out: Path, done: Callable[[int, int], None] = lambda _n, _of: None) -> Path:
    """The archive as a file in the folder, whole; one that was got from that URL before is taken for it.

    Args:
        url: http(s)://
        out: the folder.
        done: called with the bytes of each part, and of all.

    Raises:
        ReleaseError: it cannot be got in full, or written; or, before a byte is asked for, the folder is none to import into.
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
            for piece in answer.iter_content(1 << 20):  # which raises where it ends before its length
                file.write(piece)
                done(len(piece), size)
    except (OSError, ForbiddenError) as error:  # requests' errors are OSErrors
        why = why_unreachable(url, error) or without_query(str(error))
        kind = ReleaseError if isinstance(error, ForbiddenError) else UnreadArchiveError
        raise kind(f"{without_query(url)}: cannot be downloaded to {out} ({why}); try again") from error
    return path


def _read_sites(archive: Archive, found: Found, parts: Path, done: Callable[[str], None]) -> list[ReleaseSite]:
    """All sites, in order; those of an earlier run from where it put them."""
    interrupted.clear()
    sites = found.sites()
    failed: list[str] = []
    kind: type[ReleaseError] = ReleaseError
    with warnings.catch_warnings(), ThreadPoolExecutor(_AT_ONCE) as pool:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # labels are not, which is known
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
            interrupted.set()  # no request in trouble is waited for
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failed:
        more = f" (and {len(failed) - 1} sites more)" if len(failed) > 1 else ""
        raise kind(f"{failed[0]}{more}; {len(sites) - len(failed)} sites are read, run again to try just the others")
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
    """Tables of all sites as one; a column that a site has no value for takes its type from the others."""
    if isinstance(tables[0], gpd.GeoDataFrame):
        joined: pd.DataFrame = pd.concat([table for table in tables if len(table)] or [tables[0]])
        return joined
    records = [record for table in tables for record in table.to_dict("records")]
    return pd.DataFrame(records, columns=tables[0].columns)


def _sites(read: Sequence[ReleaseSite], release: Release, known: Sequence[Site]) -> gpd.GeoDataFrame:
    """Sites with a place, as the catalogue has them."""
    catalogue = {s.id: s for s in known}
    rows = []
    for of_site in read:
        site, extent = str(of_site.years["site"].iloc[0]), extent_of(of_site.years)
        if extent is None:
            continue
        there = catalogue.get(site) or Site(id=site)
        years = sorted(int(y) for y in of_site.labels["year"].unique())
        rows.append((site, there.country or None, there.split, years, f"{release.title} ({release.licence})", extent))
    columns = ["id", "country", "split", "years", "labels", "geometry"]
    return gpd.GeoDataFrame(rows, columns=columns, geometry="geometry", crs=4326)


def write_json(path: Path, content: Any) -> None:
    """JSON, the whole file or none; raises ReleaseError where it cannot be written."""
    try:
        with replacing(path) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ReleaseError(f"{path}: cannot be written ({error.strerror}); name another file") from error


def _write_parquet(table: pd.DataFrame, path: Path) -> None:
    with replacing(path) as part:
        table.to_parquet(part)
