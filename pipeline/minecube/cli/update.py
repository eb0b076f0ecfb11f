"""Subcommand update: add years, sites and new scenes to a dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import click
import pandas as pd

from minecube.catalog import Dataset, format_years
from minecube.cli.bars import progress_bar
from minecube.cli.options import collect_options, dataset_argument
from minecube.cli.parameters import OutFile, Years
from minecube.cli.run import change_engine, engine_option, print_summary, report_to
from minecube.jobs.runs.engines import interrupted_by_sigterm
from minecube.jobs.runs.publishing import check_publishing, publish_dataset
from minecube.jobs.runs.units import list_steps
from minecube.jobs.runs.update import Changes, UpdateOptions, choose_store, find_changes
from minecube.jobs.runs.update import update as update_dataset
from minecube.jobs.tables import format_table
from minecube.places import Place, outgoing

_MOST_ROWS = 40


@click.command()
@dataset_argument
@click.option("--year", "years", type=Years(), help="Years to add: 2025, or 2024,2025.")
@click.option(
    "--sites",
    default="*",
    show_default=True,
    help="Names of sites of the dataset, comma-separated, * allowed.",
)
@click.option(
    "--refresh",
    is_flag=True,
    help="Search all scene lists again. Missing lists, and those saved before the season of their "
    "year was over, are always searched.",
)
@click.option(
    "--rebuild", is_flag=True, help="Also build site-years of other versions of minecube again."
)
@click.option("--changes", type=OutFile(), help="Write all changed scenes to this CSV file.")
@click.option("--dry-run", is_flag=True, help="Search and print only. Writes no list and no cube.")
@click.option(
    "--publish",
    "tag",
    help="Save the dataset under this tag in its Icechunk repository (`publish` in DATASET) if "
    "all searches had an answer and all is done.",
)
@engine_option
@collect_options
@interrupted_by_sigterm()
def update(
    dataset: Dataset,
    options: UpdateOptions,
    years: tuple[int, ...] | None,
    changes: Place | None,
    dry_run: bool,
    tag: str | None,
    engine: str | None,
) -> None:
    """Bring the dataset in DATASET up to date, a dataset.yaml.

    Builds new years and sites, and site-years whose scenes have changed. The old build of a
    site-year stays readable until the new one is whole. If the recipe has changed, its cubes go to
    a new store next to the present one. Exits with 1 if a search had no answer, or a step
    failed.

    \b
    Examples:
      minecube update dataset.yaml --year 2025
      minecube update dataset.yaml --refresh --dry-run
      minecube update dataset.yaml --year 2025 --publish v2025
    """
    dataset = change_engine(dataset, engine)
    if tag is not None:
        check_publishing(dataset, tag)
    dataset = _add_years(dataset, years or ())
    moved = choose_store(dataset)
    if moved is not dataset:
        _print_move(moved)
    with progress_bar("searching sites") as bar:
        found = find_changes(moved, options, save=not dry_run, note=bar.advance)
    _print_changes(found)
    if changes is not None:
        with outgoing(changes) as path:
            _list_scenes(found).to_csv(path, index=False)
    is_good = not found.unanswered
    if not dry_run:
        with progress_bar("updating") as bar:
            summary = update_dataset(moved, options, report_to(bar))
        print_summary(summary, list_steps(moved))
        is_good &= summary.exit_code == 0
        if tag is not None:
            is_good &= _publish(moved, tag, found)
    click.get_current_context().exit(int(not is_good))


def _publish(dataset: Dataset, tag: str, found: Changes) -> bool:
    """Publish a dataset whose searches all had an answer. Returns whether it is published."""
    if found.unanswered:
        count = len(found.unanswered)
        click.echo(f"{tag} is not published: {count} searches had no answer; run again", err=True)
        return False
    published = publish_dataset(dataset, tag)
    click.echo(published.text, err=not published.is_good)
    return published.is_good


def _add_years(dataset: Dataset, years: tuple[int, ...]) -> Dataset:
    """Add years for this run, and print what to write into the file."""
    missing = sorted(set(years) - set(dataset.years))
    if not missing:
        return dataset
    together = tuple(sorted({*dataset.years, *missing}))
    click.echo(
        f"{dataset.id} has no {format_years(missing)} yet: write `years: {format_years(together)}` "
        "into its file, or later runs will leave the year out",
        err=True,
    )
    return replace(dataset, years=together)


def _print_move(moved: Dataset) -> None:
    click.echo(
        f"another recipe, {moved.recipe}: its cubes go to {moved.store}, and the present store "
        "stays as it is. To continue with the new cubes, write into the dataset's file:\n"
        f"store: {moved.store}\nresults: {moved.results}\nscenes: {moved.scenes}",
        err=True,
    )


def _print_changes(found: Changes) -> None:
    scenes = _list_scenes(found)
    if len(scenes):
        _print_rows(("site", "year", "scene", "change", "detail"), scenes.to_numpy().tolist())
        kinds = Counter(scenes["change"])
        click.echo(", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    for (site, year), reason in found.unanswered.items():
        click.echo(f"error: {site} {year} was not searched: {reason}", err=True)
    if found.reasons:
        rows = [(*key, reason) for key, reason in sorted(found.reasons.items())]
        _print_rows(("site", "year", "why it is built"), rows)
    else:
        click.echo("no site-year is new or stale")
    if found.older:
        (site, year), reason = next(iter(found.older.items()))
        click.echo(
            f"{len(found.older)} site-years of other versions of minecube are left as they are "
            f"(first {site} {year}: {reason}); --rebuild builds them again",
            err=True,
        )


def _print_rows(headings: tuple[str, ...], rows: Sequence[Sequence[object]]) -> None:
    click.echo(format_table(headings, rows[:_MOST_ROWS]))
    if len(rows) > _MOST_ROWS:
        click.echo(f"... and {len(rows) - _MOST_ROWS} more")


def _list_scenes(found: Changes) -> pd.DataFrame:
    """Tabulate the changed scenes, one row each."""
    rows = [
        (site, year, change.scene, change.kind, change.detail)
        for (site, year), changes in sorted(found.scenes.items())
        for change in changes
    ]
    return pd.DataFrame(rows, columns=["site", "year", "scene", "change", "detail"])
