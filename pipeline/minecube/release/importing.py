"""Import a whole archive into a folder, site by site, and download archives."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import geopandas as gpd
import pandas as pd
from rasterio.errors import NotGeoreferencedWarning

from minecube.catalog import Release, Site
from minecube.errors import ReleaseError, UnreadArchiveError
from minecube.files import replacing
from minecube.network import ForbiddenError, check_url, explain_unreachable, origin_of, remove_query
from minecube.reader import interruption
from minecube.reader.remote import Session, length_of
from minecube.release.archive import Archive
from minecube.release.imported import Imported, open_import, write_json
from minecube.release.members import Members, find_members
from minecube.release.sites import ReleaseSite, extent_of, read_site

_PARALLEL_SITES = 3  # a killed run loses at most these
_TABLES = ("years", "labels", "changes")


def import_release(
    archive: Archive,
    out: Path,
    release: Release,
    catalogue: Sequence[Site],
    report_site: Callable[[str], None] = lambda _: None,
) -> Imported:
    """Read headers and labels of the whole archive into a folder.

    Sites read by an earlier run are reused. Split and country come from the catalogue.

    Raises:
        ReleaseError: members cannot be read (the other sites are kept for the next run), the folder
            has another archive's import, or writing fails.
    """
    members = find_members(archive.names())
    notes = {
        "archive": archive.location,
        "identity": archive.compute_identity(),
        "release": release.id,
        "renamed": members.renamed,
        "twice": members.duplicates,
        "strange": members.unrecognised,
    }
    notes_folder = _find_notes_folder(out)
    if (notes_folder / "import.json").exists():
        earlier = json.loads((notes_folder / "import.json").read_text(encoding="utf-8"))
        if earlier["identity"] != notes["identity"]:
            raise ReleaseError(
                f"{out}: holds an import of another archive ({earlier['archive']}); "
                "name another folder"
            )
        if notes_folder is out:
            return open_import(out)
    parts = out / "parts"
    try:
        parts.mkdir(parents=True, exist_ok=True)
        write_json(parts / "import.json", notes)
        sites = _read_sites(archive, members, parts, report_site)
        if all(extent_of(site.years) is None for site in sites):
            shutil.rmtree(parts)
            raise ReleaseError(
                f"{archive.location}: no image is georeferenced, so no site has a location; "
                "check that it is the whole release"
            )
        _write_tables(sites, release, out)
        site_table = _tabulate_sites(sites, release, catalogue)
        write_json(out / "sites.geojson", json.loads(site_table.to_json(drop_id=True)))
        write_json(out / "import.json", notes)
        shutil.rmtree(parts)
    except OSError as error:
        raise ReleaseError(
            f"{out}: cannot be written ({error.strerror or error}); fix that and import again"
        ) from error
    return open_import(out)


def _find_notes_folder(out: Path) -> Path:
    """Return the folder of an import's notes: `parts` of an unfinished import, else `out`.

    Raises:
        ReleaseError: `out` has a catalogue made by the user.
    """
    notes_folder = out
    if (out / "parts").exists():
        notes_folder = out / "parts"
    if (out / "sites.geojson").exists() and not (notes_folder / "import.json").exists():
        raise ReleaseError(
            f"{out}: has a sites.geojson that no import wrote, and would lose it; "
            "name another folder"
        )
    return notes_folder


def download(
    url: str, out: Path, report_bytes: Callable[[int, int], None] = lambda _size, _total: None
) -> Path:
    """Download the complete archive from an http(s):// URL into the folder and return its path.

    An earlier download from the same URL is reused. Calls `report_bytes` with the bytes so
    far and the total, 0 if the server does not give it.

    Raises:
        ReleaseError: the download is incomplete or writing fails. A folder with a catalogue made by
            the user also raises, before the first request.
    """
    _find_notes_folder(out)
    path = out / f"archive-{hashlib.sha256(remove_query(url).encode()).hexdigest()[:12]}.zip"
    if path.exists():
        return path
    try:
        check_url(url, origin_of(url))
        out.mkdir(parents=True, exist_ok=True)
        with (
            replacing(path) as draft,
            Session() as session,
            session.get(url, stream=True, timeout=(10, 60)) as answer,
            draft.open("wb") as file,
        ):
            answer.raise_for_status()
            total = length_of(answer.headers.get("Content-Length")) or 0
            for piece in answer.iter_content(1 << 20):  # raises on an incomplete answer
                file.write(piece)
                report_bytes(file.tell(), total)
    except (OSError, ForbiddenError) as error:  # requests raises OSErrors
        reason = explain_unreachable(url, error) or remove_query(str(error))
        text = f"{remove_query(url)}: cannot be downloaded to {out} ({reason}); try again"
        if isinstance(error, ForbiddenError):
            raise ReleaseError(text) from error
        raise UnreadArchiveError(text) from error
    return path


def _read_sites(
    archive: Archive, members: Members, parts: Path, report_site: Callable[[str], None]
) -> list[ReleaseSite]:
    """Read all sites in order; sites of an earlier run come from its folder."""
    interruption.clear()
    names = members.sites()
    errors: dict[str, ReleaseError] = {}
    with warnings.catch_warnings(), ThreadPoolExecutor(_PARALLEL_SITES) as pool:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # labels have no georeference
        tasks = {pool.submit(_read_once, archive, members, name, parts): name for name in names}
        pending = set(tasks)
        try:
            while pending:
                ended, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                for task in ended:
                    try:
                        task.result()
                    except ReleaseError as error:
                        errors[tasks[task]] = error
                    report_site(tasks[task])
        except BaseException:
            interruption.set()  # stop retrying failed requests
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if errors:
        raise _summarise(errors, len(names))
    return [_read_part(parts / name) for name in names]


def _summarise(errors: dict[str, ReleaseError], site_count: int) -> ReleaseError:
    """Return one error for all failed sites, with the text of the earliest."""
    (name, error), *more_errors = errors.items()
    text = f"{name}: {error}"
    if more_errors:
        text += f" (and {len(more_errors)} sites more)"
    text += f"; {site_count - len(errors)} sites are read, run again to try just the others"
    if any(isinstance(error, UnreadArchiveError) for error in errors.values()):
        return UnreadArchiveError(text)
    return ReleaseError(text)


def _read_once(archive: Archive, members: Members, site: str, parts: Path) -> None:
    """Read a site into its folder, unless an earlier run did."""
    if (parts / site).exists():
        return
    tables = read_site(archive, members, site)
    with replacing(parts / site) as draft:
        draft.mkdir()
        for name in _TABLES:
            getattr(tables, name).to_parquet(draft / f"{name}.parquet")


def _read_part(folder: Path) -> ReleaseSite:
    return ReleaseSite(
        years=pd.read_parquet(folder / "years.parquet"),
        labels=gpd.read_parquet(folder / "labels.parquet"),
        changes=pd.read_parquet(folder / "changes.parquet"),
    )


def _write_tables(sites: Sequence[ReleaseSite], release: Release, out: Path) -> None:
    """Write the tables of all sites as Parquet."""
    # Empty tables have no geometry type to join.
    filled = [site.labels for site in sites if len(site.labels)] or [sites[0].labels]
    labels = pd.concat(filled).assign(source=release.name, licence=release.licence, doi=release.doi)
    tables = {
        "years": _join([site.years for site in sites]),
        "labels": labels.reset_index(drop=True),
        "changes": _join([site.changes for site in sites]),
    }
    for name, table in tables.items():
        with replacing(out / f"{name}.parquet") as draft:
            table.to_parquet(draft)


def _join(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join the tables of all sites; an empty column takes its type from other sites."""
    records = [record for table in tables for record in table.to_dict("records")]
    return pd.DataFrame(records, columns=tables[0].columns)


def _tabulate_sites(
    sites: Sequence[ReleaseSite], release: Release, catalogue: Sequence[Site]
) -> gpd.GeoDataFrame:
    """List georeferenced sites as catalogue rows."""
    entries = {entry.id: entry for entry in catalogue}
    rows = []
    for site in sites:
        name = str(site.years["site"].iloc[0])
        extent = extent_of(site.years)
        if extent is None:
            continue
        entry = entries.get(name) or Site(id=name)
        rows.append(
            {
                "id": name,
                "country": entry.country or None,
                "split": entry.split,
                "years": sorted(int(year) for year in site.labels["year"].unique()),
                "labels": f"{release.title} ({release.licence})",
                "geometry": extent,
            }
        )
    return gpd.GeoDataFrame(rows, geometry="geometry", crs=4326)
