"""Subcommand build: composite scenes into annual cubes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import click

from minecube import cube
from minecube.catalog import Site
from minecube.cli.bars import progress_bar
from minecube.cli.options import (
    SiteOptions,
    catalog_sites_options,
    collect_options,
    scheduler_option,
    writable_store_option,
    years_option,
)
from minecube.cli.parameters import FiniteRange
from minecube.cli.plan import plan_with_bar, print_plan
from minecube.cli.scene_options import JobOptions, job_options
from minecube.composite.plan import Estimate
from minecube.composite.values import describe_action
from minecube.errors import CatalogError
from minecube.grid import grid_of
from minecube.jobs.build import Outcome, build_cubes, load_geomedian
from minecube.jobs.tables import format_table
from minecube.jobs.workers import connect_workers
from minecube.scenes import offsets

LARGE_KM2 = 2500
"""Largest site built without --yes. Europe's largest open pits cover less than 100 km2."""
_PIXELS_PER_KM2 = 10_000


@dataclass(frozen=True)
class BuildRules:
    """When to replace builds, and when to commit: fields of `BuildJob`."""

    overwrite: bool
    on_offset_conflict: str
    min_read_completeness: float


@dataclass(frozen=True)
class Execution:
    """Where to build, and whether to build at all."""

    scheduler: str | None
    device: str
    yes: bool
    """Whether to build large sites."""
    dry_run: bool


@click.command()
@catalog_sites_options
@years_option
@job_options
@writable_store_option
@scheduler_option
@click.option(
    "--overwrite",
    is_flag=True,
    help="Also rebuild committed site-years whose scenes have changed or that lost reads. The old "
    "pixels stay until the new build is complete.",
)
@click.option(
    "--on-offset-conflict",
    type=click.Choice(offsets.CONFLICT_POLICIES),
    default="drop",
    show_default=True,
    help="What to do with a scene whose offset contradicts its pixels. warn: keep the scene. "
    "fix: read it with the offset that fits. drop: leave the scene out. fail: fail the site-year.",
)
@click.option(
    "--min-read-completeness",
    type=FiniteRange(0, 1),
    default=1.0,
    show_default=True,
    help="Commit a site-year only if at least this share of its reads (one band of one scene in "
    "one block each) succeeded. Below 1, lost reads count as unobserved. At 1, the first lost read "
    "fails the site-year.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Device for geomedians: cpu, or a GPU (cuda).",
)
@click.option(
    "--yes",
    is_flag=True,
    help=f"Also build sites larger than {LARGE_KM2} km2. Without --yes, their plan is shown and "
    "nothing is built.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the plan, as `minecube plan` does. Reads no pixels and writes nothing.",
)
@collect_options
def build(
    sites: SiteOptions,
    years: tuple[int, ...],
    options: JobOptions,
    rules: BuildRules,
    execution: Execution,
) -> None:
    """Composite scenes into cloud-free annual cubes, with one Zarr group per site.

    Finished site-years are skipped. An interrupted build resumes when you run it again.

    \b
    Examples:
      minecube build --sites my_mines.geojson --years 2019-2023 --source earth-search --store cubes.zarr
      minecube build --sites my_mines.geojson --years 2019-2023 --source earth-search-c1,planetary-computer --store cubes.zarr
    """
    job = replace(options.load(), **asdict(rules))
    loaded = sites.load(job.store)
    if execution.dry_run:
        planned = plan_with_bar(job, loaded, years)
        print_plan(planned)
        click.get_current_context().exit(int(bool(planned.errors)))
    large = [site for site in loaded if _area_km2(site) > LARGE_KM2]
    if large and not execution.yes:
        print_plan(plan_with_bar(job, large, years))
        listed = ", ".join(f"{site.id} ({_area_km2(site):,.0f} km2)" for site in large)
        raise CatalogError(
            f"{listed}: larger than {LARGE_KM2} km2, which no mine is, so nothing was built; "
            "the table says what it would take: check the polygon, or say --yes"
        )
    job = replace(job, geomedian=load_geomedian(execution.device))
    with (
        progress_bar("building", len(loaded) * len(years), "site-years") as bar,
        connect_workers(execution.scheduler) as executor,
    ):
        outcomes = build_cubes(
            job,
            loaded,
            years,
            executor,
            lambda outcome: bar.advance(_describe(outcome)),
            lambda site, year: bar.prepare(f"{site} {year} searched"),
        )
    _print_outcomes(outcomes)
    _print_planned_and_actual(outcomes)
    _print_messages(outcomes)
    _exit_if_failed(outcomes, job.store)


