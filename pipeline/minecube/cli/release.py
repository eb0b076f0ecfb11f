"""Subcommands of release: import and audit EuroMineNet, and write cubes in its layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from urllib.parse import urlsplit

import click
import odc.geo.xr  # noqa: F401  registers the .odc accessor

from minecube import cube
from minecube import release as releases
from minecube.catalog import BANDS, Release, load_releases, load_sites, pick
from minecube.cli.common import (
    SiteChoice,
    progress_bar,
    sites_option,
    store_option,
    stored_sites,
    table,
)
from minecube.errors import CatalogError
from minecube.network import without_query
from minecube.release import audit as auditing
from minecube.release import layout

release_option = click.option(
    "--release",
    "release_id",
    default="eurominenet",
    show_default=True,
    help="Published dataset (catalog/releases.yaml).",
)
SHOWN = 12
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


def _check_archive(_ctx: click.Context, _param: click.Parameter, where: str | None) -> str | None:
    """Return the path or URL of an archive. Fail for a URL without supported scheme or host."""
    if where is None or "://" not in where:
        return where
    try:
        parts = urlsplit(where)
        readable = parts.scheme in ("http", "https", "s3") and bool(parts.hostname)
    except ValueError:  # brackets without an address
        readable = False
    if not readable:
        raise click.BadParameter(
            f"expected a path, or an http(s):// or s3:// URL with a host or bucket, found {without_query(where)!r}"
        )
    return where


@release.command(name="import")
@click.argument("archive", callback=_check_archive)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for the import. Pass it to other commands as --catalog.",
)
@click.option(
    "--download",
    is_flag=True,
    help="Download the whole archive into that folder first. For servers without byte ranges.",
)
@release_option
def import_(archive: str, out: Path, download: bool, release_id: str) -> None:
    """Import sites, grids, years and labels of a published archive (URL or path).

    Reads byte ranges only. An interrupted import resumes when you run it again.

    \b
    Example:
      minecube release import https://example.org/EuroMineNet.zip --out eurominenet
    """
    known = _release(release_id)
    if download:
        with progress_bar("downloading") as advance:
            archive = str(releases.download(archive, out, lambda n, of: advance(n, total=of)))
    # Print this first: a silent server is tried again for minutes.
    click.echo(f"reading the directory of {archive.partition('?')[0]}", err=True)
    opened = releases.Archive(archive)
    sites = releases.find(opened.names()).sites()
    with progress_bar("importing", len(sites)) as advance:
        imported = releases.import_release(
            opened, out, known, load_sites(), lambda name: advance(note=name)
        )
    left_out = imported.years["problem"].dropna()
    strange = imported.about["strange"]
    click.echo(
        f"{out}: {len(imported.sites)} sites, {len(imported.years)} site-years, "
        f"{int(imported.labels['mapped'].sum())} labels of {int(imported.years['label'].notna().sum())}; "
        f"{opened.bytes.tally.bytes / 1e6:.2f} of {opened.bytes.size / 1e6:,.1f} MB read"
    )
    for row in imported.years.loc[left_out.index].to_dict("records"):
        click.echo(f"left out: {row['site']} {row['year']}: {row['problem']}", err=True)
    if strange:
        click.echo(
            f"not understood: {strange[0]}{f' and {len(strange) - 1} others' if strange[1:] else ''}",
            err=True,
        )
    click.echo(
        f"use it with --catalog {out}, and its labels with `minecube label --polygons {out}/labels.parquet`"
    )


@release.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--pixels",
    "archive",
    callback=_check_archive,
    help="URL or path of the archive. Reads all images, for band statistics and steps of the offset.",
)
@click.option(
    "--split",
    "split_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Split to audit (JSON). [default: the published split]",
)
@click.option(
    "--json",
    "out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for all findings and tables.",
)
@click.pass_context
def audit(
    ctx: click.Context, folder: Path, archive: str | None, split_file: Path | None, out: Path | None
) -> None:
    """List faults of an imported release and of its split. Exits with 1 if there are any.

    \b
    Example:
      minecube release audit eurominenet --json audit.json
    """
    imported = releases.open_import(folder)
    known, pixels = _release(imported.about["release"]), None
    if archive:
        opened = releases.Archive(archive)
        releases.need_same(opened, imported, folder)
        with progress_bar("reading images", int(imported.years["image"].notna().sum())) as advance:
            pixels = auditing.pixel_sums(opened, imported.years, lambda name: advance(note=name))
    split = (
        auditing.read_split(split_file) if split_file else auditing.split_of(known, load_sites())
    )
    found = auditing.audit(imported, known, split, pixels)
    rates = auditing.change_rates(imported.changes)
    counts = auditing.counted(found)
    click.echo(table(("check", "findings"), list(counts.items())) if found else "nothing is wrong")
    rows = [
        (f.check, f.site or "-", f.year or "-", f.found)
        for of in counts
        for f in [f for f in found if f.check == of][:SHOWN]
    ]
    if rows:
        click.echo("\n" + table(("check", "site", "year", "what was found"), rows))
    if len(rows) < len(found):
        click.echo(
            f"and {len(found) - len(rows)} more, of checks with over {SHOWN}; --json FILE has all"
        )
    following = rates[rates["year_2"] == rates["year_1"] + 1].to_dict("records")
    if following:
        shown = [
            (
                f"{r['year_1']}-{r['year_2']}",
                *(f"{100 * r[k] / r['pixels']:.3f}" for k in ("appeared", "vanished")),
            )
            for r in following
        ]
        click.echo("\n" + table(("pair of years", "appeared %", "vanished %"), shown))
    bands = auditing.band_statistics(pixels, known).reset_index() if pixels is not None else None
    if bands is not None:
        click.echo(
            "\n"
            + table(tuple(map(str, bands.columns)), [tuple(r) for r in bands.to_numpy().tolist()])
        )
    else:
        click.echo(
            "\nnot looked at: band statistics and offset steps, for which --pixels ARCHIVE reads all images"
        )
    if out:
        content = {
            "counts": counts,
            "findings": [dataclasses.asdict(f) for f in found],
            "changes": rates.to_dict("records"),
        }
        content |= {"bands": bands.to_dict("records")} if bands is not None else {}
        releases.write_json(out, content)
    ctx.exit(1 if found else 0)


@release.command()
@store_option
@sites_option
@click.option(
    "--import",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of an import, for the release's own grids.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for EuroMineNet/.",
)
def export(store: cube.Store, wanted: SiteChoice, folder: Path | None, out: Path) -> None:
    """Write cubes in the layout of the release: int16 images and 0/255 labels in EPSG:4326.

    With --import, files lie on the release's own grids, and labels are compared with the release's.

    \b
    Example:
      minecube release export --store cubes.zarr --import eurominenet --out again
    """
    imported = releases.open_import(folder) if folder else None
    names, rows = stored_sites(store, wanted), []
    foreign = [n for n in names if imported is not None and n not in set(imported.sites["id"])]
    if foreign:
        raise CatalogError(
            f"{store}: {', '.join(foreign)} not in {folder}, so no grid of theirs is known; name others by --sites"
        )
    with progress_bar("exporting", len(names)) as advance:
        for name in names:
            rows.append(export_site(store, name, imported, out))
            advance(note=name)
    click.echo(
        table(("site", "images", "labels", "without label", "lowest IoU with the release's"), rows)
    )
    click.echo(
        f"{out}/{layout.FOLDER}: {sum(r[1] for r in rows)} images, {sum(r[2] for r in rows)} labels"
    )


def export_site(
    store: cube.Store, name: str, imported: releases.Imported | None, out: Path
) -> tuple[str, int, int, str, str]:
    """Write a site's years in the release's layout. Returns a row of the command's table."""
    opened = cube.open_committed(store, name)
    if tuple(opened.band.values) != BANDS:
        raise CatalogError(
            f"{store}: {name} has the bands {', '.join(opened.band.values)}; the release has {', '.join(BANDS)}"
        )
    placed = {} if imported is None else releases.placed_years(imported, name)
    without, agreed = [], []
    for year in map(int, opened.year.values):
        of_year = opened.sel(year=year).load()
        # A year missing in the release gets the nearest year's grid: a site's images have one size.
        of = placed[min(placed, key=lambda y: (abs(y - year), y))] if placed else None
        grid = layout.release_grid(of) if of else layout.own_grid(opened.odc.geobox)
        fraction = of_year.get("footprint_fraction")
        if fraction is not None and bool((fraction == layout.UNKNOWN).all()):
            fraction = None
        label = layout.label_on(of_year["footprint"], fraction, grid)
        layout.write(out, name, year, layout.image_on(of_year["reflectance"], grid), label, grid)
        if label is None:
            without.append(str(year))
        elif (
            imported is not None
            and year in placed
            and placed[year]["problem"] is None
            and placed[year]["label"]
        ):
            agreed.append((layout.iou(label, releases.label_of(imported, name, year)), year))
    lowest = f"{min(agreed)[0]:.4f} ({min(agreed)[1]})" if agreed else "-"
    years = opened.sizes["year"]
    return name, years, years - len(without), ", ".join(without) or "-", lowest


def _release(name: str) -> Release:
    return pick(load_releases(), name, "release")
