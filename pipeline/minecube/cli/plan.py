"""Subcommand plan: estimate what a build takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import click

from minecube.catalog import Site
from minecube.cli.bars import progress_bar
from minecube.cli.options import (
    SiteOptions,
    catalog_sites_options,
    collect_options,
    store_option,
    years_option,
)
from minecube.cli.parameters import InFile
from minecube.cli.scene_options import JobOptions, job_options
from minecube.composite.plan import Estimate, Terms
from minecube.jobs.build import BuildJob
from minecube.jobs.plan import BuildPlan, plan_build
from minecube.jobs.tables import format_table
from minecube.places import Place


@click.command()
@catalog_sites_options
@years_option
@job_options
@store_option
@click.option(
    "--prices",
    type=InFile(),
    help="YAML file with any of latency_s, mb_per_s, cores, currency, per_1000_requests, per_gb "
    "and per_core_hour.",
)
@collect_options
def plan(
    sites: SiteOptions, years: tuple[int, ...], options: JobOptions, prices: Place | None
) -> None:
    """Estimate the requests, bytes, memory, time and cost of a build.

    Reads no pixels and writes nothing. Saved scene lists are used; missing ones are searched.

    \b
    Example:
      minecube plan --sites my_mines.geojson --years 2019-2023 --source earth-search --store cubes.zarr --prices prices.yaml
    """
    job = options.load()
    terms = Terms()
    if prices:
        terms = Terms.load(prices)
    planned = plan_with_bar(job, sites.load(job.store), years, terms)
    print_plan(planned)
    if planned.errors:
        click.get_current_context().exit(1)


def plan_with_bar(
    job: BuildJob, sites: Sequence[Site], years: Sequence[int], terms: Terms | None = None
) -> BuildPlan:
    """Plan a build as `plan_build` does, and show the progress."""
    with progress_bar("planning", len(sites) * len(years), "site-years") as bar:
        return plan_build(
            job,
            sites,
            years,
            terms,
            lambda planned: bar.advance(f"{planned.site} {planned.year}, {planned.state}"),
        )


def print_plan(planned: BuildPlan) -> None:
    """Print upper bounds for each site-year, and their sum over the uncommitted ones."""
    for error in planned.errors:
        click.echo(f"error: {error}", err=True)
    rows = []
    for year in planned.years:
        days = year.days
        rows.append((year.site, year.year, year.state, days, *_needs(planned, year.needs)))
    if len(rows) > 1:
        rows.append(("all", "", "", "", *_needs(planned, planned.total)))
    headings = ["site", "year", "state", "days", "scenes", "reads", "checks", "requests"]
    headings += ["MB", "MB a block", "s"]
    if planned.total.cost(planned.terms) is not None:
        headings.append(f"cost {planned.terms.currency}")
    click.echo(format_table(headings, rows))
    terms = dataclasses.asdict(planned.terms).items()
    assumed = ", ".join(f"{name} {value}" for name, value in terms if value is not None)
    click.echo(
        f"reads, checks, requests, MB and MB a block are the most, with {assumed}; "
        "nothing was read or written"
    )
    click.echo(
        f"expected time: {planned.expected_s:.0f} s in all, "
        f"{planned.start_s:.0f} s to begin included ({_describe_pace(planned)})"
    )


def _needs(planned: BuildPlan, needs: Estimate) -> tuple[object, ...]:
    """Return the columns from scenes to cost."""
    counts = (needs.scenes, needs.reads, needs.checks, needs.requests)
    seconds = needs.seconds(planned.terms) * planned.pace
    sizes = (round(needs.bytes / 1e6, 1), round(needs.block_bytes / 1e6), round(seconds, 1))
    cost = needs.cost(planned.terms, planned.pace)
    if cost is None:
        return (*counts, *sizes)
    return (*counts, *sizes, f"{cost:.4f}")


def _describe_pace(planned: BuildPlan) -> str:
    if planned.measured_pace is None:
        return (
            "a guess, since this store has no builds to compare with; "
            "it may be wrong several times over"
        )
    return (
        f"from {planned.timed_builds} builds in this store, "
        f"which took {planned.measured_pace:.2f} times the guess for their size"
    )
