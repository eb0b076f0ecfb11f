"""Subcommand retry: try the failed parts of a run again."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import click

from minecube.catalog import Dataset
from minecube.cli.bars import progress_bar
from minecube.cli.options import collect_options, dataset_argument
from minecube.cli.run import change_engine, engine_option, print_summary, report_to
from minecube.jobs.failures import CLASSES
from minecube.jobs.runs.engines import interrupted_by_sigterm
from minecube.jobs.runs.retry import MENDABLE, Failure, RetryOptions
from minecube.jobs.runs.retry import retry as retry_dataset
from minecube.jobs.runs.units import list_steps

_ADVICE = {
    "data": "correct the input, then run `minecube run`",
    "bug": "please report it",
}
"""Class of errors that a repetition does not mend -> what to do."""


def _parse_time(
    _ctx: click.Context, _param: click.Parameter, moment: datetime | None
) -> datetime | None:
    return None if moment is None else moment.replace(tzinfo=UTC)


@click.command()
@dataset_argument
@click.option(
    "--class",
    "classes",
    multiple=True,
    type=click.Choice(CLASSES),
    default=MENDABLE,
    show_default=True,
    help="Class of failures to try again. Repeat it for several. Interrupted parts are always "
    "tried again.",
)
@click.option(
    "--failed-since",
    type=click.DateTime(),
    callback=_parse_time,
    help="Only failures since this time (UTC), such as 2026-01-31 or 2026-01-31T12:00:00.",
)
@click.option(
    "--site",
    "sites",
    default="*",
    show_default=True,
    help="Names of sites of the dataset, comma-separated, * allowed.",
)
@click.option(
    "--attempts",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Most attempts at each part. Pauses before further attempts: 1, 2, 4, ... minutes, up to "
    "an hour.",
)
@engine_option
@collect_options
@interrupted_by_sigterm()
def retry(dataset: Dataset, options: RetryOptions, engine: str | None) -> None:
    """Try the failed parts of a run of DATASET again, a dataset.yaml.

    Classes of failures: network (a server did not answer), memory, disk (full or broken), data (the
    input is missing or wrong) and bug (an error of minecube). Site-years that lacked memory are
    built in smaller blocks, with the same pixels. Later steps of mended sites run, too. Exits with
    1 if failures remain.

    \b
    Examples:
      minecube retry dataset.yaml
      minecube retry dataset.yaml --class network --attempts 5
      minecube retry dataset.yaml --failed-since 2026-01-31 --site 'Germany_*'
    """
    dataset = change_engine(dataset, engine)

    def pause(seconds: float) -> None:
        click.echo(f"next attempt in {seconds:.0f} s", err=True)
        time.sleep(seconds)

    with progress_bar("retrying") as bar:
        retried = retry_dataset(dataset, options, report_to(bar), pause)
    for summary in retried.passes:
        print_summary(summary, list_steps(dataset))
    if not retried.passes:
        click.echo(f"no failure of class {', '.join(options.classes)} to try again")
    for failure in retried.left:
        click.echo(_describe(failure), err=True)
    click.get_current_context().exit(
        int(bool(retried.left) or any(summary.exit_code for summary in retried.passes[-1:]))
    )


def _describe(failure: Failure) -> str:
    text = f"{failure.unit}: {failure.error_class}, {failure.attempts} attempts: {failure.message}"
    if advice := _ADVICE.get(failure.error_class):
        text += f"; {advice}"
    return text
