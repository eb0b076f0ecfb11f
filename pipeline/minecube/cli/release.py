"""`minecube release`: the published EuroMineNet archive, read in place, audited, and cubes in its layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from minecube import release as releases
from minecube.catalog import Release, load_releases, load_sites, pick
from minecube.cli.common import progress_bar, table
from minecube.release import audit as auditing

release_option = click.option(
    "--release", "release_id", default="eurominenet", show_default=True, help="Which published dataset (catalog/releases.yaml)."
)
SHOWN = 40
"""Findings that are printed; the JSON has all."""


@click.group()
def release() -> None:
    """The published EuroMineNet archive: import its labels and sites without downloading it, and audit it.

    \b
    Example:
      minecube release import https://example.org/EuroMineNet.zip --out eurominenet
      minecube release audit eurominenet
      minecube build --catalog eurominenet --sites Germany_1 --years 2015-2024 --source earth-search-c1 --store cubes.zarr
      minecube label --store cubes.zarr --polygons eurominenet/labels.parquet
    """


@release.command(name="import")
@click.argument("archive")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder; becomes a --catalog.")
@click.option("--download", is_flag=True, help="Get all of it first, into that folder: for servers without byte ranges.")
@release_option
def import_(archive: str, out: Path, download: bool, release_id: str) -> None:
    """Read every site's area, grid, years and label polygons from the archive at a URL or path, by ranges of bytes.

    Run again, it goes on where it stopped.

    \b
    Example:
      minecube release import https://example.org/EuroMineNet.zip --out eurominenet
    """
    known = _release(release_id)
    if download:
        with progress_bar("downloading") as advance:
            archive = str(releases.download(archive, out, lambda n, of: advance(n, total=of)))
    opened = releases.Archive(archive)
    sites = releases.find(opened.names()).sites()
    with progress_bar("importing", len(sites)) as advance:
        imported = releases.import_release(opened, out, known, load_sites(), lambda name: advance(note=name))
    left_out = imported.years["problem"].dropna()
    click.echo(
        f"{out}: {len(imported.sites)} sites, {len(imported.years)} site-years, "
        f"{int(imported.labels['mapped'].sum())} labels of {int(imported.years['label'].notna().sum())}; "
        f"{opened.bytes.tally.bytes / 1e6:.1f} of {opened.bytes.size / 1e6:,.1f} MB read"
    )
    for row in imported.years.loc[left_out.index].to_dict("records"):
        click.echo(f"left out: {row['site']} {row['year']}: {row['problem']}", err=True)
    click.echo(f"use it with --catalog {out}, and its labels with `minecube label --polygons {out}/labels.parquet`")


@release.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--pixels", "archive", help="The archive itself, URL or path: reads all its images for statistics and offset steps."
)
@click.option(
    "--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write all findings and tables to this file."
)
@click.pass_context
def audit(ctx: click.Context, folder: Path, archive: str | None, out: Path | None) -> None:
    """Say what is wrong with an imported release and its split; exit 1 where anything is.

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
    found = auditing.audit(imported, known, load_sites(), pixels)
    rates = auditing.change_rates(imported.changes)
    counts = auditing.counted(found)
    click.echo(table(("check", "findings"), list(counts.items())) if found else "nothing is wrong")
    rows = [(f.check, f.site or "-", f.year or "-", f.found) for f in found]
    if rows:
        click.echo("\n" + table(("check", "site", "year", "what was found"), rows[:SHOWN]))
    if len(rows) > SHOWN:
        click.echo(f"and {len(rows) - SHOWN} more; --json FILE has all")
    following = rates[rates["year_2"] == rates["year_1"] + 1].to_dict("records")
    if following:
        shown = [
            (f"{r['year_1']}-{r['year_2']}", *(f"{100 * r[k] / r['pixels']:.3f}" for k in ("appeared", "vanished")))
            for r in following
        ]
        click.echo("\n" + table(("pair of years", "appeared %", "vanished %"), shown))
    bands = auditing.band_statistics(pixels, known).reset_index() if pixels is not None else None
    if bands is not None:
        click.echo("\n" + table(tuple(map(str, bands.columns)), [tuple(r) for r in bands.to_numpy().tolist()]))
    else:
        click.echo("\nnot looked at: band statistics and offset steps, for which --pixels ARCHIVE reads all images")
    if out:
        content = {"counts": counts, "findings": [dataclasses.asdict(f) for f in found], "changes": rates.to_dict("records")}
        content |= {"bands": bands.to_dict("records")} if bands is not None else {}
        releases.write_json(out, content)
    ctx.exit(1 if found else 0)


def _release(name: str) -> Release:
    return pick(load_releases(), name, "release")
