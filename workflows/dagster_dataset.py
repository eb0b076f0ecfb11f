"""Show and schedule a dataset in Dagster: one partition per site and year.

    export DAGSTER_HOME=$HOME/dagster MINECUBE_DATASET=$HOME/mines/dataset.yaml
    mkdir -p $DAGSTER_HOME && cp workflows/dagster.yaml $DAGSTER_HOME/
    dagster dev -f workflows/dagster_dataset.py
    python workflows/dagster_dataset.py BACKFILL_ID      prints what became of a backfill

Dagster starts the runs and shows them. The state of the dataset is in its store: a partition that
is built already is finished in seconds, whatever Dagster knows of it. A new site is one run with
all its years.
"""

import base64
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg
import xarray as xr

from minecube import cube, report
from minecube.catalog import Dataset, load_dataset
from minecube.jobs.runs import RunOptions, Summary, run
from minecube.jobs.runs.inputs import load_inputs
from minecube.jobs.runs.units import SITE_STEPS

SITE_YEAR_STEPS = ("search", "build")
_YEARLY = "0 3 15 1 *"
"""When the year before is complete: 15 January, 03:00."""
_NO_USE = ("data", "bug")
"""Classes of errors that a repetition meets again."""
_RANGE_START = "dagster/asset_partition_range_start"
_RANGE_END = "dagster/asset_partition_range_end"
"""Tags of Dagster for a run of several partitions."""
_RETRIES = dg.RetryPolicy(max_retries=3, delay=300, backoff=dg.Backoff.EXPONENTIAL)


def read_dataset() -> Dataset:
    """Load the dataset that the environment variable MINECUBE_DATASET names."""
    return load_dataset(Path(os.environ["MINECUBE_DATASET"]))


sites = dg.DynamicPartitionsDefinition(name="sites")
years = dg.StaticPartitionsDefinition([str(year) for year in read_dataset().years])
site_years = dg.MultiPartitionsDefinition({"site": sites, "year": years})


@dg.asset(partitions_def=site_years, retry_policy=_RETRIES)
def site_year(context: dg.AssetExecutionContext) -> None:
    """Search and build one site-year, or those of a range of partitions.

    If some of a range fail, the others are recorded all the same, and Dagster shows only those as
    failed.
    """
    chosen = {_split(key) for key in context.partition_keys}
    if not chosen:
        raise dg.Failure(
            "the range has no partitions; its end is before its start", allow_retries=False
        )
    dataset = read_dataset()
    options = RunOptions(
        only=SITE_YEAR_STEPS,
        sites=tuple(sorted({site for site, _ in chosen})),
        years=tuple(sorted({year for _, year in chosen})),
    )
    summary = run(dataset, options)
    failed = {(unit.site, unit.year) for unit in summary.failures}
    store = cube.Store.connect(dataset.store)
    for site, year in sorted(chosen - failed):
        partition = _join(site, year)
        metadata = _describe_cube(store, site, year)
        if summary.exit_code:
            event = dg.AssetMaterialization(
                context.asset_key, partition=partition, metadata=metadata
            )
            context.log_event(event)
        else:  # Dagster records all partitions at the end
            context.add_asset_metadata(metadata, partition_key=partition)
    _raise_failures(summary)


def _split(key: str) -> tuple[str, int]:
    """Split the key of a partition into site and year."""
    names = site_years.get_partition_key_from_str(key).keys_by_dimension
    return names["site"], int(names["year"])


def _join(site: str, year: int) -> dg.MultiPartitionKey:
    return dg.MultiPartitionKey({"site": site, "year": str(year)})


def _describe_cube(
    store: cube.Store, site: str, year: int
) -> dict[str, int | float | dg.MetadataValue]:
    cubes = cube.open_committed(store, site).sel(year=[year]).load()
    clear = cubes["clear_count"]
    return {
        "pixels": int(clear.size),
        "observed pixels": int((clear > 0).sum()),
        "mean clear observations": float(clear.mean()),
        "quicklook": dg.MetadataValue.md(_draw_quicklook(cubes, f"{site} {year}")),
    }


