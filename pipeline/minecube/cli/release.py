"""Subcommands of release: import and audit EuroMineNet, and write cubes in its layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import click
import pandas as pd

from minecube import release as releases
from minecube.catalog import Release, load_releases, load_sites, pick
from minecube.cli.bars import progress_bar
from minecube.cli.options import StoreSites, collect_options, sites_option, store_option
from minecube.cli.parameters import InFile, InFolder, OutFile, OutFolder
from minecube.jobs.release import ExportedSite, export_release
from minecube.jobs.tables import format_table
from minecube.network import remove_query
from minecube.places import Place, Url, outgoing
from minecube.release import audit as auditing
from minecube.release import layout

_SHOWN = 12
"""Most findings printed per check. The JSON has all."""


@click.group()
def release() -> None:
    """Import, audit or re-create the published EuroMineNet archive.

    \b
    Example:
      minecube release import https://example.org/EuroMineNet.zip --out eurominenet
      minecube release audit eurominenet
      minecube build --catalog eurominenet --sites Germany_1 --years 2015-2024 --source earth-search-c1 --store cubes.zarr
      minecube label --store cubes.zarr --polygons eurominenet/labels.parquet
    """


def _check_archive(_ctx: click.Context, _param: click.Parameter, archive: str | None) -> str | None:
    """Return the path or URL of an archive. Fail for a URL without supported scheme or host."""
    if archive is None or "://" not in archive:
        return archive
    try:
        parts = urlsplit(archive)
        readable = parts.scheme in ("http", "https", "s3") and bool(parts.hostname)
    except ValueError:  # brackets without an address
        readable = False
    if not readable:
        raise click.BadParameter(
            "expected a path, or an http(s):// or s3:// URL with a host or bucket, "
            f"found {remove_query(archive)!r}"
        )
    return archive


@release.command(name="import")
@click.argument("archive", callback=_check_archive)
@click.option(
    "--out",
    type=OutFolder(),
    required=True,
    help="Folder for the import. Pass it to other commands as --catalog.",
)
@click.option(
    "--download",
    is_flag=True,
    help="Download the whole archive into that folder first. For servers without byte ranges.",
)
@click.option(
    "--release",
    "release_id",
    default="eurominenet",
    show_default=True,
    help="Published dataset (catalog/releases.yaml).",
)
def import_(archive: str, out: Place, download: bool, release_id: str) -> None:
    """Import sites, grids, years and labels of a published archive (URL or path).

    Reads byte ranges only. An interrupted import into a local folder resumes when you run it
    again.

    \b
    Example:
      minecube release import https://example.org/EuroMineNet.zip --out eurominenet
    """
    published = _load_release(release_id)
    if download:
        if isinstance(out, Url):
            raise click.UsageError(
                f"--download keeps the archive in a local folder, and --out is {out}: "
                "download it first, and name the file"
            )
        with progress_bar("downloading MB") as bar:
            path = releases.download(
                archive,
                out,
                lambda size, total: bar.reach(round(size / 1e6), round(total / 1e6)),
            )
        archive = str(path)
    # Print this first: a silent server is tried again for minutes.
    click.echo(f"reading the directory of {archive.partition('?')[0]}", err=True)
    opened = releases.Archive(archive)
    sites = releases.find_members(opened.names()).sites()
    with (
        outgoing(out, update=True) as folder,
        progress_bar("importing", len(sites), "sites") as bar,
    ):
        imported = releases.import_release(opened, folder, published, load_sites(), bar.advance)
    _print_import(imported, opened, out)


def _print_import(imported: releases.Imported, archive: releases.Archive, out: Place) -> None:
    mapped = int(imported.labels["mapped"].sum())
    listed = int(imported.years["label"].notna().sum())
    click.echo(
        f"{out}: {len(imported.sites)} sites, {len(imported.years)} site-years, "
        f"{mapped} labels of {listed}; {archive.bytes.tally.bytes / 1e6:.2f} of "
        f"{archive.bytes.size / 1e6:,.1f} MB read"
    )
    faulty = imported.years[imported.years["problem"].notna()]
    for row in faulty.to_dict("records"):
        click.echo(f"left out: {row['site']} {row['year']}: {row['problem']}", err=True)
    strange = imported.about["strange"]
    if strange:
        listed_names = strange[0]
        if len(strange) > 1:
            listed_names += f" and {len(strange) - 1} others"
        click.echo(f"not understood: {listed_names}", err=True)
    click.echo(
        f"use it with --catalog {out}, "
        f"and its labels with `minecube label --polygons {out}/labels.parquet`"
    )


@release.command()
@click.argument("folder", type=InFolder(exists=False))
@click.option(
    "--pixels",
    "archive",
    callback=_check_archive,
    help="URL or path of the archive. Reads all images, for band statistics and steps of the "
    "offset.",
)
@click.option(
    "--split",
    "split_file",
    type=InFile(exists=False),
    help="Split to audit (JSON). [default: the published split]",
)
@click.option(
    "--json",
    "out",
    type=OutFile(),
    help="File for all findings and tables.",
)
def audit(folder: Place, archive: str | None, split_file: Place | None, out: Place | None) -> None:
    """List faults of an imported release and of its split. Exits with 1 if there are any.

    \b
    Example:
      minecube release audit eurominenet --json audit.json
    """
    imported = releases.open_import(folder)
    published = _load_release(imported.about["release"])
    pixels = None
    bands = None
    if archive:
        pixels = _read_pixels(archive, imported, folder)
        bands = auditing.compute_band_statistics(pixels, published).reset_index()
    split = _load_split(split_file, published)
    findings = auditing.audit_release(imported, published, split, pixels)
    changes = auditing.compute_change_rates(imported.changes)
    counts = auditing.count_findings(findings)
    _print_findings(findings, counts)
    _print_changes(changes)
    _print_bands(bands)
    if out:
        content: dict[str, object] = {
            "counts": counts,
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "changes": changes.to_dict("records"),
        }
        if bands is not None:
            content["bands"] = bands.to_dict("records")
        with outgoing(out) as path:
            releases.write_json(path, content)
    if findings:
        click.get_current_context().exit(1)


def _load_split(file: Place | None, published: Release) -> auditing.Split:
    """Read the split of a file, by default the published split."""
    if file:
        return auditing.read_split(file)
    return auditing.select_split(published, load_sites())


def _read_pixels(archive: str, imported: releases.Imported, folder: Place) -> pd.DataFrame:
    """Sum the pixels of all images in the archive."""
    opened = releases.Archive(archive)
    releases.check_same_archive(opened, imported, folder)
    images = int(imported.years["image"].notna().sum())
    with progress_bar("reading", images, "images") as bar:
        return auditing.sum_pixels(opened, imported.years, bar.advance)


def _print_findings(findings: Sequence[auditing.AuditFinding], counts: Mapping[str, int]) -> None:
    if not findings:
        click.echo("nothing is wrong")
        return
    click.echo(format_table(("check", "findings"), list(counts.items())))
    rows = []
    for check in counts:
        of_check = [finding for finding in findings if finding.check == check]
        rows += [(f.check, f.site or "-", f.year or "-", f.found) for f in of_check[:_SHOWN]]
    click.echo("\n" + format_table(("check", "site", "year", "what was found"), rows))
    hidden = len(findings) - len(rows)
    if hidden:
        click.echo(f"and {hidden} more, of checks with over {_SHOWN}; --json FILE has all")


def _print_changes(changes: pd.DataFrame) -> None:
    """Print shares of changed pixels between consecutive years."""
    consecutive = changes[changes["year_2"] == changes["year_1"] + 1]
    rows = [
        (
            f"{row['year_1']}-{row['year_2']}",
            f"{100 * row['appeared'] / row['pixels']:.3f}",
            f"{100 * row['vanished'] / row['pixels']:.3f}",
        )
        for row in consecutive.to_dict("records")
    ]
    if rows:
        click.echo("\n" + format_table(("pair of years", "appeared %", "vanished %"), rows))


def _print_bands(bands: pd.DataFrame | None) -> None:
    if bands is None:
        click.echo(
            "\nnot looked at: band statistics and offset steps, "
            "for which --pixels ARCHIVE reads all images"
        )
        return
    rows = [tuple(row) for row in bands.to_numpy().tolist()]
    click.echo("\n" + format_table(tuple(map(str, bands.columns)), rows))


@release.command()
@store_option
@sites_option
@click.option(
    "--import",
    "folder",
    type=InFolder(exists=False),
    help="Folder made by `release import`. Files are then written on the grids of the "
    "release, and labels are compared with it.",
)
@click.option(
    "--out",
    type=OutFolder(),
    required=True,
    help="Folder for EuroMineNet/.",
)
@collect_options
def export(sites: StoreSites, folder: Place | None, out: Place) -> None:
    """Write cubes in the layout of the release: int16 images and 0/255 labels in EPSG:4326.

    With --import, files lie on the release's own grids, and labels are compared with the release's.

    \b
    Example:
      minecube release export --store cubes.zarr --import eurominenet --out again
    """
    names = sites.names()
    with outgoing(out) as local, progress_bar("exporting", len(names), "sites") as bar:
        exported = export_release(sites.store, names, local, folder, bar.advance)
    columns = ("site", "images", "labels", "without label", "lowest IoU with the release's")
    click.echo(format_table(columns, [_summarise(site) for site in exported]))
    images = sum(site.years for site in exported)
    labels = sum(site.labels for site in exported)
    click.echo(f"{out}/{layout.FOLDER}: {images} images, {labels} labels")


def _summarise(site: ExportedSite) -> tuple[object, ...]:
    """Return the row of a site in the table."""
    unlabelled = ", ".join(map(str, site.unlabelled)) or "-"
    return (site.site, site.years, site.labels, unlabelled, _format_lowest(site.agreement))


def _format_lowest(agreement: Mapping[int, float]) -> str:
    if not agreement:
        return "-"
    year = min(agreement, key=lambda year: (agreement[year], year))
    return f"{agreement[year]:.4f} ({year})"


def _load_release(name: str) -> Release:
    return pick(load_releases(), name, "release")
