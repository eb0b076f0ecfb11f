"""Subcommand run: all steps of a whole dataset."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import click

from minecube.catalog import Dataset
from minecube.catalog.dataset import TEMPLATE
from minecube.cli.bars import Bar, progress_bar
from minecube.cli.options import collect_options, parse_dataset
from minecube.cli.parameters import OutFile, Years
from minecube.errors import CatalogError
from minecube.jobs.runs import RunOptions, Summary
from minecube.jobs.runs import run as run_dataset
from minecube.jobs.runs.driver import make_plan
from minecube.jobs.runs.engines import interrupted_by_sigterm
from minecube.jobs.runs.inputs import choose_cluster
from minecube.jobs.runs.summary import Progress
from minecube.jobs.runs.units import Shard, Unit, list_steps
from minecube.jobs.runs.worker import Result
from minecube.jobs.tables import format_table
from minecube.places import Place, outgoing

_MOST_FAILURES = 20


def _parse_steps(
    _ctx: click.Context, _param: click.Parameter, text: str | None
) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _parse_shard(_ctx: click.Context, _param: click.Parameter, text: str | None) -> Shard | None:
    return None if text is None else Shard.parse(text)


engine_option = click.option(
    "--engine",
    help="Where to run instead of the dataset's engine: local, another name of "
    "catalog/clusters.yaml, or the address of a Dask scheduler such as tcp://host:8786.",
)


@click.command()
@click.argument(
    "dataset",
    type=click.Path(dir_okay=False, path_type=Path),
    required=False,
    callback=parse_dataset,
)
@click.option(
    "--init",
    "template",
    type=OutFile(),
    help="Write a commented dataset.yaml to this file, and do nothing else.",
)
@click.option(
    "--only",
    callback=_parse_steps,
    help="Steps to run, comma-separated: search, audit, "
    "build, label, predict, tracks, score, export. [default: all of the dataset]",
)
@click.option(
    "--sites",
    default="*",
    show_default=True,
    help="Names of sites of the dataset, comma-separated, * allowed.",
)
@click.option(
    "--years", type=Years(), help="Years of the dataset: 2019-2023, or 2019,2021. [default: all]"
)
@click.option(
    "--shard",
    callback=_parse_shard,
    help="Part i of n of all site-years and sites, as i/n. For job arrays: no "
    "coordinator is needed. A last run without --shard joins the results of all sites.",
)
@engine_option
@click.option(
    "--dry-run", is_flag=True, help="Print how many units each step would run. Writes nothing."
)
@collect_options
@interrupted_by_sigterm()
def run(
    dataset: Dataset | None,
    template: Place | None,
    options: RunOptions,
    engine: str | None,
    dry_run: bool,
) -> None:
    """Run all steps of the dataset in DATASET, a dataset.yaml.

    Steps: search, audit, build, label, predict, tracks, score, export. Finished steps are
    skipped, so an interrupted run resumes when you run it again. A failed site-year does not stop
    the others. Exits with 1 if a step of some site failed.

    \b
    Examples:
      minecube run --init dataset.yaml
      minecube run dataset.yaml
      minecube run dataset.yaml --only search,build --sites 'Germany_*'
    """
    if template is not None:
        _write_template(template)
        return
    if dataset is None:
        raise click.UsageError("expected DATASET, a dataset.yaml; --init FILE writes one")
    dataset = change_engine(dataset, engine)
    if dry_run:
        plan = make_plan(dataset, options)
        rows = [(step, *counts) for step, counts in plan.preview().items()]
        click.echo(format_table(("step", "unfinished", "finished"), rows))
        _print_stale(plan.summary)
        return
    with progress_bar("running") as bar:
        summary = run_dataset(dataset, options, report_to(bar))
    print_summary(summary, list_steps(dataset, options.only))
    click.get_current_context().exit(summary.exit_code)


def change_engine(dataset: Dataset, engine: str | None) -> Dataset:
    """Replace the engine if another one is given, and let engines print a dashboard's address.

    `workers` of the dataset is for processes of this machine only.

    Raises CatalogError for an unknown engine.
    """
    logging.getLogger("minecube.jobs.runs").setLevel(logging.INFO)  # the dashboard's address
    if engine is None:
        return dataset
    changed = replace(dataset, engine=engine, workers=None)
    if choose_cluster(changed).kind == "local":
        return replace(changed, workers=dataset.workers)
    return changed


def report_to(bar: Bar) -> Progress:
    """Make the function that shows each unit that ends."""

    def report(unit: Unit, result: Result, total: int) -> None:
        note = str(unit)
        if not result.is_good:
            note += f" failed: {result.message}"
        bar.advance(note, total)

    return report


def _write_template(place: Place) -> None:
    if place.exists():
        raise CatalogError(f"{place}: exists already; name another file")
    with outgoing(place) as path:
        path.write_text(TEMPLATE, encoding="utf-8")
    click.echo(f"{place}: edit it, then run `minecube run {place.name}`")


def print_summary(summary: Summary, steps: list[str]) -> None:
    """Print how each step ended, and why units failed or are stale."""
    failed = summary.failures
    rows = [
        (
            step,
            summary.count(step),
            summary.kept[step],
            sum(unit.step == step for unit in failed),
            summary.blocked[step],
        )
        for step in steps
    ]
    click.echo(format_table(("step", "done", "finished before", "failed", "not possible"), rows))
    for unit, result in list(failed.items())[:_MOST_FAILURES]:
        click.echo(f"error: {unit}: {result.message}", err=True)
    if len(failed) > _MOST_FAILURES:
        click.echo(f"and {len(failed) - _MOST_FAILURES} more failures: `minecube status`", err=True)
    for step, reason in summary.unjoined.items():
        click.echo(f"error: the results of {step} are not joined: {reason}", err=True)
    _print_stale(summary)
    if sum(summary.waiting.values()):
        click.echo(
            f"{max(summary.waiting.values())} sites wait for site-years of other shards", err=True
        )


def _print_stale(summary: Summary) -> None:
    """Print how many site-years are stale, and why the first one is."""
    if not summary.stale:
        return
    unit, reason = next(iter(summary.stale.items()))
    click.echo(
        f"{len(summary.stale)} finished site-years are stale and stay as they are (first "
        f"{unit.site} {unit.year}: {reason}); `minecube update` builds them again, with --rebuild "
        "also those of other versions of minecube",
        err=True,
    )