def _draw_quicklook(cubes: xr.Dataset, title: str) -> str:
    """Draw a cube as a picture inside Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quicklook.png"
        report.draw_strip(cubes, {}, path, title)
        picture = base64.b64encode(path.read_bytes()).decode()
    return f"![{title}](data:image/png;base64,{picture})"


@dg.asset(deps=[site_year], retry_policy=_RETRIES)
def results() -> dg.MaterializeResult:
    """Do all steps of whole sites: audit, label, predict, tracks, score and export."""
    dataset = read_dataset()
    summary = run(dataset)
    _raise_failures(summary)
    done = {f"{step} done": summary.count(step) for step in SITE_STEPS}
    return dg.MaterializeResult(metadata={**done, "seconds": summary.seconds})


def _raise_failures(summary: Summary) -> None:
    """Fail the run of Dagster with the reasons. It is tried again if that can help."""
    if not summary.exit_code:
        return
    reasons = [f"{unit}: {result.message}" for unit, result in summary.failures.items()]
    reasons += [f"{step} is not joined: {reason}" for step, reason in summary.unjoined.items()]
    classes = {result.error_class for result in summary.failures.values()}
    raise dg.Failure("\n".join(reasons), allow_retries=bool(classes - set(_NO_USE)))


build_job = dg.define_asset_job("build_site_years", [site_year])
results_job = dg.define_asset_job("make_results", [results])


@dg.schedule(cron_schedule=_YEARLY, job=build_job)
def each_january() -> Iterator[dg.RunRequest]:
    """Build the last year of the dataset for all sites. Add the year to dataset.yaml before."""
    dataset = read_dataset()
    for site in load_inputs(dataset).sites:
        yield dg.RunRequest(partition_key=_join(site, dataset.years[-1]))


@dg.schedule(cron_schedule="0 3 20 1 *", job=results_job)
def results_each_january() -> dg.RunRequest:
    """Do the steps of whole sites, once their years are built."""
    return dg.RunRequest()


@dg.sensor(job=build_job, minimum_interval_seconds=3600)
def new_sites(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Build all years of sites that the dataset has and Dagster does not know.

    A site is one run with all its years, since each run of Dagster starts a process for seconds.
    The requests have no run key. With a key, a site that was removed and added again would not be
    built.
    """
    dataset = read_dataset()
    load_inputs.cache_clear()  # the file of sites may have changed
    known = set(context.instance.get_dynamic_partitions("sites"))
    new = [site for site in load_inputs(dataset).sites if site not in known]
    return dg.SensorResult(
        run_requests=[_request_years(site, dataset.years) for site in new],
        dynamic_partitions_requests=[sites.build_add_request(new)] if new else [],
    )


def _request_years(site: str, of_years: Sequence[int]) -> dg.RunRequest:
    """Request one run for all years of a site.

    A range over several sites would be unsafe: it has all years between those of its two ends.
    """
    first, last = _join(site, of_years[0]), _join(site, of_years[-1])
    return dg.RunRequest(tags={_RANGE_START: first, _RANGE_END: last})


def count_backfill(instance: dg.DagsterInstance, backfill: str) -> Counter[str]:
    """Count the runs of a backfill by their state.

    A backfill from the command line is COMPLETED once its runs are queued, even if all fail later.
    """
    runs = instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": backfill}))
    return Counter(run.status.value for run in runs)


definitions = dg.Definitions(
    assets=[site_year, results],
    jobs=[build_job, results_job],
    schedules=[each_january, results_each_january],
    sensors=[new_sites],
    # Each run has one step. By default, Dagster would start a second process for it.
    executor=dg.in_process_executor,
)

if __name__ == "__main__":
    counts = count_backfill(dg.DagsterInstance.get(), sys.argv[1])
    print(", ".join(f"{number} {state}" for state, number in counts.items()) or "no runs")
    sys.exit(int(set(counts) != {"SUCCESS"}))