def _area_km2(site: Site) -> float:
    pixels: int = math.prod(grid_of(site).shape)
    return pixels / _PIXELS_PER_KM2


def _describe(outcome: Outcome) -> str:
    """Describe a finished site-year: its state unless built, and the reason of a failure."""
    text = f"{outcome.site} {outcome.year}"
    if outcome.state != "built":
        text += f", {outcome.state}"
    if outcome.message:
        text += f": {outcome.message}"
    return text


def _print_outcomes(outcomes: Sequence[Outcome]) -> None:
    columns = ["site", "year", "state", "scenes", "days", "offsets in conflict", "lost reads"]
    columns += ["requests", "MB", "MB planned", "s"]
    rows = [
        (
            outcome.site,
            outcome.year,
            outcome.state,
            outcome.scenes,
            outcome.days,
            outcome.conflicts,
            outcome.reads.get("lost", 0),
            int(_sum_of(outcome, "requests")),
            round(_sum_of(outcome, "bytes") / 1e6, 1),
            round(outcome.planned.bytes / 1e6, 1) if outcome.planned else 0.0,
            round(outcome.seconds, 1),
        )
        for outcome in outcomes
    ]
    click.echo(format_table(columns, rows))


def _sum_of(outcome: Outcome, name: str) -> float:
    """Sum a count over the reads of a site-year, and over those for its checks."""
    return outcome.reads.get(name, 0) + outcome.looks.get(name, 0)


def _print_planned_and_actual(outcomes: Sequence[Outcome]) -> None:
    """Print planned upper bounds next to actual reads, requests and megabytes."""
    built = [outcome for outcome in outcomes if outcome.planned]
    if not built:
        return
    planned = sum((outcome.planned for outcome in built if outcome.planned), Estimate())
    requests, read_bytes, retried = (
        sum(_sum_of(outcome, name) for outcome in built)
        for name in ("requests", "bytes", "retried")
    )
    rows = [
        ("reads", planned.reads, sum(int(outcome.reads["planned"]) for outcome in built)),
        (
            "reads that check offsets and places",
            planned.checks,
            sum(int(outcome.looks["planned"]) for outcome in built),
        ),
        ("requests", planned.requests, int(requests)),
        ("MB", round(planned.bytes / 1e6, 1), round(read_bytes / 1e6, 1)),
    ]
    click.echo("\n" + format_table(("", "planned, at most", "actual"), rows))
    if retried:
        click.echo(f"{int(retried)} requests were tried again")


def _print_messages(outcomes: Sequence[Outcome]) -> None:
    """Print copies of scenes, faults in values, and the reasons of failures."""
    for outcome in outcomes:
        site_year = f"{outcome.site} {outcome.year}"
        for scene, reason in outcome.copies.items():
            click.echo(f"{site_year}: {scene}: {reason}")
        for fault in outcome.value_faults:
            click.echo(f"{site_year}: {fault} ({describe_action(fault)})")
        if struck := int(outcome.reads.get("struck", 0)):
            click.echo(f"{site_year}: {struck} pixels left out (numbers above 32767, edge strips)")
        if outcome.message and outcome.state == "kept":
            click.echo(f"{site_year}: {outcome.message}", err=True)
        elif outcome.message:
            click.echo(f"error: {site_year}: {outcome.message}", err=True)


def _exit_if_failed(outcomes: Sequence[Outcome], store: cube.Store) -> None:
    """Print how many site-years failed, and exit with 1 if any did."""
    failed = sum(outcome.state == "failed" for outcome in outcomes)
    stale = sum(outcome.state == "stale" for outcome in outcomes)
    if failed:
        click.echo(
            f"{failed} of {len(outcomes)} site-years failed and are not in {store}; "
            "run the same command again to try them",
            err=True,
        )
    if stale:
        click.echo(
            f"{stale} of {len(outcomes)} site-years failed; {store} keeps an older build of them",
            err=True,
        )
    if failed or stale:
        click.get_current_context().exit(1)
