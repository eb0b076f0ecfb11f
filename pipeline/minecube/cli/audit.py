"""Subcommand audit: compare listed scenes with the passes expected from the orbits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click
import pandas as pd

from minecube.cli.bars import progress_bar
from minecube.cli.options import SiteOptions, catalog_sites_options, collect_options, years_option
from minecube.cli.parameters import OutFolder
from minecube.cli.scene_options import SceneOptions, scene_options
from minecube.jobs import pixel_audit
from minecube.jobs.audit import Audit, Unanswered, audit_scenes, save_audit
from minecube.jobs.tables import format_table
from minecube.places import Place, outgoing

_COLUMNS = (
    *("site", "year", "source", "listed", "refused", "copies", "scenes"),
    *("days", "expected", "missing", "usable", "gap_days", "cloud", "baselines", "state"),
)
_HEADINGS = {"gap_days": "gap", "cloud": "cloud %"}


@click.command()
@catalog_sites_options
@years_option
@scene_options
@click.option(
    "--out",
    type=OutFolder(),
    default=Path("audit"),
    show_default=True,
    help="Folder for audit.parquet (by month), audit.csv (by year) and audit.png.",
)
@click.option(
    "--pixels",
    is_flag=True,
    help="Also read the usable scenes, about as many bytes as a build, and count those with faults. "
    "wrapped: numbers above 32767. stuck: a constant or saturated band. displaced: a band that lies "
    "elsewhere than the others. strip: low values along the swath's edge. offset: an offset that "
    "contradicts its pixels. moved: a displaced scene.",
)
@collect_options
def audit(
    sites: SiteOptions, years: tuple[int, ...], scenes: SceneOptions, out: Place, pixels: bool
) -> None:
    """Compare the scenes that each source lists with the passes expected from the orbits.

    Reads no pixels without --pixels. Exits with 1 if a site-year has fewer usable dates than the
    recipe needs, or if a source does not answer. Faults in pixels do not change the exit status.

    \b
    Example:
      minecube audit --sites my_mines.geojson --years 2015-2024 --source earth-search,planetary-computer --out audit
    """
    loaded = sites.load()
    sources = scenes.sources()
    recipe = scenes.recipe()
    steps = len(loaded) * len(years) * len(sources) * (1 + pixels)
    with progress_bar("auditing", steps, "steps" if pixels else "searches") as bar:
        result = audit_scenes(loaded, years, sources, recipe, bar.advance, pixels=pixels)
    _print_unanswered(result.failed_searches)
    if not result.by_year.empty:
        _print_years(result)
        with outgoing(out) as folder:
            save_audit(result, folder)
        click.echo(f"saved in {out}")
    if len(result.too_few) or result.failed_searches:
        click.echo(
            f"of {result.requested} site-years, {len(result.too_few)} have too few usable dates "
            f"and {result.unanswered} could not be audited",
            err=True,
        )
        click.get_current_context().exit(1)


def _print_unanswered(failed: Iterable[Unanswered]) -> None:
    """Print each source's first error, and its number of site-years without answer."""
    by_source: dict[str, list[Unanswered]] = {}
    for search in failed:
        by_source.setdefault(search.source, []).append(search)
    for source, searches in by_source.items():
        subject = f"{searches[0].site_year} is"
        if len(searches) > 1:
            subject = f"{searches[0].site_year} and {len(searches) - 1} other site-years are"
        click.echo(f"error: {subject} not audited, {source}: {searches[0].reason}", err=True)


def _print_pixel_faults(by_year: pd.DataFrame) -> None:
    columns = ["site", "year", "source", *pixel_audit.COLUMNS]
    text = by_year[columns].astype(object)
    rows = text.where(text.notna(), "?").to_numpy().tolist()
    click.echo("\nscenes with faults in their pixels")
    click.echo(format_table(columns, rows))


def _print_years(audit: Audit) -> None:
    """Print all years, and errors for site-years below the recipe's minimum."""
    cloud = audit.by_year["cloud"].map("{:.0f}".format, na_action="ignore").fillna("-")
    text = audit.by_year.assign(cloud=cloud)[list(_COLUMNS)].astype(object)
    rows = text.where(text.notna(), "?").to_numpy().tolist()
    click.echo(format_table([_HEADINGS.get(name, name) for name in _COLUMNS], rows))
    months = ", ".join(map(str, audit.recipe.months))
    click.echo(
        f"days, expected, missing and usable are dates of months {months}; "
        "gap is the most days in a row without a usable one"
    )
    if pixel_audit.COLUMNS[0] in audit.by_year:
        _print_pixel_faults(audit.by_year)
    for row in audit.too_few.itertuples():
        click.echo(
            f"error: {row.site} {row.year}: {row.usable} usable dates, "
            f"and recipe {audit.recipe.id!r} needs {row.needed}; "
            f"the longest gap in season is {row.gap_days} days, {row.gap}",
            err=True,
        )
